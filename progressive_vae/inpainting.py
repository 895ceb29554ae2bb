"""Inpainting and interpolation: functions of a `LevelStack`.

Inpainting samples from the posterior given observed pixels and codes. A walk returns observed
values where there are any and samples the others, each given all earlier values of the walk and all
coarser codes. Later values and finer grids enter by importance weights: of several particles those
are resampled under which the observations are likely (sequential importance resampling, Gordon et
al. 1993). More particles approximate the posterior better.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .arguments import as_integer
from .image_processor import Images, as_images, pixel_value_batches
from .models.conditioning import ClassLabels, Conditioning
from .models.distributions import Distribution
from .models.sampling import Generators, Sampler, as_generators, per_factor, uniform
from .models.value_types import signed_to_indices, uint8_to_signed, uint8_to_unit
from .models.walk import WalkStep
from .pipeline_inputs import guided_conditioning, per_factor_sampling_kwargs
from .stack import LevelStack

NO_PROGRESS_BAR = partial(tqdm, disable=True)


@dataclass(frozen=True)
class Observation:
    """Observed values of one grid.

    Args:
        values: int64 (B, C, H, W).
        confidence: float (B, 1, H, W): 1 where values are observed, 0 where they are not, and
            between where they are a guess.
    """

    values: Tensor
    confidence: Tensor

    def select(self, rows: Tensor) -> "Observation":
        return Observation(self.values[rows], self.confidence[rows])

    def repeat_interleave(self, repeats: int) -> "Observation":
        return Observation(
            self.values.repeat_interleave(repeats, 0), self.confidence.repeat_interleave(repeats, 0)
        )

    def to(self, device: torch.device) -> "Observation":
        return Observation(self.values.to(device), self.confidence.to(device))


class ClampedStep:
    """A `StepFn` that returns observed values, takes a guess with its confidence as probability,
    and samples the rest.

    Args:
        sampler: for as many examples as are observed.
        has_guesses: some values may be guesses; noise decides which are taken.

    `log_weights` (B,) are importance weights in nats: of an observed value its log-probability
    given earlier ones, of a guess the log-odds of the model against the proposal.
    """

    def __init__(self, sampler: Sampler, observation: Observation, has_guesses: bool):
        self.sampler = sampler
        self.observation = observation
        self.has_guesses = has_guesses
        self.log_weights = observation.confidence.new_zeros(len(observation.confidence))

    def __call__(self, distribution: Distribution, step: WalkStep) -> Tensor:
        samples = self.sampler.step(distribution, step)
        observed = self.observation.values[:, step.channel].flatten(1)
        observed = observed.index_select(1, step.positions)
        confidence = self.observation.confidence.flatten(1).index_select(1, step.positions)
        is_taken = confidence == 1
        if self.has_guesses:
            noise = uniform(confidence.shape, self.sampler.generator, confidence.device)
            is_taken = noise < confidence
        # With classifier-free guidance the batch has a conditional and an unconditional half.
        count = len(confidence)
        halves = len(samples) // count
        values = torch.where(is_taken.repeat(halves, 1), observed.repeat(halves, 1), samples)
        nats = distribution.log_prob(values)[:count]
        # The proposal has mass c + (1 − c)·p at a guess of confidence c, and (1 − c)·p elsewhere.
        is_observed = (values[:count] == observed) & (confidence > 0)
        odds = nats - (confidence + (1 - confidence) * nats.exp()).log()
        self.log_weights += torch.where(is_observed, odds, -(-confidence).log1p()).sum(1)
        return values


def preprocess_mask(mask_image: Images, size: tuple[int, int], count: int) -> Tensor:
    """Where images are to be sampled, bool (count, 1, H, W): where a mask is nearer to white
    than to black.

    Raises:
        ValueError: no mask, one of another size, or in a range that its dtype does not have, or
            not one for all images or for each.
    """
    try:
        mask_image = as_images(mask_image)
    except ValueError as error:
        raise ValueError(f"mask_image: {error}") from error
    if not isinstance(mask_image, (np.ndarray, Tensor)):
        mask_image = list(mask_image)
    # Bring every accepted type to (B, 1, H, W), or to a list of gray PIL images.
    if isinstance(mask_image, list) and all(isinstance(x, PIL.Image.Image) for x in mask_image):
        mask_image = [x.convert("L") for x in mask_image]
    elif isinstance(mask_image, list) and all(hasattr(x, "shape") for x in mask_image):
        if len({tuple(x.shape) for x in mask_image}) == 1:
            mask_image = torch.stack([torch.as_tensor(x) for x in mask_image])
    if isinstance(mask_image, np.ndarray):
        mask_image = torch.from_numpy(np.ascontiguousarray(mask_image))
        mask_image = mask_image.movedim(-1, 1) if mask_image.ndim == 4 else mask_image
    if isinstance(mask_image, Tensor):
        mask_image = mask_image[None] if mask_image.ndim == 2 else mask_image
        mask_image = mask_image[:, None] if mask_image.ndim == 3 else mask_image
        if mask_image.dtype == torch.bool:
            mask_image = mask_image.to(torch.uint8) * 255
        elif mask_image.dtype == torch.uint8 and mask_image.numel() and mask_image.max() == 1:
            raise ValueError("expected a mask_image of uint8 in 0 … 255, got one in 0 … 1")
    try:
        masks = torch.cat(list(pixel_value_batches(mask_image, (1, *size), batch_size=256)))
    except ValueError as error:
        raise ValueError(f"mask_image: {error}") from error
    if len(masks) not in (1, count):
        raise ValueError(f"expected one mask_image or {count}, got {len(masks)}")
    return (masks > 0).expand(count, -1, -1, -1)


def fill_masked_region(pixel_values: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, C, H, W) whose masked region continues its surroundings smoothly.

    A pyramid of means over unmasked pixels, interpolated back; gray where there are none.
    """
    height, width = mask.shape[-2:]
    unmasked = pixel_values.masked_fill(mask, 0)
    if max(height, width) == 1 or not mask.any():
        return unmasked
    pad = (0, width % 2, 0, height % 2)
    total = F.avg_pool2d(F.pad(unmasked, pad), 2)
    share = F.avg_pool2d(F.pad((~mask).to(unmasked), pad), 2)
    coarse = fill_masked_region(total / share.clamp(min=0.25), share == 0)
    smooth = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., :height, :width]
    return torch.where(mask, smooth, pixel_values)


def observe(
    stack: LevelStack, image: Images, mask_image: Images, batch_size: int
) -> list[Observation]:
    """What a masked image determines of z_1 … z_N and of itself.

    A code is observed if all pixels of its patch are: it is that of the image with a smooth
    filling, as encoders look beyond patches. Of a patch observed to a share q > ½ the code is a
    guess of confidence 2q − 1.
    """
    batches = list(pixel_value_batches(image, stack.image_shape, batch_size))
    pixel_values = torch.cat(batches).float()
    mask = preprocess_mask(mask_image, stack.image_shape[1:], len(pixel_values))
    values = signed_to_indices(fill_masked_region(pixel_values, mask))
    observed = (~mask).double()
    inside = torch.ones_like(observed)  # without the padding of incomplete patches
    observations = [Observation(values, observed.float())]
    codes = stack.encode_images(uint8_to_unit(values), batch_size)
    for config, z in zip(reversed(stack.configs), reversed(codes), strict=True):
        patch = config.finer_size((1, 1))  # the image, if codes are not of patches
        pad = (0, -observed.shape[-1] % patch[1], 0, -observed.shape[-2] % patch[0])
        observed, inside = (
            F.avg_pool2d(F.pad(share, pad), patch).expand(-1, -1, *z.shape[-2:])
            for share in (observed, inside)
        )
        confidence = (2 * observed / inside - 1).clamp(min=0)
        observations.insert(0, Observation(z[:, None], confidence.float()))
    return observations


@torch.no_grad()
def inpaint(
    stack: LevelStack,
    image: Images,
    mask_image: Images,
    class_labels: ClassLabels = None,
    num_images_per_prompt: int = 1,
    num_particles: int | list[int] = 16,
    guidance_scale: float | list[float] = 1.0,
    temperature: float | list[float] = 1.0,
    top_k: int | list | None = None,
    top_p: float | list | None = None,
    code_noise: float | list[float] = 0.0,
    generator: Generators = None,
    batch_size: int = 256,
    with_pixels: bool = True,
    progress_bar: Callable[..., Any] = NO_PROGRESS_BAR,
) -> list[Tensor]:
    """[z_1 … z_N], int64 (B, H_i, W_i) each, and, `with_pixels`, s, float (B, C, H, W) in [−1, 1],
    sampled given the pixels outside the mask; all on the CPU.

    Args:
        progress_bar: called with the `total` number of steps; a context with `update()`.

    The other arguments, and the errors, are those of `ProgressiveVAEPipeline.inpaint`.
    """
    num_images_per_prompt = as_integer("num_images_per_prompt", num_images_per_prompt, 1)
    batch_size = as_integer("batch_size", batch_size, 1)
    rows = per_factor(stack.factor_names, num_particles=num_particles)
    particle_counts = [as_integer("num_particles", row["num_particles"], 1) for row in rows]
    kwargs = per_factor_sampling_kwargs(
        stack, 0, None, temperature=temperature, top_k=top_k, top_p=top_p, code_noise=code_noise
    )
    scales = per_factor(stack.factor_names, guidance_scale=guidance_scale)
    kwargs = [row | scale for row, scale in zip(kwargs, scales, strict=True)]
    generator = as_generators(generator)
    observations = observe(stack, image, mask_image, batch_size)
    num_images = len(observations[0].values)
    conditioning = guided_conditioning(stack, class_labels, guidance_scale, num_images)
    conditioning = conditioning.repeat(num_images_per_prompt)
    observations = [x.repeat_interleave(num_images_per_prompt) for x in observations]
    generator = as_generators(generator, len(conditioning))

    num_grids = stack.num_levels + with_pixels
    results = [x.values.clone() for x in observations]
    batches = list(_batches_with_same_start(observations, particle_counts, batch_size))
    total = sum(max(0, num_grids - start) for start, _, _ in batches)
    with progress_bar(total=total) as progress:
        for start, counts, rows_of_batch in batches:
            noise = generator
            if isinstance(generator, list):
                noise = [generator[i] for i in rows_of_batch.tolist()]
            grids = _sample_particles(
                stack,
                [x.select(rows_of_batch).to(stack.device) for x in observations],
                start,
                [*counts[:num_grids], 1],  # one of the last particles remains
                conditioning[rows_of_batch].to(stack.device),
                noise,
                kwargs,
                progress.update,
            )
            for result, values in zip(results, grids, strict=False):
                result[rows_of_batch] = values.cpu()
    codes = [result[:, 0] for result in results[:-1]]
    return [*codes, uint8_to_signed(results[-1])] if with_pixels else codes


def _sample_particles(
    stack: LevelStack,
    observations: list[Observation],
    start: int,
    counts: list[int],
    conditioning: Conditioning,
    generator: Generators,
    kwargs: list[dict],
    on_step: Callable[[], Any],
) -> list[Tensor]:
    """Sequential importance resampling over the grids from `start` on.

    Args:
        start: the number of grids that are observed completely.
        counts: particles of every grid, and at last those that remain.

    Returns:
        [z_1 … z_N (, s)], int64 (B · counts[-1], C, H, W) each.
    """
    grids = [x.values for x in observations[:start]]
    # Without any observed pixel there are no guesses.
    has_observed_pixels = bool(observations[-1].confidence.any())
    for factor in range(start, len(counts) - 1):
        count = counts[factor]
        survivors_count = counts[factor + 1]
        options = dict(kwargs[factor])
        if factor == start:
            grids = [grid.repeat_interleave(count, 0) for grid in grids]
            if factor:
                options["code_noise"] = 0.0  # observed codes are free of noise
        grid, log_weights = _sample_clamped(
            stack,
            factor,
            grids[-1][:, 0] if grids else None,
            observations[factor].repeat_interleave(count),
            conditioning.repeat(count),
            _repeat_generators(generator, count),
            options,
            has_guesses=factor < stack.num_levels and has_observed_pixels,
        )
        grids.append(grid)
        if (count, survivors_count) != (1, 1):
            log_weights = log_weights.view(-1, count)
            survivors = systematic_resample(log_weights, survivors_count, generator)
            grids = [grid[survivors] for grid in grids]
        on_step()
    return grids


def _sample_clamped(
    stack: LevelStack,
    factor: int,
    coarser: Tensor | None,
    observation: Observation,
    conditioning: Conditioning,
    generator: Generators,
    options: dict,
    has_guesses: bool,
) -> tuple[Tensor, Tensor]:
    """One grid of each particle, int64 (B, C, H, W), and log importance weights (B,)."""
    config = stack.factor(factor).config
    code_noise = min(options.pop("code_noise", 0.0), getattr(config, "code_noise", 0.0))
    count = len(conditioning)
    sampler = Sampler(count, generator, **options)
    conditioning = conditioning.for_factor(config).for_guidance(sampler)
    if sampler.is_guided and coarser is not None:
        coarser = torch.cat([coarser, coarser])
    if factor < stack.num_levels:
        values = stack.to_indices(factor, observation.values[:, 0])
        observation = Observation(values, observation.confidence)
    step_fn = ClampedStep(sampler, observation, has_guesses)
    grid = stack.walk(factor, coarser, step_fn, conditioning, code_noise)[:count]
    values = signed_to_indices(grid) if grid.ndim == 4 else grid[:, None]
    return values, step_fn.log_weights


def _batches_with_same_start(
    observations: list[Observation], counts: list[int], batch_size: int
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Batches of examples that start at the same grid, so that the noise of an example does not
    depend on its batch.

    Yields the number of completely observed grids, the numbers of particles, and rows, (n,).
    """
    is_complete = torch.stack([(x.confidence == 1).flatten(1).all(1) for x in observations], 1)
    start = is_complete.long().cumprod(1).sum(1)
    is_blank = ~observations[-1].confidence.flatten(1).any(1)
    kinds = start.masked_fill(is_blank, -1)
    for kind in kinds.unique().tolist():
        # Without observations all particles weigh the same: one is enough.
        particle_counts = [1] * len(counts) if kind < 0 else counts
        rows = (kinds == kind).nonzero()[:, 0]
        for part in rows.split(max(1, batch_size // max(particle_counts))):
            yield max(0, kind), particle_counts, part


def _repeat_generators(generator: Generators, repeats: int) -> Generators:
    """The generator of each example for each of its particles."""
    if isinstance(generator, list):
        return [g for g in generator for _ in range(repeats)]
    return generator


def systematic_resample(log_weights: Tensor, number: int, generator: Generators) -> Tensor:
    """`number` of each row of particles (B, n), sampled by their weights, as indices into all B·n
    of them: systematic resampling, with one uniform number for each row.

    Args:
        generator: one, or one for each row.
    """
    rows, count = log_weights.shape
    shares = uniform(torch.Size((rows, 1)), generator, log_weights.device)
    shares = (torch.arange(number, device=shares.device) + shares) / number
    cumulative = log_weights.double().softmax(1).cumsum(1)
    chosen = torch.searchsorted(cumulative, shares.double(), right=True).clamp(max=count - 1)
    return (chosen + count * torch.arange(rows, device=chosen.device)[:, None]).flatten()


@torch.no_grad()
def interpolate(
    stack: LevelStack,
    image: Images,
    other: Images,
    level: int,
    steps: int = 5,
    batch_size: int = 256,
) -> list[Tensor]:
    """Codes [z_1 … z_k], k = `level`, on the way from one image to another.

    At weight w, z_k is the code nearest to (1 − w)·(code vector of `image`) + w·(code vector of
    `other`); coarser codes are the encoders' codes of it.

    Returns:
        int64 (B · steps, H_i, W_i) each: all steps of the first pair, then of the second.

    Raises:
        ValueError: not as many images on either side, or fewer than two steps.
    """
    batch_size = as_integer("batch_size", batch_size, 1)
    source_codes = stack.encode_images(image, batch_size)[level - 1]
    target_codes = stack.encode_images(other, batch_size)[level - 1]
    count = len(source_codes)
    if len(target_codes) != count:
        raise ValueError(f"expected other to be {count} images, got {len(target_codes)}")
    codebook = stack.levels[level - 1].quantizer.codebook.float().cpu()
    source = codebook[source_codes]  # (B, H, W, D)
    target = codebook[target_codes]
    weights = torch.linspace(0, 1, steps, dtype=torch.float32, device=codebook.device)
    between = []
    for weight in weights[1:-1]:
        vectors = torch.lerp(source, target, weight).flatten(0, -2)
        between.append(torch.cdist(vectors, codebook).argmin(1).view(source_codes.shape))
    codes = [torch.stack([source_codes, *between, target_codes], 1).flatten(0, 1)]
    for coarser in reversed(stack.levels[: level - 1]):
        parts = codes[0].split(batch_size)
        codes.insert(0, torch.cat([coarser.encode(z.to(stack.device)).cpu() for z in parts]))
    return codes


def shared_noise(generator: Generators, count: int, steps: int) -> list[torch.Generator]:
    """Generators for `steps` images of each of `count` pairs: the same noise for all steps."""
    sources = generator if isinstance(generator, list) else [generator] * count
    seeds = []
    for source in sources:
        device = "cpu" if source is None else source.device
        seeds.append(int(torch.randint(2**62, (), generator=source, device=device)))
    return [torch.Generator().manual_seed(seed) for seed in seeds for _ in range(steps)]
