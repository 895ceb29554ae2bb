"""One level: the encoder `P_Ψ(z_i | z_{i+1})` and the decoder `P_Θ(z_{i+1} | z_i)`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration import ProgressiveVAELevelConfig
from .decoders import Decoder
from .networks import ChannelNorm, Downsample, init_weights, residual_blocks
from .quantizer import VectorQuantizer, check_codes
from .sampling import Sampler


@dataclass
class ProgressiveVAELevelOutput(ModelOutput):
    """
    Args:
        loss: scalar, nats per entry of the finer grid plus β·commitment; minimise it.
        log_prob: log P_Θ(z_{i+1} | z_i) in nats, summed over the grid, (B,).
        codes: z_i, int64 (B, H_i, W_i).
        latents: the encoder's output before quantisation, (B, D, H_i, W_i).
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
        if config.is_finest:
            self.embed, embed_dim = None, config.value_channels
        else:
            self.embed = nn.Embedding(config.num_values, config.value_embed_dim)
            embed_dim = config.value_embed_dim
        # An image is halved at once, as full resolution costs most and says least. Symbols are
        # few and each says much: they are looked at before the first halving.
        layers: list[nn.Module] = [] if config.is_finest else [
            nn.Conv2d(embed_dim, width, 3, padding=1),
            residual_blocks(width, config.encoder_num_layers),
        ]  # fmt: skip
        for step in range(int(math.log2(config.downsample))):
            layers += [
                Downsample(embed_dim if config.is_finest and step == 0 else width, width),
                residual_blocks(width, config.encoder_num_layers),
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


class ProgressiveVAELevel(PreTrainedModel):
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
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            config.codebook_dim,
            config.codebook_decay,
            config.restart_threshold,
        )
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        init_weights(module)

    def codes_size(self, finer_size: tuple[int, int]) -> tuple[int, int]:
        """(H_{i+1}, W_{i+1}) -> (H_i, W_i), by ceiling division."""
        scale = self.config.downsample
        return -(-finer_size[0] // scale), -(-finer_size[1] // scale)

    def forward(self, finer: Tensor, return_dict: bool | None = None):
        """The terms of training under the uniform prior on z_i.

        The KL of a deterministic encoder to that prior is the constant L_i log K_i, so the loss is
        −log P_Θ(z_{i+1} | z_i) per entry of the finer grid, plus β times the commitment.

        Returns:
            `ProgressiveVAELevelOutput`, or a tuple of its fields.
        """
        values = self._values(finer)
        latents = self.encoder(finer)
        codes, quantized, commitment_loss = self.quantizer(latents)
        log_prob = self.decoder.log_prob(quantized, values)
        nats_per_entry = -log_prob.mean() / values[0].numel()
        loss = nats_per_entry + self.config.commitment_weight * commitment_loss
        output = ProgressiveVAELevelOutput(loss, log_prob, codes, latents)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, finer: Tensor) -> Tensor:
        """z_i = argmax P_Ψ(z_i | z_{i+1}), int64 (B, H_i, W_i)."""
        self._values(finer)
        return self.quantizer.nearest(self.encoder(finer))

    @apply_forward_hook
    def log_prob(self, finer: Tensor, codes: Tensor) -> Tensor:
        """log P_Θ(z_{i+1} | z_i) in nats, summed over the finer grid: (B,).

        Raises:
            ValueError: `finer` or `codes` of the wrong shape, dtype or range, or not of one size.
        """
        values = self._values(finer)
        check_codes(codes, self.config.codebook_size, self.codes_size(values.shape[-2:]))
        if len(codes) != len(finer):
            raise ValueError(f"expected {len(finer)} codes, one for each finer, got {len(codes)}")
        return self.decoder.log_prob(self.quantizer.lookup(codes), values)

    @apply_forward_hook
    @torch.no_grad()
    def sample(
        self,
        codes: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        finer_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Draw z_{i+1} ~ P_Θ(z_{i+1} | z_i).

        Args:
            codes: z_i, int64 (B, H_i, W_i).
            generator: one for the batch, or one for each example; on any device.
            temperature: 0 takes the most probable value at each step.
            top_k, top_p: keep only the most probable values of each step.
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
        draw = Sampler(len(codes), generator, temperature, top_k, top_p)
        values = self.decoder.walk(
            self.quantizer.lookup(codes), size, lambda group, colour, logits: draw(logits)
        )
        return values / 127.5 - 1 if self.config.is_finest else values[:, 0]

    @torch.no_grad()
    def after_step(self, output, gather: Callable[[Tensor], Tensor]):
        """Move the codebook by the latents and codes of a `ProgressiveVAELevelOutput`.

        Args:
            gather: concatenates a tensor over processes along dimension 0.
        """
        counts, sums = self.quantizer.statistics(output.latents, output.codes)
        self.quantizer.update(gather(counts[None]).sum(0), gather(sums[None]).sum(0))
        dead = self.quantizer.dead()  # the same on every process
        if dead.any():
            vectors = gather(output.latents.detach().movedim(1, -1).flatten(0, -2).float())
            # Spread over the whole batch, starting at a place that every process agrees on.
            step = max(1, len(vectors) // int(dead.sum()))
            start = int(dead.nonzero()[0]) % step
            self.quantizer.restart(dead, vectors[start::step])

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
