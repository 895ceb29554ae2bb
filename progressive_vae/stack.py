"""`LevelStack`: the prior and the levels as one model P(s, z), without a diffusers pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .configuration.base import PartConfig
from .configuration.level import ProgressiveVAELevelConfig
from .configuration.validation import check_grids, check_parts, grid_sizes
from .image_processor import Images, as_images, pixel_value_batches
from .models.conditioning import ClassLabels, Conditioning
from .models.level import ProgressiveVAELevel
from .models.preview_decoder import PreviewDecoder
from .models.prior import ProgressiveVAEPrior
from .models.sampling import Generators, as_generators, part_of
from .models.walk import StepFn


class LevelStack:
    """`P(s, z) = P_Φ(z_1) · ∏ P_Θ(z_i | z_{i−1}) · P_Θ(s | z_N)`.

    Factors are numbered in the order of sampling. Factor 0 is the prior, which predicts z_1; factor
    i is level_i, which predicts z_{i+1}, or the image s where i = N.

    Args:
        prior: `P_Φ(z_1)`; `None` for a stack that only encodes and decodes.
        levels: [level_1 … level_N], the coarsest first.
        image_size: (H, W); derived from the prior's grid if `None`.
        device: where inputs are moved to; the device of level_1's weights if `None`.

    Raises:
        ValueError: parts that do not fit together.
    """

    def __init__(
        self,
        prior: ProgressiveVAEPrior | None,
        levels: Sequence[ProgressiveVAELevel],
        image_size: Sequence[int] | None = None,
        device: torch.device | None = None,
    ):
        self.prior = prior
        self.levels = list(levels)
        self.configs: list[ProgressiveVAELevelConfig] = [level.config for level in self.levels]
        size = None if image_size is None else list(image_size)
        prior_config = None if prior is None else prior.config
        height, width = check_parts(prior_config, [*self.configs], size)
        self.image_size = (height, width)
        self.device = next(self.levels[0].parameters()).device if device is None else device

    # ---- shapes and names ------------------------------------------------------------------------

    @property
    def num_levels(self) -> int:
        """N."""
        return len(self.levels)

    @property
    def factor_names(self) -> list[str]:
        """The factors of P(s, z) in the order of sampling: prior, level_1 … level_N."""
        return ["prior", *(f"level_{i}" for i in range(1, self.num_levels + 1))]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.configs[-1].value_channels, *self.image_size

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """[(H_1, W_1) … (H_N, W_N), (H, W)]: each level's codes, then the image."""
        return grid_sizes(self.configs, self.image_size)

    @property
    def has_previews(self) -> bool:
        """Whether all levels have auxiliary decoders."""
        return all(level.auxiliary is not None for level in self.levels)

    def require_prior(self) -> ProgressiveVAEPrior:
        """The prior, or a `ValueError` if there is none."""
        if self.prior is None:
            raise ValueError("expected a pipeline with a prior, got prior=None")
        return self.prior

    def factor(self, index: int) -> Any:
        """The prior for 0, level_i for i."""
        return self.levels[index - 1] if index else self.require_prior()

    def check_codes(self, codes: list[Tensor]):
        """Raise a `ValueError` unless `codes` are grids [z_1 … z_k] of one batch."""
        check_grids(codes, self.configs, self.grid_sizes)

    # ---- conditions ------------------------------------------------------------------------------

    @property
    def class_config(self) -> PartConfig:
        """The config of the first class-conditional factor; of the first factor if none is."""
        prior_configs: list[PartConfig] = [] if self.prior is None else [self.prior.config]
        configs = [*prior_configs, *self.configs]
        return next((config for config in configs if config.num_classes), configs[0])

    @property
    def condition_dim(self) -> int | None:
        """The length of the embeddings that factors are conditioned on; `None`: of none."""
        configs = [*([] if self.prior is None else [self.prior.config]), *self.configs]
        dims = (config.condition_dim for config in configs)
        return next((dim for dim in dims if dim is not None), None)

    def as_conditioning(
        self, class_labels: ClassLabels, batch_size: int | None = None
    ) -> Conditioning:
        """What all factors are conditioned on, checked, on the CPU; see
        `Conditioning.from_labels`. Of a `Conditioning` factors take what they use."""
        if not isinstance(class_labels, Conditioning):
            return Conditioning.from_labels(class_labels, self.class_config, batch_size)
        if batch_size not in (None, len(class_labels)):
            raise ValueError(f"expected {batch_size} class_labels, got {len(class_labels)}")
        return class_labels.to("cpu")

    # ---- image -> codes -> nats ------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, generator: Generators = None) -> list[Tensor]:
        """[z_1 … z_N], int64 (B, H_i, W_i) each: z_i = argmax P_Ψ(z_i | z_{i+1}), finest first.

        Args:
            pixel_values: float (B, C, H, W) in [−1, 1].
            generator: one, or one for each image: samples the codes of stochastic encoders.
        """
        codes: list[Tensor] = []
        finer = pixel_values.to(self.device)
        for level in reversed(self.levels):
            finer = level.encode(finer, generator)
            codes.insert(0, finer)
        return codes

    def encode_images(
        self, images: Images, batch_size: int = 256, generator: Generators = None
    ) -> list[Tensor]:
        """As `encode`, of images in any of the types that `pixel_value_batches` accepts, batch by
        batch; the codes are on the CPU."""
        images = as_images(images)
        generator = as_generators(generator, len(images))
        batches: list[list[Tensor]] = []
        stop = 0
        for pixel_values in pixel_value_batches(images, self.image_shape, batch_size):
            start = stop
            stop = start + len(pixel_values)
            codes = self.encode(pixel_values, part_of(generator, slice(start, stop)))
            batches.append([z.cpu() for z in codes])
        return [torch.cat(level) for level in zip(*batches, strict=True)]

    @torch.no_grad()
    def log_prob(
        self, pixel_values: Tensor, class_labels: ClassLabels = None, generator: Generators = None
    ) -> dict[str, Tensor]:
        """Nats (B,) of every factor of P(s, z(s)), z(s) the codes of `encode`.

        Args:
            pixel_values: float (B, C, H, W) in [−1, 1].
            class_labels: of the class-conditional factors; the null class if `None`.
            generator: as in `encode`; then `"encoders"` is the entropy H(P_Ψ(z | s)) in nats.
        """
        prior = self.require_prior()
        conditioning = self.as_conditioning(class_labels, len(pixel_values)).to(self.device)
        codes = self.encode(pixel_values, generator)
        finer_grids = [*codes[1:], pixel_values.to(self.device)]
        terms = {"prior": prior.log_prob(codes[0], conditioning)}
        for i, (level, z, finer) in enumerate(zip(self.levels, codes, finer_grids, strict=True), 1):
            terms[f"level_{i}"] = level.log_prob(finer, z, conditioning)
        if generator is not None:
            pairs = zip(self.levels, finer_grids, strict=True)
            terms["encoders"] = sum(level.encoder_entropy(finer) for level, finer in pairs)
        return terms

    # ---- codes -> image --------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        factor: int,
        coarser: Tensor | None,
        conditioning: Conditioning,
        generator: Generators = None,
        **sampling_kwargs: Any,
    ) -> Tensor:
        """Sample one factor: codes, int64 (B, H_i, W_i), or pixels, float (B, C, H, W) in [−1, 1].

        Args:
            coarser: the grid that the factor is conditioned on; ignored by the prior.
            sampling_kwargs: as in `ProgressiveVAELevel.sample`.
        """
        part = self.factor(factor)
        sampling_kwargs |= {"class_labels": conditioning, "generator": generator}
        if factor == 0:
            return part.sample(len(conditioning), **sampling_kwargs)
        return part.sample(coarser, finer_size=self.grid_sizes[factor], **sampling_kwargs)

    def walk(
        self,
        factor: int,
        coarser: Tensor | None,
        step_fn: StepFn,
        conditioning: Conditioning,
        code_noise: float = 0.0,
    ) -> Tensor:
        """Run one factor's autoregressive loop with `step_fn`, as `ProgressiveVAELevel.walk`.

        The arguments, and what it returns, are those of `sample`; `code_noise` is the noise level
        on codes that a level is conditioned on.
        """
        part = self.factor(factor)
        if factor == 0:
            return part.walk(len(conditioning), step_fn, conditioning)
        return part.walk(coarser, step_fn, conditioning, code_noise, self.grid_sizes[factor])

    def to_indices(self, factor: int, grid: Tensor) -> Tensor:
        """What the steps of a factor's `walk` predict, int64 (B, C, H, W) in 0 … V − 1: the colors
        of pixels, codes, or the blocks of their bits.

        Args:
            grid: as `walk` returns it.
        """
        return self.levels[factor - 1].value_type.to_indices(grid) if factor else grid[:, None]

    @torch.no_grad()
    def preview(self, codes: Tensor, level: int, batch_size: int = 256) -> Tensor:
        """The auxiliary decoders' expected image of z_k, float (B, C, H, W) in [−1, 1], on the CPU.

        Args:
            codes: z_k, int64 (B, H_k, W_k).
            level: k.
        """
        decoder = PreviewDecoder(self.levels[level - 1 :], self.grid_sizes[level:])
        parts = codes.split(batch_size)
        return torch.cat([decoder.decode_codes(part.to(self.device)).cpu() for part in parts])
