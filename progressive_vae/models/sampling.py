"""Sampling from predictive distributions, with one generator for a batch or one per example."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from ..arguments import as_integer, as_number
from .distributions import Categorical, DiscretizedLogisticMixture, Distribution
from .walk import WalkStep

Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"

MIN_TEMPERATURE = 1e-6  # lower ones are 0: logits divided by them would overflow fp32


def as_generators(generator: Any, count: int | None = None) -> Generators:
    """Check a generator argument: `None`, one generator, or one for each of `count` examples.

    Raises:
        ValueError: another type, such as a seed or a numpy generator, or a list of another length.
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
    """The generators of a slice of the batch, if each example has its own."""
    return generator[rows] if isinstance(generator, list) else generator


def uniform(shape: torch.Size, generator: Generators, device: torch.device) -> Tensor:
    """Uniform noise in [0, 1) of a shape (B, ...), float32 on `device`.

    It is sampled on the generators' own devices; with a list, row b depends on generator b only.
    """
    generator = as_generators(generator)
    # The stream of a seed depends on the dtype, so it must not be torch's default dtype.
    dtype = torch.float32
    if isinstance(generator, list):
        rows = [torch.rand(shape[1:], generator=g, dtype=dtype, device=g.device) for g in generator]
        # One copy for all rows: each copy to a device synchronizes.
        return torch.stack([row.to(rows[0].device) for row in rows]).to(device)
    if generator is None:
        return torch.rand(shape, dtype=dtype, device=device)
    noise = torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)
    return noise.to(device)


class Sampler:
    """Samples int64 (B, ...) from logits (B, ..., V) by inversion, with one uniform number each.

    With a list of generators, example b depends on generator b only, whatever the batch. Generators
    may be on another device than the logits.

    With a guidance scale s other than 1 the batch has 2B rows: logits conditioned on the class,
    then logits of the null class. Samples come from `null + s·(class − null)` (classifier-free
    guidance, Ho & Salimans 2022) and are returned twice, (2B, ...), as inputs of both halves.

    The temperature divides logits. Of a mixture of logistics it changes weights and scales instead,
    without guidance: see `DiscretizedLogisticMixture.with_temperature`. Temperatures below
    `MIN_TEMPERATURE` take the most probable value, or of a mixture the mean of its most probable
    component.

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
        self.temperature = as_number("temperature", temperature, ">= 0", lambda x: x >= 0)
        self.is_greedy = self.temperature < MIN_TEMPERATURE
        self.guidance_scale = as_number("guidance_scale", guidance_scale, ">= 0", lambda x: x >= 0)
        self.step_noise: list[Tensor] = []  # of the next steps, (B, n)
        self.warpers = LogitsProcessorList()
        if top_k is not None:
            self.warpers.append(TopKLogitsWarper(as_integer("top_k", top_k, 1)))
        if top_p is not None:
            top_p = as_number("top_p", top_p, "in (0, 1]", lambda x: 0 < x <= 1)
            if top_p < 1:
                self.warpers.append(TopPLogitsWarper(top_p))

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1

    def preload(self, step_sizes: Sequence[int], device: torch.device):
        """Generate the noise of the next steps at once: the same numbers, in one copy to `device`.

        Args:
            step_sizes: the number of positions of each step.
        """
        if self.is_greedy:
            return
        sizes = [size for size in step_sizes if size]  # a walk does not call empty steps
        generators = self.generator if isinstance(self.generator, list) else [self.generator]
        sources = {device.type if g is None else g.device.type for g in generators}
        if sources != {"cpu"}:  # a GPU's generator returns other numbers for another shape
            shapes = [torch.Size((self.batch_size, n)) for n in sizes]
            noise = [uniform(shape, self.generator, device) for shape in shapes]
        elif isinstance(self.generator, list):
            shape = torch.Size((self.batch_size, sum(sizes)))
            noise = [*uniform(shape, self.generator, device).split(sizes, 1)]
        else:
            counts = [self.batch_size * n for n in sizes]
            parts = uniform(torch.Size((sum(counts),)), self.generator, device).split(counts)
            noise = [part.view(self.batch_size, -1) for part in parts]
        self.step_noise = noise

    def __call__(self, logits: Tensor) -> Tensor:
        num_rows = len(logits) // 2 if self.is_guided else len(logits)
        shape = torch.Size((num_rows, *logits.shape[1:-1]))
        return self._sample(logits, self._noise(shape, logits.device), self.temperature)

    def step(self, distribution: Distribution, step: WalkStep) -> Tensor:
        """A `StepFn` that samples the values of one step of a walk.

        Logits are computed only where they have to be modified, and then chunk by chunk.
        """
        positions = step.positions
        shape = torch.Size((self.batch_size, len(positions)))
        u = self._noise(shape, positions.device)
        temperature = self.temperature
        if isinstance(distribution, DiscretizedLogisticMixture) and not self.is_guided:
            if u is None:
                return distribution.most_probable()
            distribution = distribution.with_temperature(temperature)
            temperature = 1.0
        if not (u is None or self.is_guided or self.warpers or temperature != 1):
            return distribution.icdf(u)
        samples = []
        stop = 0
        for chunk in distribution.chunks():
            logits = chunk.logits
            start = stop
            stop += logits.shape[1]
            noise = None if u is None else u[:, start:stop]
            samples.append(self._sample(logits, noise, temperature))
        return torch.cat(samples, 1)

    def _noise(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Uniform numbers, or `None` for greedy decoding."""
        if not self.step_noise:
            return None if self.is_greedy else uniform(shape, self.generator, device)
        noise = self.step_noise.pop(0)
        if noise.shape != shape:
            raise ValueError(
                f"expected step_sizes of preload to be those of the steps, got "
                f"{tuple(noise.shape)} for a step of {tuple(shape)}"
            )
        return noise

    def _sample(self, logits: Tensor, u: Tensor | None, temperature: float) -> Tensor:
        logits = logits.float()
        if self.is_guided:
            conditional, null = logits.chunk(2)
            logits = null + self.guidance_scale * (conditional - null)
        values = self._invert(logits, u, temperature)
        return torch.cat([values, values]) if self.is_guided else values

    def _invert(self, logits: Tensor, u: Tensor | None, temperature: float) -> Tensor:
        if u is None:
            return logits.argmax(-1)
        if temperature != 1:
            logits = logits / temperature
        if self.warpers:
            tokens: Any = None  # the processors of a `Sampler` read no tokens
            logits = self.warpers(tokens, logits.flatten(0, -2)).view(logits.shape)
        return Categorical(logits).icdf(u)


def per_factor(factor_names: list[str], **sampling_kwargs) -> list[dict]:
    """The sampling arguments of each factor.

    Args:
        sampling_kwargs: each is one value for all factors, or a list with one per factor (or a
            tuple, or an array or tensor with one dimension).

    Raises:
        ValueError: a list of another length.
    """
    columns = []
    for name, value in sampling_kwargs.items():
        if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
            value = value.tolist()
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(factor_names)
        if len(values) != len(factor_names):
            raise ValueError(f"expected {name} to be one or a list for {factor_names}, got {value}")
        columns.append(values)
    return [dict(zip(sampling_kwargs, row, strict=True)) for row in zip(*columns, strict=True)]
