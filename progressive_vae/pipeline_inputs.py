"""Inputs and outputs of a pipeline's calls: prompts, sampling arguments, callbacks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .arguments import as_integer, as_number
from .models.conditioning import ClassLabels, Conditioning
from .models.sampling import Sampler, per_factor
from .stack import LevelStack

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SAMPLING_FIELDS = ("temperature", "top_p", "guidance_scale")

Sampling: TypeAlias = dict[str, float | list[float]]


@dataclass
class ProgressiveVAEPipelineOutput(BaseOutput):
    """
    Args:
        images: of the requested `output_type`; for `"latent"` the finest codes z_N.
        codes: [z_1 … z_N], int64 (B, H_i, W_i) each.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    codes: list[Tensor]


def prompt_inputs(
    stack: LevelStack,
    class_labels: ClassLabels,
    guidance_scale: float | list[float],
    codes: Any,
    num_images_per_prompt: int,
) -> tuple[Conditioning, list[Tensor]]:
    """The conditioning and the initial grids [z_1 … z_k], int64 (B, H_i, W_i) each, of all images.

    Raises:
        ValueError: codes or labels that do not fit the stack, labels or a text that no sampled
            factor uses, or codes of no level where there is no prior.
    """
    repeats = as_integer("num_images_per_prompt", num_images_per_prompt, 1)
    grids = [] if codes is None else as_grids(codes)
    if codes is not None:
        stack.check_codes(grids)
    sampled = stack.levels[len(grids) - 1 :] if grids else [stack.require_prior(), *stack.levels]
    if isinstance(class_labels, Conditioning) and class_labels.embeddings is not None:
        if all(part.config.condition_dim is None for part in sampled):
            raise ValueError(
                "expected prompt=None, as no sampled factor is conditioned on a text, got one"
            )
    elif class_labels is not None and not any(part.config.num_classes for part in sampled):
        raise ValueError(
            "expected class_labels=None, as no sampled factor is class-conditional, got "
            f"{class_labels}"
        )
    count = len(grids[0]) if grids else None
    conditioning = guided_conditioning(stack, class_labels, guidance_scale, count)
    return conditioning.repeat(repeats), [z.repeat_interleave(repeats, 0) for z in grids]


Text: TypeAlias = str | list[str] | None


@dataclass(frozen=True)
class TextInputs:
    """The arguments of a call by which it is conditioned on texts.

    Args:
        prompt: a text, or one for each image.
        prompt_embeds, prompt_attention_mask: its embeddings, float (B, T, D) or (B, D), in place of
            it, and which of them there are, (B, T); `None`: all.
        negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask: what guidance leads
            away from; one text for all, or one for each.
    """

    prompt: Text = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt: Text = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None

    def conditioning(
        self,
        stack: LevelStack,
        class_labels: ClassLabels,
        encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    ) -> ClassLabels:
        """Classes and embeddings, on the CPU; `class_labels` where there are no texts.

        Args:
            encode: texts -> their embeddings and mask.

        Raises:
            ValueError: both a text and its embeddings, a mask alone, a negative text alone,
                embeddings that do not fit, or parts that none of this is for.
        """
        positive = self._embeddings("prompt", encode)
        negative = self._embeddings("negative_prompt", encode)
        if positive is None and negative is None:
            return class_labels
        if positive is None:
            raise ValueError("expected a prompt with negative_prompt, got none")
        if stack.condition_dim is None:
            raise ValueError(
                "expected prompt=None, as all parts have config.condition_dim=None, got a text"
            )
        count = len(positive[0])
        conditioning = stack.as_conditioning(class_labels, count).with_embeddings(*positive)
        if negative is not None:
            one_or_all = [x.expand(count, *x.shape[1:]) if len(x) == 1 else x for x in negative]
            null = stack.as_conditioning(None, count)
            conditioning = replace(conditioning, negative=null.with_embeddings(*one_or_all))
        return conditioning

    def _embeddings(
        self, name: str, encode: Callable[[list[str]], tuple[Tensor, Tensor]]
    ) -> list[Tensor] | None:
        """Embeddings and their mask, if there is one, on the CPU."""
        text = getattr(self, name)
        embeds = getattr(self, f"{name}_embeds")
        mask = getattr(self, f"{name}_attention_mask")
        if text is not None and embeds is not None:
            raise ValueError(f"expected one of {name} and {name}_embeds, got both")
        if mask is not None and embeds is None:
            raise ValueError(
                f"expected {name}_attention_mask with {name}_embeds only, got it alone"
            )
        if text is not None:
            embeds, mask = encode(as_texts(text, name))
        if embeds is None:
            return None
        return [x.cpu() if isinstance(x, Tensor) else x for x in (embeds, mask) if x is not None]


def as_texts(text: Any, name: str) -> list[str]:
    """One text or a sequence of them as a list."""
    texts = [text] if isinstance(text, str) else text
    is_list = isinstance(texts, (list, tuple)) and len(texts) > 0
    if not is_list or not all(isinstance(x, str) for x in texts):
        raise ValueError(f"expected {name} to be a text or a list of texts, got {text!r}")
    return list(texts)


def guided_conditioning(
    stack: LevelStack,
    class_labels: ClassLabels,
    guidance_scale: float | list[float],
    batch_size: int | None,
) -> Conditioning:
    """`LevelStack.as_conditioning`; a `ValueError` for guidance without labels or a text, and for
    a negative text without guidance."""
    is_guided = np.any(np.asarray(guidance_scale) != 1)
    if class_labels is None and is_guided:
        raise ValueError(
            f"expected guidance_scale=1 without class_labels or a prompt, got {guidance_scale}"
        )
    conditioning = stack.as_conditioning(class_labels, batch_size)
    if conditioning.negative is not None and not is_guided:
        raise ValueError(
            "expected a guidance_scale other than 1 for negative_prompt, which guidance leads away "
            f"from, got {guidance_scale}"
        )
    return conditioning


def check_sampling(sampling: Any, factor_names: list[str]) -> Sampling | None:
    """The sampling defaults of a pipeline's config, as numbers and lists of Python.

    Raises:
        ValueError: anything but a dict with some of `SAMPLING_FIELDS`, each a number that a
            `Sampler` takes, or a list with one for each factor.
    """
    if sampling is None:
        return None
    if not isinstance(sampling, dict) or not set(sampling) <= set(SAMPLING_FIELDS):
        raise ValueError(
            f"expected sampling to be a dict with some of {SAMPLING_FIELDS}, got {sampling!r}"
        )
    checked: Sampling = {}
    for field, value in sampling.items():
        try:
            rows = per_factor(factor_names, **{field: value})
            numbers = [as_number(field, row[field], "a number", lambda _: True) for row in rows]
            for number in numbers:
                arguments: dict[str, Any] = {field: number}
                Sampler(1, **arguments)
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from error
        checked[field] = numbers if len(set(numbers)) > 1 else numbers[0]
    return checked


def with_sampling_defaults(
    sampling: Sampling | None,
    class_labels: ClassLabels,
    temperature: float | list[float] | None,
    top_p: float | list | None,
    guidance_scale: float | list[float] | None,
) -> tuple[float | list[float], float | list | None, float | list[float]]:
    """temperature, top_p and guidance_scale of a call: its own, and the defaults where it has none.

    The defaults are settings for use together with their temperature. A call with a temperature
    therefore ignores all of them, and temperature 1 is the exact distribution.
    """
    defaults: dict[str, Any] = {} if sampling is None or temperature is not None else sampling
    if temperature is None:
        temperature = defaults.get("temperature", 1.0)
    if top_p is None:
        top_p = defaults.get("top_p")
    if guidance_scale is None:  # there is nothing to guide to without a class
        guidance_scale = 1.0 if class_labels is None else defaults.get("guidance_scale", 1.0)
    return temperature, top_p, guidance_scale


def per_factor_sampling_kwargs(
    stack: LevelStack, num_initial: int, num_levels: int | None, **sampling_kwargs: Any
) -> list[dict]:
    """The sampling arguments of [prior, level_1 … level_N], each one for all of them or a list.

    Args:
        num_initial: the number of grids that the call starts from.
        num_levels: the number of grids that are sampled with these arguments; finer factors return
            their most probable values.

    Raises:
        ValueError: a list for other factors, `code_noise` without a level that has it, or
            `num_levels` out of range or smaller than `num_initial`.
    """
    rows = per_factor(stack.factor_names, **sampling_kwargs)
    for row in rows:  # before anything is sampled
        value = row["code_noise"]
        row["code_noise"] = as_number("code_noise", value, ">= 0", lambda x: x >= 0)
        Sampler(1, **{name: value for name, value in row.items() if name != "code_noise"})
    rows[0].pop("code_noise")  # the prior is not conditioned on codes
    code_noise = sampling_kwargs["code_noise"]
    if np.any(code_noise) and not any(config.code_noise for config in stack.configs):
        raise ValueError(
            f"expected code_noise=0, as all levels have config.code_noise=0, got {code_noise}"
        )
    if num_levels is not None:
        num_levels = as_integer("num_levels", num_levels, 1, stack.num_levels)
        if num_initial > num_levels:
            raise ValueError(
                f"expected codes of at most num_levels={num_levels} levels, got {num_initial}"
            )
        for row in rows[num_levels:]:
            row["temperature"] = 0.0
    return rows


def check_outputs(output_type: str, callback_inputs: Iterable[str], allowed: list[str]):
    """Raise a `ValueError` for an unknown output type, or a callback that asks for tensors other
    than the allowed ones."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"expected output_type in {OUTPUT_TYPES}, got {output_type!r}")
    if isinstance(callback_inputs, str):
        raise ValueError(
            f"expected callback_on_step_end_tensor_inputs to be a list among {allowed}, got "
            f"{callback_inputs!r}"
        )
    if unknown := sorted(set(callback_inputs) - set(allowed)):
        raise ValueError(
            f"expected callback_on_step_end_tensor_inputs among {allowed}, got {unknown}"
        )


def as_grids(codes: Any) -> list[Tensor]:
    """[z_1 … z_k] of a list or tuple of tensors, or of arrays of numpy.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(codes, (list, tuple)):
        raise ValueError(
            f"expected codes to be a list [z_1 … z_k] of tensors, got {type(codes).__name__}"
        )
    grids = [torch.from_numpy(z) if isinstance(z, np.ndarray) else z for z in codes]
    if not all(isinstance(z, Tensor) for z in grids):
        kinds = [type(z).__name__ for z in grids]
        raise ValueError(f"expected codes to be a list [z_1 … z_k] of tensors, got {kinds}")
    return grids


def is_codes(value: Any) -> bool:
    """Whether a value is a list of code grids rather than images."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(z, (np.ndarray, Tensor)) and z.dtype in (torch.long, np.int64) for z in value
    )


def callback_codes(result: Any, grids: list[Tensor], stack: LevelStack) -> list[Tensor]:
    """The grids [z_1 … z_k], int64 (B, H_i, W_i) each, that a callback returned; `grids`, the
    current ones, if it returned nothing.

    Raises:
        ValueError: no dict with as many grids of as many images, or codes out of their range.
    """
    if not result:
        return grids
    if not isinstance(result, dict) or set(result) != {"codes"}:
        raise ValueError(
            "expected callback_on_step_end to return a dict with some of ['codes'], or None, got "
            f"{result!r}"
        )
    codes = result["codes"]
    count = len(grids[0])
    is_list = isinstance(codes, (list, tuple)) and all(isinstance(z, Tensor) for z in codes)
    if not is_list or [len(z) for z in codes] != [count] * len(grids):
        shapes = [tuple(z.shape) for z in codes] if is_list else codes
        raise ValueError(
            f"expected callback_on_step_end to return codes [z_1 … z_{len(grids)}] of {count} "
            f"images, got {shapes}"
        )
    stack.check_codes(list(codes))
    return [z.to(stack.device) for z in codes]
