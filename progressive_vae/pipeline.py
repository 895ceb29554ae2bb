"""`ProgressiveVAEPipeline`: the levels and the prior, chained."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import as_integer, renamed_argument
from .configuration.validation import MAX_LEVELS, check_grids, check_parts, grid_sizes
from .image_processor import Images, as_images, from_pixel_values, pixel_value_batches
from .inpainting import EditingPipeline
from .models.class_labels import Labels, known_labels, label_ids
from .models.fingerprint import check_fingerprints
from .models.level import ProgressiveVAELevel
from .models.preview_decoder import PreviewDecoder
from .models.prior import ProgressiveVAEPrior
from .models.sampling import Generators, as_generators, part_of, per_factor
from .pipeline_inputs import (
    Call,
    ProgressiveVAEPipelineOutput,
    as_grids,
    changed_codes,
    check_outputs,
    per_factor_sampling_kwargs,
)


class ProgressiveVAEPipeline(EditingPipeline):
    """`P(s, z) = P_Φ(z_1) · ∏ P_Θ(z_i | z_{i−1}) · P_Θ(s | z_N)`.

    Lists over levels start with the coarsest: `codes[i - 1]` is z_i. Wherever images come in they
    may be a PIL image or a list of them, uint8 arrays (B, H, W, C) or tensors (B, C, H, W) in
    0 … 255, or float ones in [0, 1], which are rounded to 8 bits. Nothing is resized.

    Args:
        prior: `P_Φ(z_1)`; without it (`None`) everything works that needs no prior.
        level_1 … level_8: the levels, without a hole; level_1 is the coarsest.
        image_size: [H, W]; derived from the prior's grid where not given.
    """

    _optional_components = ["prior", *(f"level_{i}" for i in range(2, MAX_LEVELS + 1))]
    model_cpu_offload_seq = "->".join(["prior", *(f"level_{i}" for i in range(1, MAX_LEVELS + 1))])
    _callback_tensor_inputs = ["codes"]

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
    ):
        super().__init__()
        self.register_modules(
            prior=prior, level_1=level_1, level_2=level_2, level_3=level_3, level_4=level_4,
            level_5=level_5, level_6=level_6, level_7=level_7, level_8=level_8,
        )  # fmt: skip
        slots = [getattr(self, f"level_{i}") for i in range(1, MAX_LEVELS + 1)]
        # A compiled part has no truth value, as it forwards `len` to a model that has none.
        configs = [None if part is None else part.config for part in (prior, *slots)]
        image_size = check_parts(configs[0], configs[1:], image_size)
        check_fingerprints(prior, self.levels)
        self.register_to_config(image_size=image_size)

    @classmethod
    def from_levels(
        cls,
        prior: ProgressiveVAEPrior | None,
        levels: list[ProgressiveVAELevel],
        image_size: list[int] | tuple[int, ...] | None = None,
    ) -> "ProgressiveVAEPipeline":
        """The pipeline of a prior and the levels [level_1 … level_N]."""
        if not 1 <= len(levels) <= MAX_LEVELS:
            raise ValueError(f"expected 1 … {MAX_LEVELS} levels, got {len(levels)}")
        slots: dict[str, Any] = {f"level_{i}": level for i, level in enumerate(levels, 1)}
        return cls(prior, **slots, image_size=image_size)

    # ---- the chain ------------------------------------------------------------------------------

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
        return ["prior", *(f"level_{i}" for i in range(1, self.num_levels + 1))]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        height, width = self.config.image_size
        return self.levels[-1].config.value_channels, height, width

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """[(H_1, W_1) … (H_N, W_N), (H, W)]: each level's codes, then the image."""
        height, width = self.config.image_size
        return grid_sizes([level.config for level in self.levels], (height, width))

    # ---- inference: image -> codes -> nats ------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        batch_size: int = 256,
        generator: Generators = None,
    ) -> list[Tensor]:
        """[z_1 … z_N] of the images, int64 (B, H_i, W_i) each: the encoders, finest first.

        With a generator (or one for each image) the codes of stochastic encoders are drawn, else
        the most probable ones.
        """
        batches, images = [], as_images(images)
        generator, stop = as_generators(generator, len(images)), 0
        for pixel_values in pixel_value_batches(images, self.image_shape, batch_size):
            start, stop = stop, stop + len(pixel_values)
            chain = self._encode_chain(pixel_values, part_of(generator, slice(start, stop)))
            batches.append([codes.cpu() for codes in chain[:-1]])
        self.maybe_free_model_hooks()
        return [torch.cat(level) for level in zip(*batches, strict=True)]

    def _encode_chain(self, pixel_values: Tensor, generator: Generators) -> list[Tensor]:
        """[z_1 … z_N, s]."""
        chain = [pixel_values.to(self._execution_device)]
        for level in reversed(self.levels):
            chain.insert(0, level.encode(chain[0], generator))
        return chain

    @torch.no_grad()
    def log_prob(
        self,
        images: Images,
        class_labels: Labels = None,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Nats (B,) of every factor of P(s, z(s)), z(s) the most probable codes.

        Args:
            class_labels: for the class-conditional factors; `None` is the null class for all.
            generator: z is drawn from the encoders instead, and `"encoders"` is their entropy
                H(P_Ψ(z | s)) in nats: the sum of all entries is then a bound on log P(s), in
                expectation, whether the encoders are stochastic or not.
        """
        prior, terms, images = self._require_prior(), [], as_images(images)
        batch_size = as_integer("batch_size", batch_size, 1)
        labels = label_ids(class_labels, self._class_config, len(images))
        generator, stop = as_generators(generator, len(images)), 0
        for pixel_values in pixel_value_batches(images, self.image_shape, batch_size):
            start, stop = stop, stop + len(pixel_values)
            given, rows = labels[start:stop], slice(start, stop)
            chain = self._encode_chain(pixel_values, part_of(generator, rows))  # z_1 … z_N, s
            codes = chain[:-1]
            factors = [prior.log_prob(codes[0], known_labels(given, prior.config))]
            for level, z, finer in zip(self.levels, codes, chain[1:], strict=True):
                factors.append(level.log_prob(finer, z, known_labels(given, level.config)))
            if generator is not None:
                pairs = zip(self.levels, chain[1:], strict=True)
                factors.append(sum(level.encoder_entropy(finer) for level, finer in pairs))
            terms.append([factor.float().cpu() for factor in factors])
        self.maybe_free_model_hooks()
        columns = (torch.cat(column) for column in zip(*terms, strict=True))
        names = [*self.factor_names, *(["encoders"] if generator is not None else [])]
        return dict(zip(names, columns, strict=True))

    def bits_per_dim(
        self,
        images: Images,
        class_labels: Labels = None,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> dict[str, float]:
        """−log2 of every term of `log_prob` / (C·H·W), averaged over the images, and `"total"`."""
        nats = self.log_prob(images, class_labels, batch_size, generator)
        scale = -1 / (math.log(2) * math.prod(self.image_shape))
        bits = {name: value.double().mean().item() * scale for name, value in nats.items()}
        return {**bits, "total": sum(bits.values())}

    # ---- generation: codes -> image -------------------------------------------------------------

    @torch.no_grad()
    @renamed_argument("corruption", "code_noise")
    def __call__(
        self,
        class_labels: Labels = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | list[float] = 1.0,
        temperature: float | list[float] = 1.0,
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
    ):
        """Draw images from coarse to fine.

        Args:
            class_labels: ints or names of `id2label`, one for each prompt; `None`: one prompt of
                the null class.
            num_images_per_prompt: images for each label (or for each of the given grids).
            guidance_scale: classifier-free guidance of the factors that are class-conditional; 1
                for none.
            temperature, top_k, top_p: as in `ProgressiveVAELevel.sample`.
            code_noise: the noise level that levels refitted with `code_noise` are conditioned on
                for sampled codes, limited to each level's own; 0 for codes that are passed.
                These five are one for all factors, or a list for [prior, level_1 … level_N].
            generator: one for all, or one for each image, so that an image does not depend on its
                batch; CPU generators work on any device.
            codes: grids [z_1 … z_k] to start from, int64 (B, H_i, W_i) each: only what is finer
                is drawn.
            num_levels: k < N for a preview: z_1 … z_k are drawn, finer factors take their most
                probable values.
            preview: show what the auxiliary decoder expects of z_N, in place of drawing pixels.
            output_type: `"pil"`, `"np"` (B, H, W, C) in [0, 1], `"pt"` (B, C, H, W) in [0, 1], or
                `"latent"`, the finest codes.
            callback_on_step_end: called after each factor of codes as `(pipe, step, step,
                tensors)`, where `tensors["codes"]` is [z_1 …] so far; it may return others, and
                set `pipe._guidance_scale` for the factors that follow. `pipe._interrupt = True`
                ends the call: it returns the batches that are complete. If there are none, it
                returns the codes [z_1 … z_k] so far, and their preview as images. Without the
                auxiliary decoders finer factors take their most probable values, as fast as that
                is.
            batch_size: images drawn at a time.

        Returns:
            `ProgressiveVAEPipelineOutput`, or the tuple `(images, codes)`.
        """
        labels, given, count = self._prompts(
            class_labels, guidance_scale, codes, num_images_per_prompt
        )
        controls = per_factor_sampling_kwargs(
            self.factor_names,
            [level.config for level in self.levels],
            len(given),
            num_levels,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            code_noise=code_noise,
        )
        check_outputs(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        generator = as_generators(generator, count)
        batch_size = as_integer("batch_size", batch_size, 1)
        starts = range(0, count, batch_size)
        is_drawn = output_type != "latent" and not preview  # with its pixels
        stop = self.num_levels + is_drawn  # grids to end with
        # Codes of some levels are enough for the images of a call that a callback ends.
        has_previews = all(level.auxiliary is not None for level in self.levels)
        is_enough = output_type == "latent" or has_previews
        total = len(starts) * (stop - len(given))
        batches: list[list[Tensor]] = []
        with (
            self._call(guidance_scale, total) as call,
            self.progress_bar(total=total) as progress,
        ):
            for start in starts:
                chunk = slice(start, min(start + batch_size, count))
                call.guidance_scale = guidance_scale  # the callback may have changed it
                grids = [z[chunk].to(self._execution_device) for z in given]
                noise = part_of(generator, chunk)
                for step in self._ancestral_sample(
                    call, grids, labels[chunk], noise, controls, stop
                ):
                    is_watched = step < self.num_levels and not call.interrupt
                    if callback_on_step_end is not None and is_watched:
                        shown = {name: grids for name in callback_on_step_end_tensor_inputs}
                        changed = callback_on_step_end(self, step, step, shown)
                        configs = [level.config for level in self.levels]
                        found = changed_codes(changed, grids, configs, self.grid_sizes)
                        grids[:] = [z.to(self._execution_device) for z in found]
                    progress.update()
                    if call.interrupt and (batches or is_enough):
                        break
                    if call.interrupt:
                        for row in controls:
                            row["temperature"] = 0.0
                if len(grids) == stop or not batches:
                    batches.append([grid.cpu() for grid in grids])
                if call.interrupt:
                    break
            columns = [torch.cat(column) for column in zip(*batches, strict=True)]
            drawn = columns[: self.num_levels]
            if len(columns) > self.num_levels:
                images = from_pixel_values(columns[-1], output_type)
            elif output_type == "latent":
                images = drawn[-1]
            else:
                images = self.preview(drawn, output_type=output_type, batch_size=batch_size)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, drawn
        return ProgressiveVAEPipelineOutput(images=images, codes=drawn)

    def _ancestral_sample(self, call, grids, labels, generator, controls, stop) -> Iterator[int]:
        """Ancestral sampling: appends z_1, z_2 … z_N, s to `grids`, yields each factor's index."""
        given_levels = len(grids)
        if not grids:
            prior = self._require_prior()
            given, told = known_labels(labels, prior.config), controls[0] | self._guidance(call, 0)
            grids.append(prior.sample(len(labels), given, generator=generator, **told))
            yield 0
        for i in range(len(grids), stop):
            level, size = self.levels[i - 1], self.grid_sizes[i]
            told = controls[i] | self._guidance(call, i)
            given = known_labels(labels, level.config)
            is_drawn = i != given_levels
            told["code_noise"] = min(told["code_noise"], level.config.code_noise) * is_drawn
            grids.append(
                level.sample(grids[-1], given, generator=generator, finer_size=size, **told)
            )
            yield i

    def _guidance(self, call: Call, factor: int) -> dict[str, float]:
        return per_factor(self.factor_names, guidance_scale=call.guidance_scale)[factor]

    def decode(
        self,
        codes: list[Tensor],
        output_type: str = "pil",
        generator: Generators = None,
        **controls,
    ):
        """Images of the codes [z_1 … z_k]; finer grids, where not given, are drawn too.

        Given all N grids only the image is drawn, from z_N. Further keywords as in `__call__`.
        """
        return self(codes=codes, output_type=output_type, generator=generator, **controls).images

    def reconstruct(
        self,
        images: Images,
        level: int | None = None,
        output_type: str = "pil",
        generator: Generators = None,
        **controls,
    ):
        """Images drawn again from their own z_1 … z_k, k = `level` (N where not given).

        k = 1 shows what the coarsest codes alone say. Further keywords as in `__call__`.
        """
        level = self._checked(level)
        batch = {"batch_size": controls["batch_size"]} if "batch_size" in controls else {}
        return self.decode(self.encode(images, **batch)[:level], output_type, generator, **controls)

    @torch.no_grad()
    def preview(
        self,
        shown: "list[Tensor] | Images",
        level: int | None = None,
        output_type: str = "pil",
        batch_size: int = 256,
    ):
        """What the auxiliary decoders expect to see of z_k: one pass a level, nothing is drawn.

        Args:
            shown: codes [z_1 … z_k], or images, which are encoded.
            level: k; where not given the finest level that there are codes of.
            output_type: as in `__call__`.

        Raises:
            ValueError: a level from k on without an auxiliary decoder, codes or images that are
                none, or a `level` of which there are no codes.
        """
        batch_size = as_integer("batch_size", batch_size, 1)
        is_codes = isinstance(shown, (list, tuple)) and all(
            isinstance(z, (np.ndarray, Tensor)) and z.dtype in (torch.long, np.int64) for z in shown
        )
        codes = as_grids(shown) if is_codes else self.encode(shown, batch_size)  # type: ignore
        check_grids(codes, [level.config for level in self.levels], self.grid_sizes)
        level = len(codes) if level is None else as_integer("level", level, 1, len(codes))
        paint = PreviewDecoder(self.levels[level - 1 :], self.grid_sizes[level:])
        batches = [
            paint.decode_codes(grid.to(self._execution_device)).cpu()
            for grid in codes[level - 1].split(batch_size)
        ]
        self.maybe_free_model_hooks()
        return from_pixel_values(torch.cat(batches), output_type)

    def enable_sequential_cpu_offload(self, *args, **kwargs):
        """Not supported: weights are read outside of the `forward` that its hooks wait for."""
        raise ValueError("expected enable_model_cpu_offload in place of the sequential one")
