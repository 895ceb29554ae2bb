"""One level: the encoder `P_Ψ(z_i | z_{i+1})` and the decoder `P_Θ(z_{i+1} | z_i)`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .chain import check_codes, grid_sizes
from .configuration import ProgressiveVAELevelConfig
from .decoders import Condition, make_decoder
from .labels import Labels, drop_labels, label_ids
from .networks import ChannelNorm, Downsample, init_weights, residual_blocks
from .quantizer import QUANTIZERS, Quantizer
from .sampling import Generators, Sampler, uniform
from .weights import SavedModel

NUM_NEAR = 8  # codes that stand in for another one under corruption_kind="near"


@dataclass
class ProgressiveVAELevelOutput(ModelOutput):
    """
    Args:
        loss: scalar, nats per entry of the finer grid, the encoder's KL in them, plus
            β·commitment; minimise it.
        log_prob: log P_Θ(z_{i+1} | z_i) in nats, summed over the grid, (B,).
        codes: z_i, int64 (B, H_i, W_i).
        latents: the encoder's output before quantisation, (B, D, H_i, W_i); `None` where the
            codes were given.
    """

    loss: Tensor | None = None
    log_prob: Tensor | None = None
    codes: Tensor | None = None
    latents: Tensor | None = None


class Encoder(nn.Module):
    """The finer grid -> latents (B, D, H_i, W_i)."""

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        width = config.encoder_hidden_size or config.hidden_size
        blocks = config.encoder_num_layers, config.block_kernel_size
        if config.is_finest:
            self.embed, embed_dim = None, config.value_channels
        else:
            self.embed = nn.Embedding(config.num_values, config.value_embed_dim)
            embed_dim = config.value_embed_dim
        # An image is halved at once, as full resolution costs most and says least. Symbols are
        # few and each says much: they are looked at before the first halving.
        layers: list[nn.Module] = [] if config.is_finest else [
            nn.Conv2d(embed_dim, width, 3, padding=1),
            residual_blocks(width, *blocks),
        ]  # fmt: skip
        for step in range(int(math.log2(config.downsample))):
            layers += [
                Downsample(embed_dim if config.is_finest and step == 0 else width, width),
                residual_blocks(width, *blocks),
            ]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, config.codebook_dim, 1))

    def forward(self, finer: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [−1, 1], or symbols int64 (B, H, W)."""
        if self.embed is not None:
            x = self.embed(finer).movedim(-1, 1)
        else:  # pixels stay float32 outside: 16-bit floats do not hold the 256 values
            x = finer.to(self.out[1].weight.dtype)
        return self.out(self.layers(x.contiguous(memory_format=torch.channels_last)))


def _can_grow(old: ProgressiveVAELevelConfig, new: ProgressiveVAELevelConfig) -> bool:
    """Whether a decoder with config `new` can start as the function that one with `old` is."""
    names = ("hidden_size", "pixel_distribution", "pixel_logit_rank", "decoder_order", "num_groups")
    grows = new.num_layers >= old.num_layers and new.decoder_order != "raster"
    is_same = all(getattr(new, name) == getattr(old, name) for name in names)
    return is_same and (grows or new.num_layers == old.num_layers)


class ProgressiveVAELevel(SavedModel):
    """One VAE of the chain; the finest one sees pixels, the others see symbols.

    `finer` is z_{i+1}: on the finest level `pixel_values`, floats (B, C, H, W) in [−1, 1] on the
    256 values of 8-bit images; elsewhere codes, int64 (B, H_{i+1}, W_{i+1}).
    """

    config_class = ProgressiveVAELevelConfig
    base_model_prefix = "level"
    main_input_name = "finer"

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quantizer = QUANTIZERS[config.quantizer](config)
        self.decoder = make_decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        init_weights(module)
        if isinstance(module, Quantizer):
            module.init_weights()

    def codes_size(self, finer_size: tuple[int, int]) -> tuple[int, int]:
        """(H_{i+1}, W_{i+1}) -> (H_i, W_i), by ceiling division."""
        return grid_sizes([self.config], finer_size)[0]

    def forward(
        self,
        finer: Tensor,
        codes: Tensor | None = None,
        class_labels: Labels = None,
        generator: Generators = None,
        return_dict: bool | None = None,
    ):
        """The terms of training under the uniform prior on z_i, in nats per entry of `finer`:
        −log P_Θ(z_{i+1} | z_i) + KL(P_Ψ(z_i | z_{i+1}) ‖ U) + β·commitment.

        The KL of a deterministic encoder is the constant L_i log K_i and left out.

        Args:
            codes: z_i where it is known already: then the encoder is not run, the loss is the
                decoder's alone, and in training mode the codes are corrupted as the config says.
            class_labels: of a class-conditional decoder; in training mode some are dropped.
            generator: of the noise of training, one for the batch, or one for each example.

        Returns:
            `ProgressiveVAELevelOutput`, or a tuple of its fields.
        """
        values, labels = self._values(finer), self._labels(class_labels, len(finer))
        if labels is not None and self.training:
            labels = drop_labels(labels, self.config, generator)
        latents = corruption = kl = commitment_loss = None
        if codes is None:
            latents = self.encoder(finer)
            codes, quantized, kl, commitment_loss = self.quantizer(latents, generator)
        else:
            self._check_pair(codes, values)
            shown = codes
            if self.training and self.config.corruption:
                noise = uniform(codes.shape[:1], generator, codes.device)
                corruption = noise * self.config.corruption
                num_near = NUM_NEAR if self.config.corruption_kind == "near" else None
                shown = self.quantizer.corrupt(codes, corruption, num_near, generator)
            quantized = self.quantizer.lookup(shown)
        log_prob = self.decoder.log_prob(Condition(quantized, labels, corruption), values)
        nats = -log_prob if kl is None else kl - log_prob
        loss = nats.mean() / values[0].numel()
        if commitment_loss is not None:
            loss = loss + self.config.commitment_weight * commitment_loss
        output = ProgressiveVAELevelOutput(loss, log_prob, codes, latents)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, finer: Tensor, generator: Generators = None) -> Tensor:
        """z_i = argmax P_Ψ(z_i | z_{i+1}), int64 (B, H_i, W_i).

        With a generator (or one for each example) z_i is drawn, where the encoder is stochastic.
        """
        self._values(finer)
        return self.quantizer.encode(self.encoder(finer), generator)

    @apply_forward_hook
    @torch.no_grad()
    def encoder_entropy(self, finer: Tensor) -> Tensor:
        """H(P_Ψ(z_i | z_{i+1})) in nats, summed over the grid, (B,); 0 of a deterministic one."""
        self._values(finer)
        return self.quantizer.entropy(self.encoder(finer))

    @apply_forward_hook
    def log_prob(self, finer: Tensor, codes: Tensor, class_labels: Labels = None) -> Tensor:
        """log P_Θ(z_{i+1} | z_i) in nats, summed over the finer grid: (B,).

        Raises:
            ValueError: `finer` or `codes` of the wrong shape, dtype or range, or not of one size.
        """
        values, labels = self._values(finer), self._labels(class_labels, len(finer))
        self._check_pair(codes, values)
        return self.decoder.log_prob(Condition(self.quantizer.lookup(codes), labels), values)

    @apply_forward_hook
    @torch.no_grad()
    def sample(
        self,
        codes: Tensor,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        corruption: float = 0.0,
        finer_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Draw z_{i+1} ~ P_Θ(z_{i+1} | z_i).

        Args:
            codes: z_i, int64 (B, H_i, W_i).
            class_labels: of a class-conditional decoder.
            guidance_scale: s > 1 draws from logits `null + s·(class − null)` (Ho & Salimans 2022).
            generator: one for the batch, or one for each example; on any device.
            temperature: 0 takes the most probable value at each step.
            top_k, top_p: keep only the most probable values of each step.
            corruption: the share of wrong codes that a decoder refitted with corruption is told
                to expect, up to the config's; 0 is the model whose `log_prob` is stated.
            finer_size: (H_{i+1}, W_{i+1}); `downsample` times the grid of codes where not given.

        Returns:
            pixels, float (B, C, H, W) in [−1, 1], or codes, int64 (B, H_{i+1}, W_{i+1}).
        """
        check_codes(codes, self.config.codebook_size)
        size = finer_size or tuple(n * self.config.downsample for n in codes.shape[1:])
        if self.codes_size(size) != codes.shape[1:]:
            raise ValueError(
                f"expected finer_size whose grid of codes is {tuple(codes.shape[1:])}, got {size}"
            )
        if not 0 <= corruption <= self.config.corruption:
            raise ValueError(
                f"expected corruption in [0, {self.config.corruption}], what this level was "
                f"trained with, got {corruption}"
            )
        batch_size = len(codes)
        labels, quantized = self._labels(class_labels, batch_size), self.quantizer.lookup(codes)
        draw = Sampler(batch_size, generator, temperature, top_k, top_p, guidance_scale)
        null = None if labels is None else torch.full_like(labels, self.config.num_classes)
        if labels is None or torch.equal(labels, null):
            draw.guidance_scale = 1.0  # there is nothing to be guided by
        if draw.is_guided:
            labels, quantized = torch.cat([labels, null]), quantized.repeat(2, 1, 1, 1)
        strength = quantized.new_full((len(quantized),), corruption) if corruption else None
        values = self.decoder.walk(
            Condition(quantized, labels, strength),
            size,
            lambda group, colour, distribution: draw.choose(distribution),
        )[:batch_size]
        return values / 127.5 - 1 if self.config.is_finest else values[:, 0]

    def after_step(self, output, gather: Callable[[Tensor], Tensor]):
        """What follows an optimisation step with a `ProgressiveVAELevelOutput`.

        Args:
            gather: concatenates a tensor over processes along dimension 0.
        """
        if output.latents is not None:
            self.quantizer.after_step(output.latents, output.codes, gather)

    def with_decoder(self, from_scratch: bool = False, **changes) -> "ProgressiveVAELevel":
        """A level with the same encoder and codebook, frozen, and a decoder to be refitted.

        Encoder autonomy: under strong enough conditionals any encoder will do, so a decoder can
        be replaced at any time, on the latent structure that the encoder defines.

        Args:
            from_scratch: draw new weights. Otherwise the new decoder starts from those of the old
                one, if `changes` leave its width, logits, order and groups alone; it may have more
                residual blocks, which start as the identity (not with `"raster"`).
            changes: fields of the config that belong to the decoder (`DECODER_FIELDS`).
        """
        level = ProgressiveVAELevel(self.config.with_decoder(**changes))
        for name in ("encoder", "quantizer"):
            part = getattr(level, name)
            part.load_state_dict(getattr(self, name).state_dict())
            part.requires_grad_(False)
        if not from_scratch and _can_grow(self.config, level.config):
            ours, theirs = level.decoder.state_dict(), self.decoder.state_dict()
            # More blocks, and the embeddings of classes and corruption, start at zero.
            kept = {n: w for n, w in theirs.items() if n in ours and ours[n].shape == w.shape}
            level.decoder.load_state_dict(kept, strict=False)
        return level

    def _labels(self, class_labels: Labels, batch_size: int) -> Tensor | None:
        """Ids (B,) for the decoder; `None` where it is not class-conditional."""
        labels = label_ids(class_labels, self.config, batch_size)
        return labels.to(self.device) if self.config.num_classes else None

    def _check_pair(self, codes: Tensor, values: Tensor):
        size = (values.shape[-2], values.shape[-1])
        check_codes(codes, self.config.codebook_size, self.codes_size(size))
        if len(codes) != len(values):
            raise ValueError(f"expected {len(values)} codes, one for each finer, got {len(codes)}")

    def _values(self, finer: Tensor) -> Tensor:
        """The finer grid as int64 (B, C, H, W) of values 0 … V − 1, checked."""
        config = self.config
        if not config.is_finest:
            check_codes(finer, config.num_values, name="finer")
            return finer[:, None]
        if finer.ndim != 4 or finer.shape[1] != config.num_channels or not finer.numel():
            raise ValueError(
                f"expected finer of shape (B, {config.num_channels}, H, W), "
                f"got {tuple(finer.shape)}"
            )
        if not finer.is_floating_point():
            raise ValueError(f"expected finer of a floating dtype in [-1, 1], got {finer.dtype}")
        lowest, highest = finer.min().item(), finer.max().item()
        if not (lowest >= -1 and highest <= 1):  # also catches NaN
            raise ValueError(f"expected finer in [-1, 1], got values in [{lowest}, {highest}]")
        return ((finer.float() + 1) * 127.5).round().long()
