"""What one call of a pipeline is told: a pipeline may draw on many threads at once."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .arguments import as_integer, as_number
from .configuration.level import ProgressiveVAELevelConfig
from .configuration.prior import ProgressiveVAEPriorConfig
from .configuration.validation import check_grids
from .hub.repository import HubPipeline
from .models.class_labels import label_ids
from .models.prior import ProgressiveVAEPrior
from .models.sampling import Sampler, per_factor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ProgressiveVAEPipelineOutput(BaseOutput):
    """
    Args:
        images: as `output_type` says; for `"latent"` the finest codes z_N.
        codes: [z_1 … z_N], int64 (B, H_i, W_i) each.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    codes: list[Tensor]


@dataclass
class Call:
    """
    Args:
        guidance_scale: of the factors that follow, one or a list for all; a callback may change it.
        num_timesteps: the factors that the call draws, times its batches.
        interrupt: a callback set it to end the call early.
    """

    guidance_scale: float | list[float] = 1.0
    num_timesteps: int = 0
    interrupt: bool = False
    is_running: bool = False


class _Calls(threading.local):
    """The call that each pipeline is in, or was in last, on this thread."""

    def __init__(self):
        self.of: WeakKeyDictionary[CallingPipeline, Call] = WeakKeyDictionary()


_CALLS = _Calls()


def per_factor_sampling_kwargs(
    factor_names: list[str],
    configs: list[ProgressiveVAELevelConfig],
    num_given: int,
    num_levels: int | None,
    **controls,
) -> list[dict]:
    """The sampling controls of [prior, level_1 … level_N], each one for all of them or a list.

    Args:
        configs: of [level_1 … level_N].
        num_given: the number of grids that the call starts from.
        num_levels: the number of grids that are drawn as the controls say; finer factors take
            their most probable values.

    Raises:
        ValueError: a list for other factors, `code_noise` without a level that has it, or a
            `num_levels` that is none, or is less than what is given.
    """
    rows, code_noise = per_factor(factor_names, **controls), controls["code_noise"]
    for row in rows:  # before anything is sampled
        value = row["code_noise"]
        row["code_noise"] = as_number("code_noise", value, ">= 0", lambda x: x >= 0)
        Sampler(1, **{name: value for name, value in row.items() if name != "code_noise"})
    rows[0].pop("code_noise")  # nothing comes before the prior
    if np.any(code_noise) and not any(config.code_noise for config in configs):
        raise ValueError(
            f"expected code_noise=0, as all levels have config.code_noise=0, got {code_noise}"
        )
    if num_levels is not None:
        num_levels = as_integer("num_levels", num_levels, 1, len(configs))
        if num_given > num_levels:
            raise ValueError(
                f"expected codes of at most num_levels={num_levels} levels, got {num_given}"
            )
        for row in rows[num_levels:]:
            row["temperature"] = 0.0
    return rows


def check_outputs(output_type: str, callback_inputs: Iterable[str], known: list[str]):
    """Raise a `ValueError` for images of an unknown kind, or a callback that asks for tensors other
    than the known ones."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"expected output_type in {OUTPUT_TYPES}, got {output_type!r}")
    if isinstance(callback_inputs, str):
        raise ValueError(
            f"expected callback_on_step_end_tensor_inputs to be a list among {known}, got "
            f"{callback_inputs!r}"
        )
    if unknown := sorted(set(callback_inputs) - set(known)):
        raise ValueError(
            f"expected callback_on_step_end_tensor_inputs among {known}, got {unknown}"
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


def changed_codes(
    changed: Any,
    grids: list[Tensor],
    configs: list[ProgressiveVAELevelConfig],
    sizes: list[tuple[int, int]],
) -> list[Tensor]:
    """The grids [z_1 … z_k], int64 (B, H_i, W_i) each, that a callback returned, or `grids`, those
    so far, where it returned none.

    Raises:
        ValueError: no dict with as many grids of as many images, or codes out of their range.
    """
    if not changed:
        return grids
    if not isinstance(changed, dict) or set(changed) != {"codes"}:
        raise ValueError(
            "expected callback_on_step_end to return a dict with some of ['codes'], or None, got "
            f"{changed!r}"
        )
    found, count = changed["codes"], len(grids[0])
    is_list = isinstance(found, (list, tuple)) and all(isinstance(z, Tensor) for z in found)
    if not is_list or [len(z) for z in found] != [count] * len(grids):
        shown = [tuple(z.shape) for z in found] if is_list else found
        raise ValueError(
            f"expected callback_on_step_end to return codes [z_1 … z_{len(grids)}] of {count} "
            f"images, got {shown}"
        )
    check_grids(list(found), configs, sizes)
    return list(found)


class CallingPipeline(HubPipeline):
    """A pipeline whose calls keep their state to themselves, and what they are told, with the names
    that diffusers has."""

    @contextmanager
    def _call(self, guidance_scale: float | list[float], num_timesteps: int) -> Iterator[Call]:
        """The state of a call, while it lasts; one that a callback makes gives way to the outer."""
        outer = _CALLS.of.get(self)
        call = _CALLS.of[self] = Call(guidance_scale, num_timesteps, is_running=True)
        try:
            yield call
        finally:
            call.is_running = False
            if outer is not None and outer.is_running:
                _CALLS.of[self] = outer

    @property
    def guidance_scale(self) -> float | list[float]:
        """Of the call that this thread is in, or was in last."""
        return _CALLS.of.get(self, Call()).guidance_scale

    @property
    def _guidance_scale(self) -> float | list[float]:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float | list[float]):
        _CALLS.of.setdefault(self, Call()).guidance_scale = scale

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the call that this thread is in, or was in last."""
        return _CALLS.of.get(self, Call()).interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool):
        _CALLS.of.setdefault(self, Call()).interrupt = interrupt

    @property
    def num_timesteps(self) -> int:
        """Of the call that this thread is in, or was in last."""
        return _CALLS.of.get(self, Call()).num_timesteps

    @property
    def labels(self) -> dict[str, int]:
        """Class names -> class ids."""
        config = self._class_config
        names = config.id2label if config.num_classes else {}
        return {name: i for i, name in names.items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of names, as in diffusers' DiT pipeline."""
        return label_ids(label, self._class_config).tolist()

    @property
    def _class_config(self) -> ProgressiveVAEPriorConfig | ProgressiveVAELevelConfig:
        """The config that knows the classes; any one if no part is class-conditional."""
        configs = [p.config for p in (self.prior, *self.levels) if p is not None]
        return next((config for config in configs if config.num_classes), configs[0])

    def _prompts(self, class_labels, guidance_scale, codes, num_images_per_prompt):
        """Labels (count,), the given grids (count, H_i, W_i), and the count."""
        times = as_integer("num_images_per_prompt", num_images_per_prompt, 1)
        given = [] if codes is None else as_grids(codes)
        if codes is not None:
            check_grids(given, [level.config for level in self.levels], self.grid_sizes)
        drawn = self.levels[len(given) - 1 :] if given else [self._require_prior(), *self.levels]
        if class_labels is not None and not any(part.config.num_classes for part in drawn):
            raise ValueError(
                f"expected class_labels=None, as no drawn factor knows classes, got {class_labels}"
            )
        count = len(given[0]) if given else None
        labels = self._guided_labels(class_labels, guidance_scale, count)
        labels = labels.repeat_interleave(times)
        given = [z.repeat_interleave(times, 0) for z in given]
        return labels, given, len(labels)

    def _guided_labels(self, class_labels, guidance_scale, count: int | None) -> Tensor:
        """Ids (count,), if there are labels to be guided by."""
        if class_labels is None and np.any(np.asarray(guidance_scale) != 1):
            raise ValueError(
                f"expected guidance_scale=1 without class_labels, got {guidance_scale}"
            )
        return label_ids(class_labels, self._class_config, count)

    def _require_prior(self) -> ProgressiveVAEPrior:
        if self.prior is None:
            raise ValueError("expected a pipeline with a prior, got prior=None")
        return self.prior
