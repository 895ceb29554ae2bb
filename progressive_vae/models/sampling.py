"""Draws from distributions over values, with one generator for a batch or one per example."""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..arguments import as_integer, as_number
from .distributions import Categorical, Distribution
from .orderings import WalkStep

Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"

MIN_TEMPERATURE = 1e-6  # less is 0: logits divided by it would leave the range of fp32


def as_generators(generator: Any, count: int | None = None) -> Generators:
    """One generator of torch, or a list with one for each of `count` examples, or `None`.

    Raises:
        ValueError: another kind of generator, as a seed or one of numpy, or a list of another
            length.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    is_list = isinstance(generator, (list, tuple))
    if not is_list or not all(isinstance(g, torch.Generator) for g in generator):
        raise ValueError(
            f"expected generator to be a torch.Generator or a list of them, got {generator!r}; a "
            "seed becomes one by torch.Generator().manual_seed(seed)"
        )
    if count is not None and len(generator) != count:
        raise ValueError(f"expected generator to be one or a list of {count}, got {len(generator)}")
    return list(generator)


def part_of(generator: Generators, rows: slice) -> Generators:
    """The generators of some examples, where each has its own."""
    return generator[rows] if isinstance(generator, list) else generator


def uniform(shape: torch.Size, generator: Generators, device: torch.device) -> Tensor:
    """Noise in [0, 1) of a shape (B, ...), float32, drawn where the generators live and moved to
    `device`; with a list, row b is drawn with generator b alone."""
    generator = as_generators(generator)
    # The numbers of a seed depend on the dtype, so it must not be torch's default one.
    kind = torch.float32
    if isinstance(generator, list):
        rows = [torch.rand(shape[1:], generator=g, dtype=kind, device=g.device) for g in generator]
        # One copy for all: a device waits for each.
        return torch.stack([row.to(rows[0].device) for row in rows]).to(device)
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=kind, device=source).to(device)


class Sampler:
    """Draws int64 (B, ...) from logits (B, ..., V) by inversion: one uniform number for each.

    With a list of generators example b sees the noise of generator b alone, so that an image does
    not depend on the batch it is drawn in. Generators may live on another device than the logits.

    With a guidance scale s other than 1 the logits come as (2B, ...), those given the class and
    then those given the null class; the draws are from `null + s·(class − null)` (classifier-free
    guidance, Ho & Salimans 2022), and come twice, as (2B, ...), for both halves to go on with.

    Temperatures below `MIN_TEMPERATURE` are 0.

    Raises:
        ValueError: a batch size below 1, a negative or non-finite temperature, top_k < 1, top_p
            outside (0, 1], a negative guidance scale, or a list of generators whose length is not
            the batch size.
    """

    def __init__(
        self,
        batch_size: int,
        generator: Generators = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
    ):
        self.batch_size = as_integer("batch_size", batch_size, 1)
        self.generator = as_generators(generator, self.batch_size)
        temperature = as_number("temperature", temperature, ">= 0", lambda x: x >= 0)
        self.greedy = temperature < MIN_TEMPERATURE
        self.guidance_scale = as_number("guidance_scale", guidance_scale, ">= 0", lambda x: x >= 0)
        self.warpers = LogitsProcessorList()
        if not self.greedy and temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k is not None:
            self.warpers.append(TopKLogitsWarper(as_integer("top_k", top_k, 1)))
        if top_p is not None:
            top_p = as_number("top_p", top_p, "in (0, 1]", lambda x: 0 < x <= 1)
            if top_p < 1:
                self.warpers.append(TopPLogitsWarper(top_p))

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1

    def __call__(self, logits: Tensor) -> Tensor:
        rows = len(logits) // 2 if self.is_guided else len(logits)
        shape = torch.Size((rows, *logits.shape[1:-1]))
        return self._draw(logits, self._shares(shape, logits.device))

    def choose(self, distribution: Distribution, place: WalkStep) -> Tensor:
        """The same at one step of a walk; all its values are looked at only where they change, of
        many values at a few positions at a time."""
        positions = place.positions
        shape = torch.Size((self.batch_size, len(positions)))
        shares = self._shares(shape, positions.device)
        if not (shares is None or self.is_guided or self.warpers):
            return distribution.icdf(shares)
        drawn, stop = [], 0
        for part in distribution.parts():
            logits = part.logits
            start, stop = stop, stop + logits.shape[1]
            drawn.append(self._draw(logits, None if shares is None else shares[:, start:stop]))
        return torch.cat(drawn, 1)

    def _shares(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Uniform ones, where there is anything to draw."""
        return None if self.greedy else uniform(shape, self.generator, device)

    def _draw(self, logits: Tensor, shares: Tensor | None) -> Tensor:
        logits = logits.float()
        if self.is_guided:
            given, null = logits.chunk(2)
            values = self._of_logits(null + self.guidance_scale * (given - null), shares)
            return torch.cat([values, values])
        return self._of_logits(logits, shares)

    def _of_logits(self, logits: Tensor, shares: Tensor | None) -> Tensor:
        if shares is None:
            return logits.argmax(-1)
        if self.warpers:
            logits = self.warpers(None, logits.flatten(0, -2)).view(logits.shape)
        return Categorical(logits).icdf(shares)


def per_factor(factor_names: list[str], **controls) -> list[dict]:
    """The sampling controls of each factor: every value is one for all of them, or a list (a tuple,
    array or tensor with one dimension)."""
    columns = []
    for name, value in controls.items():
        if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
            value = value.tolist()
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(factor_names)
        if len(values) != len(factor_names):
            raise ValueError(f"expected {name} to be one or a list for {factor_names}, got {value}")
        columns.append(values)
    return [dict(zip(controls, row, strict=True)) for row in zip(*columns, strict=True)]
