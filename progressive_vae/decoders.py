"""Forms of `P_Θ(finer | z)`: one walk over groups of positions, whatever the order.

The positions of the finer grid are split into groups. The walk predicts them in sequence:
positions inside a group are independent given z and all earlier groups, and the colours of one
pixel are predicted one after the other. Sampling and coding are the same walk with another
`choose`. So is likelihood: no later value can be seen because it has not been put in yet. Only the
raster order computes it otherwise, in one pass of a causal language model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, OPTConfig

from .configuration import MAX_RASTER_POSITIONS, ProgressiveVAELevelConfig
from .distributions import Distribution
from .groups import ORDERS, Group, Lattice, Scattered
from .networks import (
    Downsample,
    FreeLogits,
    PixelEmbedding,
    PixelLogistics,
    PixelLogits,
    Upsample,
    ZeroConv2d,
    ZeroEmbedding,
    cached_step,
    pixel_guesses,
    residual_blocks,
    soft_differences,
)

# What to do at one step of a walk: (group, colour, distribution) -> int64 (B, n).
Choose = Callable[[Group, int, Distribution], Tensor]


class Condition(NamedTuple):
    """What a decoder is given.

    Args:
        quantized: codebook[z], (B, D, h, w).
        class_labels: ids, int64 (B,); `None` is the null class.
        corruption: the probability with which each code of z was replaced, (B,); `None` is 0.
    """

    quantized: Tensor
    class_labels: Tensor | None = None
    corruption: Tensor | None = None


class Decoder(nn.Module):
    """`P_Θ(finer | z) = ∏_groups ∏_colours ∏_positions P(x | z, earlier groups and colours)`.

    Finer grids are int64 (B, C, H, W) with values 0 … V − 1: pixels with C colours and V = 256,
    or symbols with C = 1 and V = K_{i+1}. What the orders share is how z comes in. Each has

    - `walk(condition, size, choose)`: visits every group in order, on a finer grid of `size`
      (H, W), and returns the chosen grid. `choose` is called with (group, colour, distribution)
      and returns the values of that colour at the group's n positions, int64 (B, n).
    - `log_prob(condition, finer)`: log P_Θ(finer | z) in nats, (B,).
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.codebook_dim, config.hidden_size, 3, padding=1)
        if config.num_classes:
            self.class_embedding = ZeroEmbedding(config.num_classes + 1, config.hidden_size)
        if config.corruption:
            self.corruption_embedding = ZeroEmbedding(1, config.hidden_size)

    def start(self, condition: Condition) -> Tensor:
        """The state before the walk, (B, width, h, w)."""
        quantized, class_labels, corruption = condition
        state = self.stem(quantized)
        if self.config.num_classes:
            if class_labels is None:
                class_labels = torch.full((len(state),), self.config.num_classes)
            state = state + self.class_embedding(class_labels.to(state.device))[:, :, None, None]
        if self.config.corruption and corruption is not None:
            strength = (corruption / self.config.corruption).to(state)[:, None]  # 0 … 1
            state = state + (strength * self.corruption_embedding.weight)[:, :, None, None]
        return state.contiguous(memory_format=torch.channels_last)


class Stage(nn.Module):
    """The part of a group decoder that belongs to one group: refine, predict, take in."""

    def __init__(
        self, config: ProgressiveVAELevelConfig, num_upsamples: int, is_first: bool, is_final: bool
    ):
        super().__init__()
        width, channels = config.hidden_size, config.value_channels
        self.upsample = nn.Sequential(*(Upsample(width) for _ in range(num_upsamples)))
        looks = config.is_guessing and not is_first
        self.look = nn.Linear(4 * 3 * channels, width) if looks else None
        self.blocks = residual_blocks(width, config.num_layers, config.block_kernel_size)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.logits = nn.ModuleList(make_head(config) for _ in range(channels))
        known_dim = config.value_embed_dim + 3 * config.is_guessing
        # Later colours see the earlier ones of the same pixel.
        self.colours = nn.ModuleList(nn.Linear(known_dim, width) for _ in range(channels - 1))
        if not is_final:
            self.take_in = nn.Conv2d(channels * known_dim, width, 3, padding=1)

    def refine(self, state: Tensor, group: Group, guesses: Tensor | None) -> Tensor:
        """The state with z, or what is known of the grid, spread over it."""
        if self.look is not None and guesses is not None:
            near, mean = guesses[:4], guesses[-1]  # (4, B, C, n)
            steps = soft_differences(near - mean).permute(1, 3, 0, 2, 4).flatten(2).to(state)
            state = state + group.spread(self.look(steps), state.shape[-2:])
        return self.blocks(state)


def make_head(config: ProgressiveVAELevelConfig) -> nn.Module:
    """From features (B, n, width) to the distribution of one colour, or of symbols."""
    if config.is_guessing:
        return PixelLogistics(config.hidden_size)
    if config.is_finest and config.pixel_logit_rank:
        return PixelLogits(config.hidden_size, config.pixel_logit_rank)
    return FreeLogits(config.hidden_size, config.num_values)


class GroupDecoder(Decoder):
    """A convolution net that carries one state through all groups: all of them cost one pass.

    Where lattices begin coarser than z, so does the state, and z comes in again at each halving of
    the stride down to its own: a U-net whose way down is linear and whose way up is the walk.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        self.order = ORDERS[config.decoder_order]
        groups = self.order(config, (config.downsample, config.downsample))
        embedding = PixelEmbedding if config.is_finest else nn.Embedding
        if len(groups) > 1 or config.value_channels > 1:  # else no value is ever looked at
            self.embedding = embedding(config.num_values, config.value_embed_dim)
        self.cell = max(config.downsample, groups[0].stride)
        self.descents = nn.ModuleList(
            Downsample(config.hidden_size, config.hidden_size)
            for _ in range(int(math.log2(self.cell // config.downsample)))
        )
        strides = [self.cell, *(group.stride for group in groups)]
        self.stages = nn.ModuleList(
            Stage(
                config,
                int(math.log2(before // group.stride)),
                is_first=group is groups[0],
                is_final=group is groups[-1],
            )
            for before, group in zip(strides, groups, strict=False)
        )

    def walk(self, condition: Condition, size: tuple[int, int], choose: Choose) -> Tensor:
        """The walk covers the grid padded to whole cells; values beyond (H, W) become 0."""
        inside, channels = self.inside(size, condition.quantized.device), self.config.value_channels
        pyramid = self.pyramid(condition, inside)
        state = pyramid.pop()
        grid = inside.new_zeros(len(state), channels, *inside.shape, dtype=torch.long)
        groups = self.order(self.config, tuple(inside.shape))
        for group, stage in zip(groups, self.stages, strict=True):
            guesses = self.guesses(group, grid, size)
            state = stage.upsample(state)
            if len(stage.upsample) and pyramid:
                state = state + pyramid.pop()
            state = stage.refine(state, group, guesses)
            features = stage.head(group.gather(state))  # (B, n, width)
            known: list[Tensor] = []
            guess = misses = None
            is_final = group is groups[-1]
            for colour in range(channels):
                if guesses is not None:
                    guess = guesses[:, :, colour]
                distribution = stage.logits[colour](F.silu(features), guess, misses)
                values = choose(group, colour, distribution) * group.take(inside)
                group.put(grid[:, colour], values)
                if colour + 1 == channels and is_final:
                    break
                known.append(self.embedding(values))  # (B, n, E)
                if guess is not None:
                    misses = values - guess
                    known[-1] = torch.cat([known[-1], soft_differences(misses[-1]).to(state)], -1)
                if colour + 1 < channels:
                    features = features + stage.colours[colour](known[-1])
            if not is_final:
                taken = group.spread(torch.cat(known, -1), state.shape[-2:])
                state = state + stage.take_in(taken)
        return grid[..., : size[0], : size[1]]

    def guesses(self, group: Group, grid: Tensor, size: tuple[int, int]) -> Tensor | None:
        """Where the logistics of the group's pixels begin, (8, B, C, n); `None` for other heads."""
        if not self.config.is_guessing:
            return None
        assert isinstance(group, Lattice)  # the config sees to it
        near = group.near(grid, size)
        if near is not None:
            return pixel_guesses(near.float())
        whole_range = torch.arange(16.0, 256, 32, device=grid.device)
        return whole_range.view(8, 1, 1, 1).expand(8, *group.take(grid).shape)

    def pyramid(self, condition: Condition, inside: Tensor) -> list[Tensor]:
        """What z says of the padded grid, at its own stride and at each coarser one of lattices."""
        state = self.start(condition)
        height, width = (n // self.config.downsample for n in inside.shape)
        states = [F.pad(state, (0, width - state.shape[-1], 0, height - state.shape[-2]))]
        for descend in self.descents:
            states.append(descend(states[-1]))
        return states

    def inside(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """bool, of whole cells: true on the true positions (H, W) of the padded grid."""
        rows, columns = (
            torch.arange(math.ceil(n / self.cell) * self.cell, device=device) < n for n in size
        )
        return rows[:, None] & columns

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        size = (finer.shape[-2], finer.shape[-1])
        inside = self.inside(size, condition.quantized.device)
        padded = F.pad(finer, (0, inside.shape[1] - size[1], 0, inside.shape[0] - size[0]))
        terms = []

        def teacher(group: Group, colour: int, distribution: Distribution) -> Tensor:
            values = group.take(padded[:, colour])
            terms.append((distribution.log_prob(values) * group.take(inside)).sum(1))
            return values

        self.walk(condition, size, teacher)
        return torch.stack(terms).sum(0)


class RasterDecoder(Decoder):
    """A causal transformer of transformers over symbols in raster order.

    What it sees at a position is z there, upsampled, and the symbol before; it predicts the
    symbol at that position. Positions are learned: the places of a small grid differ more than a
    distance in raster order says.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        width = config.hidden_size
        self.blocks = residual_blocks(width, config.num_layers, config.block_kernel_size)
        self.upsample = nn.Sequential(
            *(Upsample(width) for _ in range(int(math.log2(config.downsample))))
        )
        # z comes in at zero, or it would drown the backbone's embeddings, which start small.
        self.condition = ZeroConv2d(width, width, 1)
        backbone = OPTConfig(
            vocab_size=config.num_values,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=2 * width,
            num_hidden_layers=config.num_layers,
            # About one head for 32 channels, of a number that divides the width.
            num_attention_heads=max(n for n in range(1, width // 32 + 2) if width % n == 0),
            max_position_embeddings=MAX_RASTER_POSITIONS,
            dropout=0.0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.backbone = AutoModel.from_config(backbone)
        self.logits = FreeLogits(width, config.num_values)

    def walk(self, condition: Condition, size: tuple[int, int], choose: Choose) -> Tensor:
        inputs, cache = self._conditions(condition, size), None
        grid = torch.zeros(len(inputs), 1, *size, dtype=torch.long, device=inputs.device)
        values = None
        for position in range(math.prod(size)):
            step = inputs[:, position : position + 1]
            if values is not None:
                step = step + self._embed(values)
            output, cache = cached_step(self.backbone, cache, inputs_embeds=step)
            group = Scattered(torch.tensor([position], device=inputs.device))
            values = choose(group, 0, self.logits(output.last_hidden_state))
            group.put(grid[:, 0], values)
        return grid

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        """One pass for all positions."""
        tokens = finer.flatten(1)
        inputs = self._conditions(condition, (finer.shape[-2], finer.shape[-1]))
        inputs = inputs + F.pad(self._embed(tokens[:, :-1]), (0, 0, 1, 0))
        output = self.backbone(inputs_embeds=inputs, use_cache=False)
        return self.logits(output.last_hidden_state).log_prob(tokens).sum(1)

    def _conditions(self, condition: Condition, size: tuple[int, int]) -> Tensor:
        """What z says at each position, (B, H·W, width)."""
        if math.prod(size) > MAX_RASTER_POSITIONS:
            raise ValueError(
                f"expected a finer grid of at most {MAX_RASTER_POSITIONS} positions for "
                f"decoder_order='raster', got {size[0]}×{size[1]}"
            )
        state = self.condition(self.upsample(self.blocks(self.start(condition))))
        return state[..., : size[0], : size[1]].movedim(1, -1).flatten(1, 2)

    def _embed(self, values: Tensor) -> Tensor:
        return self.backbone.get_input_embeddings()(values)


def make_decoder(config: ProgressiveVAELevelConfig) -> Decoder:
    return (RasterDecoder if config.decoder_order == "raster" else GroupDecoder)(config)
