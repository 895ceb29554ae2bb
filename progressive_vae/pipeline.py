"""`ProgressiveVAEPipeline`: the levels and the prior as a diffusers pipeline."""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import as_integer, renamed_argument
from .codec import codec
from .configuration.validation import MAX_LEVELS, check_parts
from .hub.repository import HubPipeline
from .image_processor import Images, as_images, from_pixel_values, pixel_value_batches
from .inpainting import inpaint, interpolate, shared_noise
from .models.conditioning import ClassLabels
from .models.fingerprint import check_fingerprints
from .models.level import ProgressiveVAELevel
from .models.prior import ProgressiveVAEPrior
from .models.sampling import Generators, as_generators, part_of, per_factor
from .models.text_encoding import encode_texts, load_text_encoder
from .pipeline_inputs import (
    ProgressiveVAEPipelineOutput,
    Sampling,
    TextInputs,
    as_grids,
    as_texts,
    callback_codes,
    check_outputs,
    check_sampling,
    is_codes,
    per_factor_sampling_kwargs,
    prompt_inputs,
    with_sampling_defaults,
)
from .stack import LevelStack

TEXTS = {field.name for field in fields(TextInputs)}


@dataclass
class CallState:
    """State of one sampling call; callbacks read and change it through the pipeline.

    Args:
        guidance_scale: of the factors that follow, one or a list for all.
        num_timesteps: the factors that the call samples, times its batches.
        interrupt: a callback set it to end the call early.
    """

    guidance_scale: float | list[float] = 1.0
    num_timesteps: int = 0
    interrupt: bool = False
    is_running: bool = False


class ProgressiveVAEPipeline(HubPipeline):
    """`P(s, z) = P_Φ(z_1) · ∏ P_Θ(z_i | z_{i−1}) · P_Θ(s | z_N)`.

    Lists over levels start with the coarsest: `codes[i - 1]` is z_i. Wherever images come in they
    may be a PIL image or a list of them, uint8 arrays (B, H, W, C) or tensors (B, C, H, W) in
    0 … 255, or float ones in [0, 1], which are rounded to 8 bits. Nothing is resized.

    Args:
        prior: `P_Φ(z_1)`; without it (`None`) everything works that needs no prior.
        level_1 … level_8: the levels, without a gap; level_1 is the coarsest.
        image_size: [H, W]; derived from the prior's grid where not given.
        sampling: defaults of calls that sample, with which the model is meant to be used: a dict
            with some of `temperature`, `top_p` and `guidance_scale`, each a number or a list for
            [prior, level_1 … level_N]. They apply where a call passes no such argument; a call with
            a temperature ignores them all, so that `temperature=1.0` is the exact distribution.
            `None`: the exact distribution. Likelihood and streams never depend on them.
            `pipe.register_to_config(sampling=…)` replaces them.
        text_encoder, tokenizer: of prompts, for parts that are conditioned on their embeddings: a
            model of transformers whose output has a `last_hidden_state`, as CLIP's or T5's.
        text_encoder_id: a repository or folder of both, in place of them, which is loaded with the
            first prompt and is not saved with the pipeline.
    """

    _optional_components = [
        *("text_encoder", "tokenizer", "prior"),
        *(f"level_{i}" for i in range(2, MAX_LEVELS + 1)),
    ]
    model_cpu_offload_seq: Any = "->".join(
        ["text_encoder", "prior", *(f"level_{i}" for i in range(1, MAX_LEVELS + 1))]
    )
    _callback_tensor_inputs = ["codes"]

    prior: ProgressiveVAEPrior | None
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self,
        prior: ProgressiveVAEPrior | None,
        level_1: ProgressiveVAELevel,
        level_2: ProgressiveVAELevel | None = None,
        level_3: ProgressiveVAELevel | None = None,
        level_4: ProgressiveVAELevel | None = None,
        level_5: ProgressiveVAELevel | None = None,
        level_6: ProgressiveVAELevel | None = None,
        level_7: ProgressiveVAELevel | None = None,
        level_8: ProgressiveVAELevel | None = None,
        image_size: list[int] | tuple[int, ...] | None = None,
        sampling: dict | None = None,  # diffusers checks values only by plain types
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_id: str | None = None,
    ):
        super().__init__()
        self._referenced_text_encoder: Any = None  # what `text_encoder_id` names, once loaded
        self._call_states: dict[int, CallState] = {}  # of each thread the current or last call
        self.register_modules(
            prior=prior, level_1=level_1, level_2=level_2, level_3=level_3, level_4=level_4,
            level_5=level_5, level_6=level_6, level_7=level_7, level_8=level_8,
            text_encoder=text_encoder, tokenizer=tokenizer,
        )  # fmt: skip
        slots = [getattr(self, f"level_{i}") for i in range(1, MAX_LEVELS + 1)]
        # A compiled part has no truth value, as it forwards `len` to a model that has none.
        configs = [None if part is None else part.config for part in (prior, *slots)]
        image_size = check_parts(configs[0], configs[1:], image_size)
        check_fingerprints(prior, self.levels)
        self.register_to_config(image_size=image_size)
        self.register_to_config(sampling=sampling)
        if (text_encoder is None) != (tokenizer is None):
            missing = "text_encoder" if text_encoder is None else "tokenizer"
            raise ValueError(f"expected both text_encoder and tokenizer or none, got no {missing}")
        self.register_to_config(text_encoder_id=text_encoder_id)

    def register_to_config(self, **kwargs):
        """As in diffusers; raises a `ValueError` for invalid `sampling`."""
        if "sampling" in kwargs:
            kwargs["sampling"] = check_sampling(kwargs["sampling"], self.factor_names)
        super().register_to_config(**kwargs)

    @classmethod
    def from_levels(
        cls,
        prior: ProgressiveVAEPrior | None,
        levels: list[ProgressiveVAELevel],
        image_size: list[int] | tuple[int, ...] | None = None,
        sampling: Sampling | None = None,
        **text_encoding: Any,
    ) -> "ProgressiveVAEPipeline":
        """The pipeline of a prior and the levels [level_1 … level_N].

        Args:
            text_encoding: `text_encoder` and `tokenizer`, or `text_encoder_id`.
        """
        if not 1 <= len(levels) <= MAX_LEVELS:
            raise ValueError(f"expected 1 … {MAX_LEVELS} levels, got {len(levels)}")
        slots: dict[str, Any] = {f"level_{i}": level for i, level in enumerate(levels, 1)}
        slots |= text_encoding
        return cls(prior, **slots, image_size=image_size, sampling=sampling)

    # ---- components -----------------------------------------------------------------------------

    @property
    def stack(self) -> LevelStack:
        """The model without diffusers: the prior and the levels, on the execution device."""
        return self._stack_on(self._execution_device)

    def _stack_on(self, device: torch.device | None) -> LevelStack:
        return LevelStack(self.prior, self.levels, self.config["image_size"], device)

    @property
    def levels(self) -> list[ProgressiveVAELevel]:
        """[level_1 … level_N]."""
        slots = (getattr(self, f"level_{i}") for i in range(1, MAX_LEVELS + 1))
        return [level for level in slots if level is not None]

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @property
    def factor_names(self) -> list[str]:
        """The factors of P(s, z) in the order of sampling: prior, level_1 … level_N."""
        return self._stack_on(None).factor_names  # without a search for the execution device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._stack_on(None).image_shape

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """[(H_1, W_1) … (H_N, W_N), (H, W)]: each level's codes, then the image."""
        return self._stack_on(None).grid_sizes

    @property
    def labels(self) -> dict[str, int]:
        """Class names -> class ids."""
        config = self._stack_on(None).class_config
        names = config.id2label if config.num_classes else None
        return {name: i for i, name in (names or {}).items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of names, as in diffusers' DiT pipeline."""
        return self._stack_on(None).as_conditioning(label).class_ids.tolist()

    def compile(self, **kwargs):
        """Compile the prior and the levels, for training and sampling.

        Streams do not change: `compress` and `decompress` run the factors without it.

        Args:
            kwargs: as of `torch.compile`.
        """
        for part in (self.prior, *self.levels):
            if part is not None:
                part.compile(**kwargs)

    def enable_cuda_graph(self):
        """Sample each factor as one CUDA graph for each batch size, with the same results.

        Raises:
            ValueError: a factor is not on a CUDA device.
        """
        for part in (self.prior, *self.levels):
            if part is not None:
                part.enable_cuda_graph()

    def enable_sequential_cpu_offload(self, *args, **kwargs):
        """Not supported: weights are read outside of the `forward` that its hooks wait for."""
        raise ValueError("expected enable_model_cpu_offload in place of the sequential one")

    # ---- texts ----------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Embeddings, float (B, T, D), and masks, bool (B, T), of prompts and negative ones.

        An empty prompt has no embedding: it is the null condition.

        Returns:
            the arguments `prompt_embeds`, `prompt_attention_mask`, `negative_prompt_embeds` and
            `negative_prompt_attention_mask` of a call.

        Raises:
            ValueError: a pipeline without a text encoder, or prompts that are no texts.
        """
        repeats = as_integer("num_images_per_prompt", num_images_per_prompt, 1)
        results: list[Tensor | None] = []
        for name, text in {"prompt": prompt, "negative_prompt": negative_prompt}.items():
            if text is None and name == "negative_prompt":
                results += [None, None]
            else:
                pair = self._encode_texts(as_texts(text, name))
                results += [x.repeat_interleave(repeats, 0) for x in pair]
        embeds, mask, negative_embeds, negative_mask = results
        assert embeds is not None and mask is not None
        return embeds, mask, negative_embeds, negative_mask

    def _encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        device = self._execution_device
        if self.text_encoder is not None and self.tokenizer is not None:
            return encode_texts(self.text_encoder, self.tokenizer, texts, device)
        name = self.config["text_encoder_id"]
        if name is None:
            raise ValueError(
                f"expected a pipeline with text_encoder and tokenizer for a prompt, got none for "
                f"{texts[0]!r}; prompt_embeds need none"
            )
        if self._referenced_text_encoder is None:
            self._referenced_text_encoder = load_text_encoder(name)
        text_encoder, tokenizer = self._referenced_text_encoder
        return encode_texts(text_encoder.to(device), tokenizer, texts)

    def _with_texts(self, class_labels: ClassLabels, **texts: Any) -> ClassLabels:
        """`class_labels`, with the embeddings of the arguments of `TextInputs`."""
        stack = self._stack_on(None)
        return TextInputs(**texts).conditioning(stack, class_labels, self._encode_texts)

    # ---- state of a call, one for each thread ---------------------------------------------------

    @contextmanager
    def _new_call(
        self, guidance_scale: float | list[float], num_timesteps: int
    ) -> Iterator[CallState]:
        """The state of a call while it runs; at the end of a nested call, which a callback made,
        the outer call's state is current again."""
        thread = threading.get_ident()
        outer = self._call_states.get(thread)
        state = CallState(guidance_scale, num_timesteps, is_running=True)
        self._call_states[thread] = state
        try:
            yield state
        finally:
            state.is_running = False
            if outer is not None and outer.is_running:
                self._call_states[thread] = outer

    @property
    def _call_state(self) -> CallState:
        """Of the call that this thread runs, or ran last."""
        return self._call_states.setdefault(threading.get_ident(), CallState())

    @property
    def guidance_scale(self) -> float | list[float]:
        """Of this thread's current or last call."""
        return self._call_state.guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended this thread's current or last call."""
        return self._call_state.interrupt

    @property
    def num_timesteps(self) -> int:
        """Of this thread's current or last call."""
        return self._call_state.num_timesteps

    # Callbacks assign these two names, as in diffusers' own pipelines.

    @property
    def _guidance_scale(self) -> float | list[float]:
        return self._call_state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float | list[float]):
        self._call_state.guidance_scale = scale

    @property
    def _interrupt(self) -> bool:
        return self._call_state.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool):
        self._call_state.interrupt = interrupt

    # ---- inference: image -> codes -> nats ------------------------------------------------------

    def encode(
        self,
        images: Images,
        batch_size: int = 256,
        generator: Generators = None,
    ) -> list[Tensor]:
        """[z_1 … z_N] of the images, int64 (B, H_i, W_i) each: the encoders, finest first.

        With a generator (or one for each image) the codes of stochastic encoders are sampled,
        else they are the most probable ones.
        """
        codes = self.stack.encode_images(images, batch_size, generator)
        self.maybe_free_model_hooks()
        return codes

    def log_prob(
        self,
        images: Images,
        class_labels: ClassLabels = None,
        batch_size: int = 256,
        generator: Generators = None,
        prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Nats (B,) of every factor of P(s, z(s)), z(s) the most probable codes.

        Args:
            class_labels: for the class-conditional factors; `None` is the null class for all.
            prompt, prompt_embeds, prompt_attention_mask: as in `__call__`, one for each image.
            generator: z is sampled from the encoders instead, and `"encoders"` is their entropy
                H(P_Ψ(z | s)) in nats: the sum of all entries is then a bound on log P(s), in
                expectation, whether the encoders are stochastic or not.
        """
        stack = self.stack
        stack.require_prior()
        images = as_images(images)
        class_labels = self._with_texts(
            class_labels,
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
        )
        conditioning = stack.as_conditioning(class_labels, len(images))
        generator = as_generators(generator, len(images))
        batches: list[dict[str, Tensor]] = []
        stop = 0
        for pixel_values in pixel_value_batches(images, stack.image_shape, batch_size):
            rows = slice(stop, stop + len(pixel_values))
            stop = rows.stop
            terms = stack.log_prob(pixel_values, conditioning[rows], part_of(generator, rows))
            batches.append({name: nats.float().cpu() for name, nats in terms.items()})
        self.maybe_free_model_hooks()
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def bits_per_dim(
        self,
        images: Images,
        class_labels: ClassLabels = None,
        batch_size: int = 256,
        generator: Generators = None,
        **texts: Any,
    ) -> dict[str, float]:
        """−log2 of every term of `log_prob` / (C·H·W), averaged over the images, and `"total"`.

        Args:
            texts: `prompt` and others, as in `log_prob`.
        """
        nats = self.log_prob(images, class_labels, batch_size, generator, **texts)
        scale = -1 / (math.log(2) * math.prod(self.image_shape))
        bits = {name: value.double().mean().item() * scale for name, value in nats.items()}
        return {**bits, "total": sum(bits.values())}

    # ---- generation: codes -> image -------------------------------------------------------------

    @torch.no_grad()
    @renamed_argument("corruption", "code_noise")
    def __call__(
        self,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | list[float] | None = None,
        temperature: float | list[float] | None = None,
        top_k: int | list | None = None,
        top_p: float | list | None = None,
        code_noise: float | list[float] = 0.0,
        generator: Generators = None,
        codes: list[Tensor] | None = None,
        num_levels: int | None = None,
        preview: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("codes",),
        batch_size: int = 256,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ):
        """Sample images from coarse to fine.

        Args:
            class_labels: ints or names of `id2label`, one for each prompt; `None`: one prompt of
                the null class.
            num_images_per_prompt: images for each label (or for each of the initial grids).
            guidance_scale: classifier-free guidance of the factors that are conditioned on a class
                or a text; 1 for none.
            temperature, top_k, top_p: as in `ProgressiveVAELevel.sample`. By default temperature,
                top_p and, with class labels or a prompt, guidance_scale are those of
                `config.sampling`; a temperature that is passed replaces all of them: 1 is the exact
                distribution.
            code_noise: the noise level that levels refitted with `code_noise` are conditioned on
                for sampled codes, at most the level's own; 0 for those in `codes`.
                These five are one for all factors, or a list for [prior, level_1 … level_N].
            generator: one for all, or one for each image, so that an image does not depend on its
                batch; CPU generators work on any device.
            codes: grids [z_1 … z_k] to start from, int64 (B, H_i, W_i) each: only what is finer
                is sampled.
            num_levels: k < N for a preview: z_1 … z_k are sampled, finer factors take their most
                probable values.
            preview: return the auxiliary decoder's expected image of z_N, in place of sampled
                pixels.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1], `"pt"` (B, C, H, W) in [0, 1], or
                `"latent"`, the finest codes.
            callback_on_step_end: called after each factor of codes as `(pipe, step, step,
                tensors)`, where `tensors["codes"]` is [z_1 …] so far; it may return others, and
                set `pipe._guidance_scale` for the factors that follow. `pipe._interrupt = True`
                ends the call: it returns the batches that are complete. If there are none, it
                returns the codes [z_1 … z_k] so far, and their preview as images. Without the
                auxiliary decoders finer factors take their most probable values.
            batch_size: images sampled at a time.
            prompt: a text or several, of the factors that are conditioned on embeddings; "" is the
                null condition. As many as class_labels, if both are passed.
            prompt_embeds, prompt_attention_mask: its embeddings in place of it, as `encode_prompt`
                returns them.
            negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask: a text that
                guidance leads away from, one for all or one for each prompt; default: the null
                condition.

        Returns:
            `ProgressiveVAEPipelineOutput`, or the tuple `(images, codes)`.
        """
        class_labels = self._with_texts(
            class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        stack = self.stack
        temperature, top_p, guidance_scale = with_sampling_defaults(
            self.config["sampling"], class_labels, temperature, top_p, guidance_scale
        )
        conditioning, initial = prompt_inputs(
            stack, class_labels, guidance_scale, codes, num_images_per_prompt
        )
        sampling_kwargs = per_factor_sampling_kwargs(
            stack,
            len(initial),
            num_levels,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            code_noise=code_noise,
        )
        check_outputs(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        count = len(conditioning)
        generator = as_generators(generator, count)
        batch_size = as_integer("batch_size", batch_size, 1)
        starts = range(0, count, batch_size)
        with_pixels = output_type != "latent" and not preview
        num_grids = stack.num_levels + with_pixels
        # If a callback ends the call, codes of some levels are enough for its images.
        is_preview_enough = output_type == "latent" or stack.has_previews
        total = len(starts) * (num_grids - len(initial))
        batches: list[list[Tensor]] = []
        # Ancestral sampling, batch by batch: z_1, z_2 … z_N, s.
        with (
            self._new_call(guidance_scale, total) as call,
            self.progress_bar(total=total) as progress,
        ):
            for start in starts:
                rows = slice(start, min(start + batch_size, count))
                call.guidance_scale = guidance_scale  # a callback may have changed it
                grids = [z[rows].to(stack.device) for z in initial]
                condition = conditioning[rows].to(stack.device)
                noise = part_of(generator, rows)
                for factor in range(len(initial), num_grids):
                    kwargs = _step_kwargs(stack, factor, call, sampling_kwargs[factor])
                    if factor and factor == len(initial):
                        kwargs["code_noise"] = 0.0  # the caller's codes are free of noise
                    coarser = grids[-1] if grids else None
                    grids.append(stack.sample(factor, coarser, condition, noise, **kwargs))
                    is_watched = factor < stack.num_levels and not call.interrupt
                    if callback_on_step_end is not None and is_watched:
                        tensors = {name: grids for name in callback_on_step_end_tensor_inputs}
                        result = callback_on_step_end(self, factor, factor, tensors)
                        grids = callback_codes(result, grids, stack)
                    progress.update()
                    if call.interrupt and (batches or is_preview_enough):
                        break
                    if call.interrupt:
                        sampling_kwargs = [{**row, "temperature": 0.0} for row in sampling_kwargs]
                if len(grids) == num_grids or not batches:
                    batches.append([grid.cpu() for grid in grids])
                if call.interrupt:
                    break
        columns = [torch.cat(column) for column in zip(*batches, strict=True)]
        sampled_codes = columns[: stack.num_levels]
        if len(columns) > stack.num_levels:
            images = from_pixel_values(columns[-1], output_type)
        elif output_type == "latent":
            images = sampled_codes[-1]
        else:
            level = len(sampled_codes)
            pixel_values = stack.preview(sampled_codes[-1], level, batch_size)
            images = from_pixel_values(pixel_values, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, sampled_codes
        return ProgressiveVAEPipelineOutput(images=images, codes=sampled_codes)

    def decode(
        self,
        codes: list[Tensor],
        output_type: str = "pil",
        generator: Generators = None,
        **sampling_kwargs,
    ):
        """Images of the codes [z_1 … z_k]; finer grids that are missing are sampled too.

        From all N grids only the image is sampled, given z_N. Further keywords as in `__call__`.
        """
        return self(
            codes=codes, output_type=output_type, generator=generator, **sampling_kwargs
        ).images

    def reconstruct(
        self,
        images: Images,
        level: int | None = None,
        output_type: str = "pil",
        generator: Generators = None,
        **sampling_kwargs,
    ):
        """Reconstructions of images from their own z_1 … z_k, k = `level` (N if not given).

        k = 1 is a reconstruction from the coarsest codes only. Further keywords as in `__call__`.
        """
        level = self._check_level(level)
        codes = self.encode(images, sampling_kwargs.get("batch_size", 256))[:level]
        return self.decode(codes, output_type, generator, **sampling_kwargs)

    @torch.no_grad()
    def preview(
        self,
        codes_or_images: "list[Tensor] | Images",
        level: int | None = None,
        output_type: str = "pil",
        batch_size: int = 256,
    ):
        """The auxiliary decoders' expected image of z_k: one pass a level, nothing is sampled.

        Args:
            codes_or_images: codes [z_1 … z_k], or images, which are encoded.
            level: k; the finest level that there are codes of if not given.
            output_type: as in `__call__`.

        Raises:
            ValueError: a level from k on without an auxiliary decoder, codes or images that are
                none, or a `level` of which there are no codes.
        """
        stack = self.stack
        batch_size = as_integer("batch_size", batch_size, 1)
        codes = (
            as_grids(codes_or_images)
            if is_codes(codes_or_images)
            else stack.encode_images(codes_or_images, batch_size)
        )
        stack.check_codes(codes)
        level = len(codes) if level is None else as_integer("level", level, 1, len(codes))
        pixel_values = stack.preview(codes[level - 1], level, batch_size)
        self.maybe_free_model_hooks()
        return from_pixel_values(pixel_values, output_type)

    # ---- editing ---------------------------------------------------------------------------------

    @renamed_argument("corruption", "code_noise")
    def inpaint(
        self,
        image: Images,
        mask_image: Images,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        num_particles: int | list[int] = 16,
        guidance_scale: float | list[float] | None = None,
        temperature: float | list[float] | None = None,
        top_k: int | list | None = None,
        top_p: float | list | None = None,
        code_noise: float | list[float] = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = 256,
        num_candidates: int | list[int] | None = None,
        **texts: Any,
    ):
        """Sample the region under a mask, from coarse to fine, given the rest of the image.

        Pixels outside the mask are returned unchanged. A code is fixed if all pixels of its patch
        are outside: it is that of the image with a smooth filling under the mask, as encoders look
        beyond patches. If a share 1/2 < q < 1 of a patch is outside, that code is a guess, which a
        particle takes with probability 2q − 1, at a cost in weight. All else is sampled.

        Args:
            image: one for each prompt.
            mask_image: one for all images or one for each: PIL, (B, H, W), (B, 1, H, W), or arrays
                (B, H, W, 1), of uint8, floats in [0, 1] or bool. White (1) is sampled, black (0) is
                observed, gray is what it is nearer to.
            class_labels: one for each image, or none.
            num_particles: of each factor, for one image: one number, or a list for [prior,
                level_1 … level_N]. Particles are resampled by their weights, under which observed
                values are likely: the more, the better parts fit, and the longer it takes
                (codes cost least). 1 takes the first sample. The limit is the posterior given the
                observed pixels and codes, at temperature 1 without guidance (with them, roughly).
            batch_size: particles sampled at a time.
            num_images_per_prompt, guidance_scale, temperature, top_k, top_p, code_noise, generator,
                output_type: as in `__call__`.
            num_candidates: deprecated name of `num_particles`.
            texts: `prompt` and others, as in `__call__`, one for each image.

        Returns:
            `ProgressiveVAEPipelineOutput`, or the tuple `(images, codes)`.

        Raises:
            ValueError: images, masks, labels or sampling arguments that do not fit, or a pipeline
                without a prior where codes of z_1 are to be sampled.
        """
        if num_candidates is not None:
            warnings.warn(
                "num_candidates is deprecated, use num_particles", DeprecationWarning, stacklevel=2
            )
            num_particles = num_candidates
        check_outputs(output_type, (), [])
        class_labels = self._with_texts(class_labels, **texts)
        temperature, top_p, guidance_scale = with_sampling_defaults(
            self.config["sampling"], class_labels, temperature, top_p, guidance_scale
        )
        grids = inpaint(
            self.stack,
            image,
            mask_image,
            class_labels,
            num_images_per_prompt,
            num_particles,
            guidance_scale,
            temperature,
            top_k,
            top_p,
            code_noise,
            generator,
            batch_size,
            with_pixels=output_type != "latent",
            progress_bar=self.progress_bar,
        )
        self.maybe_free_model_hooks()
        codes = grids[: self.num_levels]
        is_latent = output_type == "latent"
        images = codes[-1] if is_latent else from_pixel_values(grids[-1], output_type)
        if not return_dict:
            return images, codes
        return ProgressiveVAEPipelineOutput(images=images, codes=codes)

    def variations(
        self, image: Images, level: int = 1, num_images_per_prompt: int = 1, **sampling_kwargs
    ):
        """Images that share their coarser codes z_1 … z_k, k = `level`, with the input images; the
        rest is sampled.

        Further keywords as in `__call__`, whose output it returns; `class_labels` and `prompt` are
        one for each image.
        """
        level = self._check_level(level)
        codes = self.encode(image, sampling_kwargs.get("batch_size", 256))[:level]
        return self(codes=codes, num_images_per_prompt=num_images_per_prompt, **sampling_kwargs)

    def interpolate(
        self,
        image: Images,
        other: Images,
        level: int | None = None,
        steps: int = 5,
        class_labels: ClassLabels = None,
        generator: Generators = None,
        **sampling_kwargs,
    ):
        """Images on the way from one image to another, in the codes z_k, k = `level` (N if not
        given): at weight w each is the code nearest to (1 − w)·(code vector of the one) +
        w·(code vector of the other), and what is finer is sampled, with the same noise for all
        steps.

        Args:
            image, other: the same number of images.
            steps: the number of weights from 0 to 1, both included.
            class_labels: one for each pair, or none.
            generator: one for all, or one for each pair.

        Returns:
            what `__call__` does, whose further keywords it takes, `preview` and `prompt`, one for
            each pair, among them: all steps of the first pair, then those of the second; `codes`
            coarser than z_k are those that the encoders return for it.
        """
        texts = {name: sampling_kwargs.pop(name) for name in TEXTS & sampling_kwargs.keys()}
        class_labels = self._with_texts(class_labels, **texts)
        level = self._check_level(level)
        steps = as_integer("steps", steps, 2)
        stack = self.stack
        batch_size = sampling_kwargs.get("batch_size", 256)
        codes = interpolate(stack, image, other, level, steps, batch_size)
        count = len(codes[0]) // steps
        noise = shared_noise(as_generators(generator, count), count, steps)
        if class_labels is not None:
            class_labels = stack.as_conditioning(class_labels, count).repeat(steps)
        return self(class_labels, codes=codes, generator=noise, **sampling_kwargs)

    # ---- compression -----------------------------------------------------------------------------

    def compress(
        self,
        images: Images,
        class_labels: ClassLabels = None,
        arithmetic: str = "float",
        prompt: None = None,
    ) -> list[bytes]:
        """One stream of bytes for each image. Its length is `log_prob` in bits, rounded up to
        words of 32 bits, plus a header of eight bytes (with a class, nine or more).

        A stream does not depend on the other images of the call. Floating-point results differ in
        the last bits between machines: a float stream of another machine may be unreadable, which
        raises an error. Streams in integer arithmetic are portable, take several times as long, and
        are hardly larger.

        Args:
            images: of the pipeline's size.
            class_labels: of the class-conditional factors, one for each image; they are in the
                streams. `None` is the null class.
            arithmetic: "float", or "integer" for fixed-point arithmetic.
            prompt: only `None`: streams contain no text, and are conditioned on none.

        Raises:
            ValueError: a pipeline without a prior; images, labels or arithmetic that are invalid; a
                prompt; or a backbone with an operation that fixed-point arithmetic does not have.
            ImportError: the extra `codec` is not installed.
        """
        if prompt is not None:
            raise ValueError(f"{codec.NO_TEXTS}, got {prompt!r}")
        streams = codec.compress(self.stack, images, class_labels, arithmetic)
        self.maybe_free_model_hooks()
        return streams

    def decompress(
        self,
        data: bytes | list[bytes],
        num_levels: int | None = None,
        allow_truncated: bool = False,
    ) -> Tensor:
        """The images that were compressed, bit for bit, uint8 (B, C, H, W).

        Args:
            data: a stream, or a list of them.
            num_levels: k: read only z_1 … z_k, and return the auxiliary decoders' expected images,
                or if there are none the most probable values. Prefixes of streams suffice then; no
                checksum tells whether the result is right.
            allow_truncated: streams may end within the pixels. The pixels behind the end are the
                expected ones: each group of the ordering given all groups before it.

        Raises:
            ValueError: streams that end too early, were made by another model, are damaged, or
                cannot be read with the arithmetic of this machine; `num_levels` out of range.
            ImportError: the extra `codec` is not installed.
        """
        images = codec.decompress(self.stack, data, num_levels, allow_truncated)
        self.maybe_free_model_hooks()
        return images

    def stream_id(self, arithmetic: str = "float") -> str:
        """The identity of all streams that this pipeline makes on this machine, in hexadecimal: of
        its weights and of the arithmetic.

        Args:
            arithmetic: as in `compress`.
        """
        return codec.stream_id(self.stack, arithmetic)

    def _check_level(self, level: int | None) -> int:
        """1 … N; N if not given."""
        return self.num_levels if level is None else as_integer("level", level, 1, self.num_levels)


def _step_kwargs(stack: LevelStack, factor: int, call: CallState, sampling_kwargs: dict) -> dict:
    """The sampling arguments of one factor, with the call's current guidance scale."""
    scales = per_factor(stack.factor_names, guidance_scale=call.guidance_scale)
    kwargs = {**sampling_kwargs, **scales[factor]}
    if factor:
        kwargs["code_noise"] = min(kwargs["code_noise"], stack.configs[factor - 1].code_noise)
    return kwargs
