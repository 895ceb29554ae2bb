"""Pictures drawn anew in part: inpainting, variations, what lies between two.

A walk that returns what is known where it is known, and draws elsewhere, draws every value given
all that comes before it in the walk and all coarser codes. What comes after it, and what finer
grids know, has its say by weights: of some candidates those go on under which what is known is
likely (sequential importance resampling, Gordon et al. 1993). The more candidates, the nearer are
the draws to the posterior.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import as_integer, renamed_argument
from .codec.codec import CodingPipeline
from .image_processor import Images, as_images, from_pixel_values, pixel_value_batches
from .models.class_labels import Labels, label_ids
from .models.distributions import Distribution
from .models.orderings import WalkStep
from .models.sampling import Generators, Sampler, as_generators, per_factor, uniform
from .models.value_types import signed_to_indices, uint8_to_signed, uint8_to_unit
from .pipeline_inputs import ProgressiveVAEPipelineOutput, check_outputs, per_factor_sampling_kwargs


@dataclass(frozen=True)
class Observation:
    """What is known of a grid.

    Args:
        values: int64 (B, C, H, W).
        trust: in each of them, float (B, 1, H, W): 1 where they are known, 0 where they say
            nothing, and between where they are a guess.
    """

    values: Tensor
    trust: Tensor

    def at(self, rows: Tensor) -> "Observation":
        return Observation(self.values[rows], self.trust[rows])

    def repeated(self, times: int) -> "Observation":
        return Observation(*(x.repeat_interleave(times, 0) for x in (self.values, self.trust)))

    def to(self, device: torch.device) -> "Observation":
        return Observation(self.values.to(device), self.trust.to(device))


class ClampedStep:
    """A `StepFn` that returns what is known, takes a guess as often as it is trusted, and draws the
    rest.

    Args:
        draw: for as many examples as are known.
        guesses: some values may be guesses, and noise says which are taken.

    `log_weights` (B,) are the nats of what is known, each value given what came before it, and the
    odds, in nats, of the model against this choice, where guesses were taken or not.
    """

    def __init__(self, draw: Sampler, known: Observation, guesses: bool):
        self.draw, self.known, self.guesses = draw, known, guesses
        self.log_weights = known.trust.new_zeros(len(known.trust))

    def __call__(self, distribution: Distribution, place: WalkStep) -> Tensor:
        drawn = self.draw.choose(distribution, place)
        found = self.known.values[:, place.color].flatten(1).index_select(1, place.positions)
        trust = self.known.trust.flatten(1).index_select(1, place.positions)
        is_taken = trust == 1
        if self.guesses:
            is_taken = uniform(trust.shape, self.draw.generator, trust.device) < trust
        count, times = len(trust), len(drawn) // len(trust)  # twice, where it is guided
        values = torch.where(is_taken.repeat(times, 1), found.repeat(times, 1), drawn)
        nats = distribution.log_prob(values)[:count]
        is_found = (values[:count] == found) & (trust > 0)
        odds = nats - (trust + (1 - trust) * nats.exp()).log()
        self.log_weights += torch.where(is_found, odds, -(-trust).log1p()).sum(1)
        return values


def masks(mask_image: Images, size: tuple[int, int], count: int) -> Tensor:
    """Where images are to be drawn, bool (count, 1, H, W): where a mask is nearer to white.

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
        found = torch.cat(list(pixel_value_batches(mask_image, (1, *size), batch_size=256)))
    except ValueError as error:
        raise ValueError(f"mask_image: {error}") from error
    if len(found) not in (1, count):
        raise ValueError(f"expected one mask_image or {count}, got {len(found)}")
    return (found > 0).expand(count, -1, -1, -1)


def filled(pixel_values: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, C, H, W), those under the mask going on smoothly from those around it: means of
    ever larger surroundings, until there is something in them, or gray."""
    height, width = mask.shape[-2:]
    known = pixel_values.masked_fill(mask, 0)
    if max(height, width) == 1 or not mask.any():
        return known
    pairs = (F.pad(x, (0, width % 2, 0, height % 2)) for x in (known, (~mask).to(known)))
    total, share = (F.avg_pool2d(x, 2) for x in pairs)
    coarse = filled(total / share.clamp(min=0.25), share == 0)
    smooth = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., :height, :width]
    return torch.where(mask, smooth, pixel_values)


class EditingPipeline(CodingPipeline):
    """A pipeline that draws pictures anew in part."""

    @torch.no_grad()
    @renamed_argument("corruption", "code_noise")
    def inpaint(
        self,
        image: Images,
        mask_image: Images,
        class_labels: Labels = None,
        num_images_per_prompt: int = 1,
        num_candidates: int | list[int] = 16,
        guidance_scale: float | list[float] = 1.0,
        temperature: float | list[float] = 1.0,
        top_k: int | list | None = None,
        top_p: float | list | None = None,
        code_noise: float | list[float] = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = 256,
    ):
        """Draw what is under a mask, from coarse to fine, given what is not.

        Pixels beside the mask stay as they are, to the bit. A code is kept if all pixels of its
        patch are known: it is that of the image with smooth colors under the mask, for encoders
        look beyond patches. Where a share 1/2 < q < 1 of a patch is known, that code is a guess,
        which a candidate takes with probability 2q − 1, and pays for. All else is drawn.

        Args:
            image: one for each prompt.
            mask_image: one for all images or one for each: PIL, (B, H, W), (B, 1, H, W), or arrays
                (B, H, W, 1), of uint8, floats in [0, 1] or bool. White (1) is drawn, black (0) is
                known, gray is what it is nearer to.
            class_labels: one for each image, or none.
            num_candidates: draws of a factor for one image: one number, or a list for [prior,
                level_1 … level_N]. Of them those go on, drawn by their weights, under which what is
                known is likely: the more, the better parts fit, and the longer it takes
                (codes cost least). 1 takes the first as it comes. The limit is the posterior given
                the pixels and codes that are known, at temperature 1 without guidance (with them,
                roughly).
            batch_size: candidates drawn at a time.
            num_images_per_prompt, guidance_scale, temperature, top_k, top_p, code_noise, generator,
                output_type: as in `__call__`.

        Returns:
            `ProgressiveVAEPipelineOutput`, or the tuple `(images, codes)`: what was drawn or kept.

        Raises:
            ValueError: images, masks, labels or controls that are none or do not fit, or a
                pipeline without a prior where codes of z_1 are to be drawn.
        """
        num_images_per_prompt = as_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = as_integer("batch_size", batch_size, 1)
        counts = per_factor(self.factor_names, num_candidates=num_candidates)
        times = [as_integer("num_candidates", row["num_candidates"], 1) for row in counts]
        rows = per_factor_sampling_kwargs(
            self.factor_names, [level.config for level in self.levels], 0, None,
            temperature=temperature, top_k=top_k, top_p=top_p, code_noise=code_noise,
        )  # fmt: skip
        scales = per_factor(self.factor_names, guidance_scale=guidance_scale)
        controls = [row | scale for row, scale in zip(rows, scales, strict=True)]
        check_outputs(output_type, (), [])
        generator = as_generators(generator)
        known = self._known(image, mask_image, batch_size)
        labels = self._guided_labels(class_labels, guidance_scale, len(known[0].trust))
        labels = labels.repeat_interleave(num_images_per_prompt)
        known = [grid.repeated(num_images_per_prompt) for grid in known]
        generator = as_generators(generator, len(labels))
        stop = self.num_levels + (output_type != "latent")  # grids to end with
        done = [grid.values.clone() for grid in known]
        parts = list(_batches_with_same_start(known, times, batch_size))
        total = sum(max(0, stop - start) for start, _, _ in parts)
        with self._call(guidance_scale, total), self.progress_bar(total=total) as progress:
            for start, several, chosen in parts:
                noise = generator
                if isinstance(generator, list):
                    noise = [generator[i] for i in chosen.tolist()]
                given = [grid.at(chosen).to(self._execution_device) for grid in known]
                drawn = [grid.values for grid in given[:start]]
                ended = [*several[:stop], 1]  # one of the last candidates remains
                for factor in range(start, stop):
                    count = ended[factor]
                    if factor == start:
                        drawn = [grid.repeat_interleave(count, 0) for grid in drawn]
                    told = dict(controls[factor])
                    if factor:
                        told["code_noise"] *= factor != start  # what is given is right
                    # Where nothing is known, there is nothing to guess.
                    guesses = factor < self.num_levels and bool(given[-1].trust.any())
                    shown, each = labels[chosen].repeat_interleave(count), repeated(noise, count)
                    weights = self._fill(
                        drawn, given[factor].repeated(count), shown, each, told, guesses
                    )
                    going = ended[factor + 1]
                    if (count, going) != (1, 1):
                        survivors = systematic_resample(weights.view(-1, count), going, noise)
                        drawn = [grid[survivors] for grid in drawn]
                    progress.update()
                for grid, values in zip(done, drawn, strict=False):
                    grid[chosen] = values.cpu()
        self.maybe_free_model_hooks()
        codes = [grid[:, 0] for grid in done[:-1]]
        images = codes[-1] if output_type == "latent" else from_pixel_values(
            uint8_to_signed(done[-1]), output_type
        )  # fmt: skip
        if not return_dict:
            return images, codes
        return ProgressiveVAEPipelineOutput(images=images, codes=codes)

    def _known(self, image: Images, mask_image: Images, batch_size: int) -> list[Observation]:
        """Of z_1 … z_N and the image."""
        pixel_values = torch.cat(
            list(pixel_value_batches(image, self.image_shape, batch_size))
        ).float()
        mask = masks(mask_image, self.image_shape[1:], len(pixel_values))
        values = signed_to_indices(filled(pixel_values, mask))
        known = (~mask).double()
        every = torch.ones_like(known)
        found = [Observation(values, known.float())]
        codes = self.encode(uint8_to_unit(values), batch_size)
        for level, z in zip(reversed(self.levels), reversed(codes), strict=True):
            side = level.config.downsample
            pad = (0, -known.shape[-1] % side, 0, -known.shape[-2] % side)
            known, every = (F.avg_pool2d(F.pad(x, pad), side) for x in (known, every))
            trust = (2 * known / every - 1).clamp(min=0)
            found.insert(0, Observation(z[:, None], trust.float()))
        return found

    def _fill(
        self,
        drawn: list[Tensor],
        known: Observation,
        labels: Tensor,
        generator: Generators,
        told: dict,
        guesses: bool,
    ) -> Tensor:
        """Appends the next grid, int64 (B, C, H, W), to `drawn`, and returns its log weights."""
        factor, device = len(drawn), self._execution_device
        part = self.levels[factor - 1] if factor else self._require_prior()
        code_noise = min(told.pop("code_noise", 0.0), getattr(part.config, "code_noise", 0.0))
        null = torch.full_like(labels, part.config.num_classes)
        if not part.config.num_classes or torch.equal(labels, null):
            told["guidance_scale"] = 1.0  # there is nothing to be guided by
        clamp = ClampedStep(Sampler(len(labels), generator, **told), known.to(device), guesses)
        before = [grid[:, 0] for grid in drawn]
        if clamp.draw.is_guided:
            labels, before = torch.cat([labels, null]), [torch.cat([z, z]) for z in before]
        grid = self._walk(factor, before, labels, clamp, code_noise)[: len(null)]
        drawn.append(signed_to_indices(grid) if grid.ndim == 4 else grid[:, None])
        return clamp.log_weights

    def variations(self, image: Images, level: int = 1, num_images_per_prompt: int = 1, **controls):
        """Images that have their coarser codes z_1 … z_k, k = `level`, in common with the given
        ones; the rest is drawn.

        Further keywords as in `__call__`, whose output it returns; `class_labels` are one for each
        image.
        """
        codes = self.encode(image, **_batch(controls))[: self._checked(level)]
        return self(codes=codes, num_images_per_prompt=num_images_per_prompt, **controls)

    @torch.no_grad()
    def interpolate(
        self,
        image: Images,
        other: Images,
        level: int | None = None,
        steps: int = 5,
        class_labels: Labels = None,
        generator: Generators = None,
        **controls,
    ):
        """Images on the way from one picture to another, in the codes z_k, k = `level` (N where not
        given): at weight w each is the code nearest to (1 − w)·(the one's code vector) +
        w·(the other's), and what is finer is drawn, with the same noise all the way.

        Args:
            image, other: as many as each other.
            steps: weights from 0 to 1, where all codes are the one's and the other's.
            class_labels: one for each pair, or none.
            generator: one for all, or one for each pair.

        Returns:
            what `__call__` does, whose further keywords it takes, `preview` among them: all steps
            of the first pair, then those of the second; `codes` coarser than z_k are those that
            the encoders find in it.
        """
        level, steps = self._checked(level), as_integer("steps", steps, 2)
        ends = [self.encode(x, **_batch(controls))[:level] for x in (image, other)]
        count = len(ends[0][0])
        if len(ends[1][0]) != count:
            raise ValueError(f"expected other to be {count} images, got {len(ends[1][0])}")
        generator = as_generators(generator, count)
        quantizer = self.levels[level - 1].quantizer
        codebook = quantizer.codebook.float().cpu()
        source, target = (codebook[z[-1]] for z in ends)  # (B, H, W, D)
        on_the_way = []
        weights = torch.linspace(0, 1, steps, dtype=torch.float32, device=codebook.device)
        for weight in weights[1:-1]:
            vectors = torch.lerp(source, target, weight).flatten(0, -2)
            on_the_way.append(torch.cdist(vectors, codebook).argmin(1).view(ends[0][-1].shape))
        codes = [torch.stack([ends[0][-1], *on_the_way, ends[1][-1]], 1).flatten(0, 1)]
        for coarser in reversed(self.levels[: level - 1]):
            parts = codes[0].split(as_integer("batch_size", controls.get("batch_size", 256), 1))
            found = [coarser.encode(z.to(self._execution_device)).cpu() for z in parts]
            codes.insert(0, torch.cat(found))
        noise = generator if isinstance(generator, list) else [generator] * count
        devices = ["cpu" if g is None else g.device for g in noise]
        seeds = [
            int(torch.randint(2**62, (), generator=g, device=device))
            for g, device in zip(noise, devices, strict=True)
        ]
        alike = [torch.Generator().manual_seed(seed) for seed in seeds for _ in range(steps)]
        labels = None
        if class_labels is not None:
            ids = label_ids(class_labels, self._class_config, count)
            labels = ids.repeat_interleave(steps)
        return self(labels, codes=codes, generator=alike, **controls)

    def _checked(self, level: int | None) -> int:
        """1 … N; N where not given."""
        return self.num_levels if level is None else as_integer("level", level, 1, self.num_levels)


def _batches_with_same_start(
    known: list[Observation], times: list[int], batch_size: int
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Examples that are drawn together, so that none takes other noise beside others than alone:
    how many grids of theirs are known whole, the numbers of candidates, and which they are, (n,).
    """
    is_whole = torch.stack([(grid.trust == 1).flatten(1).all(1) for grid in known], 1)
    start = is_whole.long().cumprod(1).sum(1)
    is_blank = ~known[-1].trust.flatten(1).any(1)  # so that all candidates are as good
    kinds = start.masked_fill(is_blank, -1)
    for kind in kinds.unique().tolist():
        several = [1] * len(times) if kind < 0 else times
        for part in (kinds == kind).nonzero()[:, 0].split(max(1, batch_size // max(several))):
            yield max(0, kind), several, part


def repeated(generator: Generators, times: int) -> Generators:
    """That of each example for each of its candidates."""
    return (
        [g for g in generator for _ in range(times)] if isinstance(generator, list) else generator
    )


def systematic_resample(log_weights: Tensor, number: int, generator: Generators) -> Tensor:
    """So many of each row of candidates (B, n), drawn by their weights, as indices into all B·n of
    them: systematic resampling, with one share for each row.

    Args:
        generator: one, or one for each row.
    """
    rows, count = log_weights.shape
    shares = uniform(torch.Size((rows, 1)), generator, log_weights.device)
    shares = (torch.arange(number, device=shares.device) + shares) / number
    cumulative = log_weights.double().softmax(1).cumsum(1)
    chosen = torch.searchsorted(cumulative, shares.double(), right=True).clamp(max=count - 1)
    return (chosen + count * torch.arange(rows, device=chosen.device)[:, None]).flatten()


def _batch(controls: dict) -> dict:
    return {name: controls[name] for name in ("batch_size",) if name in controls}
