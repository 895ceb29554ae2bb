"""One level: the encoder `P_Ψ(z_i | z_{i+1})` and the decoder `P_Θ(z_{i+1} | z_i)`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..arguments import as_integer, as_number, renamed_argument
from ..configuration.level import DECODER_FIELDS, ProgressiveVAELevelConfig
from ..configuration.validation import check_codes
from .auxiliary_decoder import Auxiliary, AuxiliaryDecoder
from .conditioning import ClassLabels, Conditioning
from .decoders import Condition, Decoder, make_decoder
from .encoder import Encoder, make_encoder
from .heads import Head
from .layers import init_weights
from .modeling_utils import ProgressiveVAEPreTrainedModel
from .pretrained_tokenizers import TokenizerEncoder, make_tokenizer
from .preview_decoder import PreviewDecoder
from .quantizer_base import Quantizer
from .quantizers import make_quantizer
from .sampling import Generators, Sampler, uniform
from .value_types import make_value_type, signed_to_255
from .walk import StepFn

NUM_NEAREST = 8  # replacements of a code for code_noise_kind="near"

# A refit that changes only these starts as the same function: new weights start at zero.
GROWABLE_FIELDS = (
    "num_layers",
    "dropout",
    "num_classes",
    "id2label",
    "class_dropout",
    "condition_dim",
    "code_noise",
    "code_noise_kind",
)


@dataclass
class ProgressiveVAELevelOutput(ModelOutput):
    """
    Args:
        loss: scalar to minimize: nats per entry of the finer grid, including the encoder's KL,
            plus the quantizer's loss and the weighted error of the expected image.
        log_prob: log P_Θ(z_{i+1} | z_i) in nats, summed over the grid, (B,).
        codes: z_i, int64 (B, H_i, W_i).
        latents: the encoder's output before quantization, (B, D, H_i, W_i); `None` where the
            codes were passed.
    """

    loss: Tensor | None = None
    log_prob: Tensor | None = None
    codes: Tensor | None = None
    latents: Tensor | None = None


def _can_grow(old: ProgressiveVAELevelConfig, new: ProgressiveVAELevelConfig) -> bool:
    """Whether a decoder with config `new` can start as the same function as one with `old`."""
    names = [name for name in DECODER_FIELDS if name not in GROWABLE_FIELDS]
    if any(getattr(new, name) != getattr(old, name) for name in names):
        return False
    if len({old.condition_dim, new.condition_dim} - {None}) > 1:
        return False
    if new.decoder_type == "causal_lm":
        return new.num_layers == old.num_layers
    return new.num_layers >= old.num_layers


class ProgressiveVAELevel(ProgressiveVAEPreTrainedModel):
    """One VAE of the stack; the finest one models pixels, the others model codes.

    `finer` is z_{i+1}: on the finest level `pixel_values`, floats (B, C, H, W) in [−1, 1] on the
    256 values of 8-bit images; elsewhere codes, int64 (B, H_{i+1}, W_{i+1}).
    """

    config: ProgressiveVAELevelConfig
    base_model_prefix = "level"
    main_input_name = "finer"
    supports_gradient_checkpointing = True
    _repeated_blocks = ["Stage", "TransformerLayer"]  # for regional compilation
    # Their weights are read outside of their forward; the residual blocks hold most weights.
    _skip_layerwise_casting_patterns = [
        *("encoder", "auxiliary", "descents", "stem", "embedding"),
        *("look", "head", "logits", "colours", "take_in"),
    ]
    # Attention is in the backbone of a causal-LM decoder, which checks support itself.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        self.value_type = make_value_type(config)
        self.encoder: Encoder | TokenizerEncoder
        self.quantizer: Quantizer
        self.auxiliary: Auxiliary | None = None
        if config.tokenizer_config is not None:
            self.encoder, self.quantizer, self.auxiliary = make_tokenizer(config)
        else:
            self.encoder, self.quantizer = make_encoder(config), make_quantizer(config)
            if config.auxiliary_hidden_size:
                self.auxiliary = AuxiliaryDecoder(config)
        self.decoder = make_decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        init_weights(module)
        if isinstance(module, (Quantizer, Head)):
            module.init_weights()

    def get_input_embeddings(self):
        """`None`: the inputs are grids. Accelerate asks for it before it shards a model."""

    @property
    def conditional(self) -> Decoder | Auxiliary:
        """P_Θ(z_{i+1} | z_i): the decoder, or the auxiliary decoder if there is no other."""
        decoder = self.auxiliary if self.decoder is None else self.decoder
        assert decoder is not None  # the config checks it
        return decoder

    def codes_size(self, finer_size: tuple[int, int]) -> tuple[int, int]:
        """(H_{i+1}, W_{i+1}) -> (H_i, W_i), by ceiling division."""
        return self.config.codes_size(finer_size)

    def forward(
        self,
        finer: Tensor,
        codes: Tensor | None = None,
        class_labels: ClassLabels = None,
        generator: Generators = None,
        preview_decoder: PreviewDecoder | None = None,
        return_dict: bool | None = None,
    ):
        """The training loss under the uniform prior on z_i, in nats per entry of `finer`:
        −log P_Θ(z_{i+1} | z_i) + KL(P_Ψ(z_i | z_{i+1}) ‖ U) + the quantizer's loss, plus
        `reconstruction_weight` times the squared error of the image of the auxiliary decoder.

        The KL of a deterministic encoder is the constant L_i log K_i and left out. With an
        auxiliary decoder and a stronger one, encoder and codebook learn from both.

        Args:
            codes: z_i, if it was encoded before: then the encoder does not run, the loss is the
                decoder's only, and in training mode noise is added to the codes (`code_noise`).
            class_labels: of a class-conditional decoder, or a `Conditioning`, which may have
                embeddings; in training mode some are dropped.
            generator: of the noise of training, one for the batch, or one for each example.
            preview_decoder: of a level of codes, that of the finer levels: it computes the image
                whose error `reconstruction_weight` weighs.

        Returns:
            `ProgressiveVAELevelOutput`, or a tuple of its fields.
        """
        values = self.value_type.to_indices(finer)
        conditioning = self._conditioning(class_labels, finer)
        if self.config.is_conditional and self.training:
            conditioning = conditioning.drop(self.config.class_dropout, generator)

        # Encode, or look up the codes that were passed, with noise on them in training.
        size = (values.shape[-2], values.shape[-1])
        count = values[0].numel()
        latents = code_noise = None
        loss: Tensor | float = 0.0
        if codes is None:
            latents = self.encoder(finer)
            # Latents of a frozen encoder have no gradient: its codebook must not move.
            quantize = self.quantizer if latents.requires_grad else self.quantizer.assign
            quantized, codes, loss = quantize(latents, generator, count)
        else:
            self._check_pair(codes, values)
            noisy_codes = codes
            if self.training and self.config.code_noise:
                noise = uniform(codes.shape[:1], generator, codes.device)
                code_noise = noise * self.config.code_noise  # (B,)
                num_nearest = NUM_NEAREST if self.config.code_noise_kind == "near" else None
                noisy_codes = self.quantizer.add_noise(codes, code_noise, num_nearest, generator)
            quantized = self.quantizer.lookup(noisy_codes)

        # The auxiliary decoder trains the encoder: its nats, and the error of its expected image.
        log_prob = expected = None
        if self.auxiliary is not None and (latents is not None or self.decoder is None):
            parameters = self.auxiliary(quantized, size)
            log_prob = self.auxiliary.log_prob_of(parameters, values)
            loss = loss - log_prob / count
            if self.config.is_finest:
                expected = self.auxiliary.expectation(parameters)
                error = F.mse_loss(expected, finer)
                loss = loss + self.config.reconstruction_weight * error
            elif preview_decoder is not None:
                vectors = self.auxiliary.expectation(parameters, preview_decoder.codebook)
                error = preview_decoder.error(vectors, finer)
                loss = loss + self.config.reconstruction_weight * error

        if self.decoder is not None:
            condition = self._condition(quantized, size, conditioning, code_noise, expected)
            log_prob = self.decoder.log_prob(condition, values)
            loss = loss - log_prob / count
        assert isinstance(loss, Tensor)
        loss = loss.mean()
        output = ProgressiveVAELevelOutput(loss, log_prob, codes, latents)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, finer: Tensor, generator: Generators = None) -> Tensor:
        """z_i = argmax P_Ψ(z_i | z_{i+1}), int64 (B, H_i, W_i).

        With a generator (or one for each example) z_i is sampled, if the encoder is stochastic.
        """
        self.value_type.to_indices(finer)
        return self.quantizer.encode(self.encoder(finer), generator)

    @apply_forward_hook
    @torch.no_grad()
    def encoder_entropy(self, finer: Tensor) -> Tensor:
        """H(P_Ψ(z_i | z_{i+1})) in nats, summed over the grid, (B,); 0 if deterministic."""
        self.value_type.to_indices(finer)
        return self.quantizer.entropy(self.encoder(finer))

    @apply_forward_hook
    def log_prob(self, finer: Tensor, codes: Tensor, class_labels: ClassLabels = None) -> Tensor:
        """log P_Θ(z_{i+1} | z_i) in nats, summed over the finer grid: (B,).

        Raises:
            ValueError: `finer` or `codes` of the wrong shape, dtype or range, or not of one size.
        """
        values = self.value_type.to_indices(finer)
        conditioning = self._conditioning(class_labels, finer)
        self._check_pair(codes, values)
        size = (values.shape[-2], values.shape[-1])
        condition = self._condition(self.quantizer.lookup(codes), size, conditioning)
        return self.conditional.log_prob(condition, values)

    @apply_forward_hook
    @torch.no_grad()
    @renamed_argument("corruption", "code_noise")
    def sample(
        self,
        codes: Tensor,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        code_noise: float = 0.0,
        finer_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Sample z_{i+1} ~ P_Θ(z_{i+1} | z_i).

        Args:
            codes: z_i, int64 (B, H_i, W_i).
            class_labels: of a class-conditional decoder.
            guidance_scale: s > 1 for classifier-free guidance, logits `null + s·(class − null)`
                (Ho & Salimans 2022).
            generator: one for the batch, or one for each example; on any device.
            temperature: 0 takes the most probable value at each step. Of pixels in a mixture of
                logistics it lowers weights and scales of the components, and 0 takes the mean of
                the most probable one.
            top_k, top_p: keep only the most probable values of each step.
            code_noise: the fraction of replaced codes that the decoder is conditioned on, in
                [0, config.code_noise]; `log_prob` uses 0.
            finer_size: (H_{i+1}, W_{i+1}); `None`: `downsample` times the grid of codes.

        Returns:
            pixels, float (B, C, H, W) in [−1, 1], or codes, int64 (B, H_{i+1}, W_{i+1}).
        """
        sampler = Sampler(
            len(codes),
            generator,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
        check_codes(codes, self.config.codebook_size)
        size = self._finer_size(finer_size, codes)
        sampler.preload(self.conditional.step_sizes(size), codes.device)
        conditioning = self._conditioning(class_labels, codes).for_guidance(sampler)
        inputs = torch.cat([codes, codes]) if sampler.is_guided else codes
        code_noise = self._check_code_noise(code_noise)
        walk = self._compiled_walk or self.walk
        return walk(inputs, sampler.step, conditioning, code_noise, size)[: len(codes)]

    @apply_forward_hook
    @renamed_argument("corruption", "code_noise")
    def walk(
        self,
        codes: Tensor,
        step_fn: StepFn,
        class_labels: ClassLabels = None,
        code_noise: float = 0.0,
        finer_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Run the autoregressive loop of P_Θ(z_{i+1} | z_i) and call `step_fn` at each step.

        Sampling, coding and likelihood are this loop with different step functions. It visits each
        channel of each position once: group after group of the ordering, in a group channel after
        channel, in a channel position after position, in row-major order.

        Args:
            codes: z_i, int64 (B, H_i, W_i).
            step_fn: `(distribution, step) -> values`, int64 (B, n) in 0 … V − 1. The distribution
                has `log_prob(values)` and `logits`, (B, n, V), conditioned on z_i and all earlier
                values. The step has the indices `group` and `channel`, and `positions`, int64 (n,),
                row-major indices in the grid (H_{i+1}, W_{i+1}).
            class_labels, code_noise, finer_size: as in `sample`.

        Returns:
            the values of all steps: pixels, float (B, C, H, W) in [−1, 1], or codes, int64
            (B, H_{i+1}, W_{i+1}).

        Raises:
            ValueError: `codes` of the wrong shape, dtype or range, a `finer_size` or `code_noise`
                that does not fit, or values of another shape or dtype.
        """
        check_codes(codes, self.config.codebook_size)
        size = self._finer_size(finer_size, codes)
        if not torch.compiler.is_compiling():  # `sample` has checked it before
            code_noise = self._check_code_noise(code_noise)
        conditioning = self._conditioning(class_labels, codes)
        quantized = self.quantizer.lookup(codes)
        noise_level = quantized.new_full((len(codes),), code_noise) if code_noise else None
        condition = self._condition(quantized, size, conditioning, noise_level)
        values = self.conditional.walk(condition, size, step_fn)
        return self.value_type.from_indices(values)

    @apply_forward_hook
    def expectation(
        self, vectors: Tensor, finer_size: tuple[int, int], finer_codebook: Tensor | None = None
    ) -> Tensor:
        """The auxiliary decoder's expectation of z_{i+1}, with a gradient, from code vectors, or
        means of code vectors, (B, D, H_i, W_i): an image, float (B, C, H, W) in [−1, 1], or the
        mean vectors in the finer level's codebook (V, D'), (B, D', H_{i+1}, W_{i+1})."""
        auxiliary = self._require_auxiliary()
        return auxiliary.expectation(auxiliary(vectors.to(self.dtype), finer_size), finer_codebook)

    @apply_forward_hook
    @torch.no_grad()
    def expect(self, codes: Tensor, finer_size: tuple[int, int] | None = None) -> Tensor:
        """The auxiliary decoder's expectation of z_{i+1}: an image, float (B, C, H, W) in [−1, 1],
        or the probabilities of codes, (B, V, H_{i+1}, W_{i+1}).

        Args:
            codes: z_i, int64 (B, H_i, W_i); or probabilities of codes, float (B, K, H_i, W_i).
            finer_size: as in `sample`.

        Raises:
            ValueError: a level without an auxiliary decoder, or invalid `codes`.
        """
        size = self._finer_size(finer_size, codes)
        if codes.is_floating_point():
            quantized = torch.einsum("bkhw,kd->bdhw", codes.to(self.dtype), self.quantizer.codebook)
        else:
            check_codes(codes, self.config.codebook_size)
            quantized = self.quantizer.lookup(codes)
        return self._require_auxiliary().expect(quantized, size)

    def _require_auxiliary(self) -> Auxiliary:
        if self.auxiliary is None:
            raise ValueError("expected a level with an auxiliary decoder, got none in its config")
        return self.auxiliary

    def check_causal(self):
        """Raise a `ValueError` unless stepwise and teacher-forced log-probabilities agree: the
        backbone of a causal-LM decoder may attend to later codes."""
        self.conditional.check_causal()

    def after_step(self, output, gather: Callable[[Tensor], Tensor]):
        """Update the quantizer after an optimization step with a `ProgressiveVAELevelOutput`: the
        codebook of `"vq"`, the temperature of `"gumbel"`.

        If a training loop does not call it, the next forward pass in training mode does, with the
        latents of its own process.

        Args:
            gather: concatenates a tensor over processes along dimension 0.
        """
        if output.latents is not None:
            self.quantizer.after_step(output.latents, output.codes, gather)

    def with_decoder(self, from_scratch: bool = False, **changes) -> "ProgressiveVAELevel":
        """A level with the same encoder and codebook, frozen, and a decoder to be refitted.

        Encoder autonomy: with expressive conditionals any encoder is good enough, so a decoder can
        be replaced at any time, on the codes that the encoder defines.

        Args:
            from_scratch: initialize new weights. Otherwise the new decoder starts from the weights
                of the old one, if `changes` are among `GROWABLE_FIELDS`; it may have more residual
                blocks or layers, which start as the identity (not with `"causal_lm"`).
            changes: fields of the config that belong to the decoder (`DECODER_FIELDS`).
        """
        level = ProgressiveVAELevel(self.config.with_decoder(**changes))
        for name in ("encoder", "quantizer", "auxiliary"):
            if (part := getattr(level, name)) is not None:
                part.load_state_dict(getattr(self, name).state_dict())
                if part is not level.conditional:
                    part.requires_grad_(False)
        old, new = self.decoder, level.decoder
        if old is None or new is None or from_scratch:
            return level
        if _can_grow(self.config, level.config):
            shapes = {name: weight.shape for name, weight in new.state_dict().items()}
            # More blocks, attention to embeddings, classes and code noise start at zero.
            weights = {
                name: weight
                for name, weight in old.state_dict().items()
                if shapes.get(name) == weight.shape
            }
            new.load_state_dict(weights, strict=False)
        return level

    def _conditioning(self, class_labels: ClassLabels, batch: Tensor) -> Conditioning:
        """What the decoder is conditioned on, for a batch of codes or finer grids."""
        return Conditioning.from_labels(class_labels, self.config, len(batch), batch.device)

    def _condition(
        self,
        quantized: Tensor,
        size: tuple[int, int],
        conditioning: Conditioning,
        code_noise: Tensor | None = None,
        expected: Tensor | None = None,
    ) -> Condition:
        """The decoder's input for a finer grid of `size` (H, W).

        Args:
            expected: the image of the auxiliary decoder, if it was computed before.
        """
        image = None
        if self.config.is_guided:
            if expected is None:
                with torch.no_grad():
                    expected = self._require_auxiliary().expect(quantized, size)
            image = signed_to_255(expected.detach())  # the auxiliary decoder has its own loss
        if self.decoder is not None:
            quantized = self.quantizer.normalize(quantized)
        return Condition(quantized, conditioning, code_noise, image)

    def _check_code_noise(self, code_noise: Any) -> float:
        limit = self.config.code_noise
        text = f"in [0, {limit}], the code_noise of its config"
        return as_number("code_noise", code_noise, text, lambda x: 0 <= x <= limit)

    def _finer_size(self, size: Any, codes: Tensor) -> tuple[int, int]:
        """(H_{i+1}, W_{i+1}); `None`: `downsample` times the grid of codes."""
        if size is None:
            size = self.config.finer_size((codes.shape[-2], codes.shape[-1]))
        if not isinstance(size, (list, tuple, np.ndarray, Tensor)) or len(size) != 2:
            raise ValueError(f"expected finer_size of two positive integers, got {size!r}")
        size = (as_integer("finer_size", size[0], 1), as_integer("finer_size", size[1], 1))
        if self.codes_size(size) != codes.shape[-2:]:
            raise ValueError(
                f"expected finer_size whose grid of codes is {tuple(codes.shape[-2:])}, got {size}"
            )
        return size

    def _check_pair(self, codes: Tensor, values: Tensor):
        size = (values.shape[-2], values.shape[-1])
        check_codes(codes, self.config.codebook_size, self.codes_size(size))
        if len(codes) != len(values):
            raise ValueError(f"expected {len(values)} codes, one for each finer, got {len(codes)}")
