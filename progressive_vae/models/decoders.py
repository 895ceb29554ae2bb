"""Forms of `P_Θ(finer | z)`: one walk over groups of positions, whatever the order.

The positions of the finer grid are split into groups. The walk predicts them in sequence:
positions inside a group are independent given z and all earlier groups, and the colors of one
pixel are predicted one after the other. Sampling and coding are the same walk with another
`choose`. So is likelihood: no later value can be seen because it has not been put in yet. Only the
raster order computes it otherwise, in one pass of a causal language model.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import ModelOutput

from ..configuration.level import MAX_RASTER_POSITIONS, ProgressiveVAELevelConfig
from .causal_lm import NUM_CHECKED, CausalLMMixin
from .distributions import Categorical, LowRankCategorical
from .heads import NoConditioning, make_head, make_logits
from .layers import (
    AlignedLinear,
    Downsample,
    PixelEmbedding,
    Upsample,
    ZeroConv2d,
    ZeroEmbedding,
    dithered,
    residual_blocks,
)
from .orderings import ORDERS, StepFn, TeacherForcing, WalkStep, call_step_fn, group_schedule


class Condition(NamedTuple):
    """What a decoder is given.

    Args:
        quantized: codebook[z], (B, D, h, w).
        class_labels: ids, int64 (B,); `None` is the null class.
        code_noise: the probability with which each code of z was replaced, (B,); `None` is 0.
        picture: what is expected of the finer grid, where the config asks for guidance: float
            (B, C, H, W), in 0 … V − 1.
    """

    quantized: Tensor
    class_labels: Tensor | None = None
    code_noise: Tensor | None = None
    picture: Tensor | None = None


class Decoder(nn.Module):
    """`P_Θ(finer | z) = ∏_groups ∏_colors ∏_positions P(x | z, earlier groups and colors)`.

    Finer grids are int64 (B, C, H, W) with values 0 … V − 1: pixels with C colors and V = 256,
    or symbols with C = 1 and V = K_{i+1}. What the orders share is how z comes in. Each has

    - `walk(condition, size, choose)`: asks `choose` for every value of a finer grid of `size`
      (H, W), group after group, in a group color after color, and returns the chosen grid;
    - `log_prob(condition, finer)`: log P_Θ(finer | z) in nats, (B,);
    - `check_causal()`: raises a `ValueError` if a walk would say something else.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.codebook_dim, config.hidden_size, 3, padding=1)
        if config.num_classes:
            self.class_embedding = ZeroEmbedding(config.num_classes + 1, config.hidden_size)
        if config.code_noise:
            self.corruption_embedding = ZeroEmbedding(1, config.hidden_size)

    def start(self, condition: Condition) -> Tensor:
        """The state before the walk, (B, width, h, w)."""
        quantized, class_labels, code_noise, _ = condition
        state = self.stem(dithered(quantized, -self.config.dither))
        if self.config.num_classes:
            if class_labels is None:
                null = self.config.num_classes
                class_labels = torch.full((len(state),), null, device=state.device)
            state = state + self.class_embedding(class_labels.to(state.device))[:, :, None, None]
        if self.config.code_noise and code_noise is not None:
            strength = (code_noise / self.config.code_noise).to(state)[:, None]  # 0 … 1
            state = state + (strength * self.corruption_embedding.weight)[:, :, None, None]
        return state.contiguous(memory_format=torch.channels_last)


class Stage(nn.Module):
    """The part of a group decoder that belongs to one group: refine, predict, take in."""

    def __init__(
        self, config: ProgressiveVAELevelConfig, num_upsamples: int, is_first: bool, is_final: bool
    ):
        super().__init__()
        width, channels = config.hidden_size, config.value_channels
        heads = [make_head(config) for _ in range(channels)]
        known_dim = config.value_embed_dim + heads[0].residual_dim
        self.upsample = nn.Sequential(*(Upsample(width) for _ in range(num_upsamples)))
        # Before the first group there is nothing to look at.
        self.look = (
            NoConditioning() if is_first else heads[0].make_neighbor_conditioning(channels, width)
        )
        self.blocks = residual_blocks(width, config.num_layers, config.block_kernel_size)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.logits = nn.ModuleList(heads)
        # Later colors see the earlier ones of the same pixel.
        self.colours = nn.ModuleList(AlignedLinear(known_dim, width) for _ in range(channels - 1))
        if not is_final:
            self.take_in = nn.Conv2d(channels * known_dim, width, 3, padding=1)


class GroupDecoder(Decoder):
    """A convolution net that carries one state through all groups: all of them cost one pass.

    Where lattices begin coarser than z, so does the state, and z comes in again at each halving of
    the stride down to its own: a U-net whose way down is linear and whose way up is the walk.

    The state covers the grid padded to whole cells of the coarsest lattice. Values beyond the true
    grid are 0, and nobody is asked for them.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        self.num_groups = config.num_groups or 1
        assert config.ordering is not None  # the config sets it
        with torch.device("cpu"):  # positions are numbers, where weights are not there yet
            cell = config.downsample, config.downsample
            groups = ORDERS[config.ordering](self.num_groups, cell)
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

    def walk(self, condition: Condition, size: tuple[int, int], choose: StepFn) -> Tensor:
        height, width = (math.ceil(n / self.cell) * self.cell for n in size)
        pyramid = self.pyramid(condition, (height, width))
        state, channels = pyramid.pop(), self.config.value_channels
        grid = state.new_zeros(len(state), channels, height, width, dtype=torch.long)
        picture = condition.picture
        if picture is not None:
            picture = F.pad(picture, (0, width - size[1], 0, height - size[0]))
        groups = group_schedule(
            self.config.ordering, self.num_groups, tuple(size), (height, width), grid.device
        )
        for number, ((group, inside), stage) in enumerate(zip(groups, self.stages, strict=True)):
            is_final = number + 1 == len(groups)
            state = stage.upsample(state)
            if len(stage.upsample) and pyramid:
                state = state + pyramid.pop()
            guesses = stage.logits[0].guesses(group, grid, size, picture)  # (G, B, C, places)
            state = stage.blocks(stage.look(state, group, guesses))
            features = stage.head(inside.select(group.gather_features(state), 1))  # (B, n, width)
            known: list[Tensor] = []  # of the values so far, (B, places, E) each
            misses = None
            for color, head in enumerate(stage.logits):
                guess, place = guesses[:, :, color], WalkStep(number, color, inside.positions)
                values = grid.new_zeros(len(grid), 0)
                if len(place.positions):
                    distribution = head(F.silu(features), inside.select(guess), misses)
                    values = call_step_fn(choose, distribution, place, len(grid))
                values = inside.scatter_features(values)
                group.scatter_values(grid[:, color], values)
                if is_final and color + 1 == channels:
                    break  # nothing looks at these values
                missed = values - guess
                known += [self.embedding(values), head.seen(missed).to(state)]
                if color + 1 < channels:
                    shown = inside.select(torch.cat(known[-2:], -1), 1)
                    features = features + stage.colours[color](shown)
                    misses = inside.select(missed)
            if not is_final:
                taken = group.scatter_features(torch.cat(known, -1), state.shape[-2:])
                state = state + stage.take_in(taken)
        return grid[..., : size[0], : size[1]]

    def pyramid(self, condition: Condition, padded: tuple[int, int]) -> list[Tensor]:
        """What z says of the padded grid, at its own stride and at each coarser one of lattices."""
        state = self.start(condition)
        height, width = (n // self.config.downsample for n in padded)
        states = [F.pad(state, (0, width - state.shape[-1], 0, height - state.shape[-2]))]
        for descend in self.descents:
            states.append(descend(states[-1]))
        return states

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        """The walk with a teacher."""
        teacher = TeacherForcing(finer)
        self.walk(condition, (finer.shape[-2], finer.shape[-1]), teacher)
        return torch.stack(teacher.terms).sum(0)

    def check_causal(self):
        """A walk is: what follows has not been put in yet."""


class RasterDecoder(CausalLMMixin, Decoder):
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
        with torch.device("meta"):  # only to ask how wide it is
            backbone = AutoModel.from_config(config.raster_config)
            embed_dim = backbone.get_input_embeddings().embedding_dim
        # z comes in at zero, or it would drown the backbone's embeddings, which start small.
        self.condition = ZeroConv2d(width, embed_dim, 1)
        self.backbone = AutoModel.from_config(config.raster_config)
        self.logits = make_logits(config, embed_dim)

    def walk(self, condition: Condition, size: tuple[int, int], choose: StepFn) -> Tensor:
        """The groups are the positions, one by one."""
        context = self._context(condition, size)
        return self._steps(context, math.prod(size), choose).unflatten(1, (1, *size))

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        """One pass for all positions."""
        context = self._context(condition, (finer.shape[-2], finer.shape[-1]))
        return self._teacher_forced_log_prob(context, finer.flatten(1))[0]

    def check_causal(self):
        """As `CausalLMMixin._check_causal`, on a few random symbols."""
        noise = torch.Generator().manual_seed(0)
        shape = (2, self.config.codebook_dim, 1, math.ceil(NUM_CHECKED / self.config.downsample))
        kind = {"generator": noise, "device": noise.device}
        quantized = torch.randn(shape, dtype=torch.float32, **kind).to(self.stem.weight)
        tokens = torch.randint(self.config.num_values, (2, NUM_CHECKED), **kind)
        context = self._context(Condition(quantized), (1, NUM_CHECKED))
        self._check_causal(context, tokens.to(context.device))

    def _context(self, condition: Condition, size: tuple[int, int]) -> Tensor:
        """What z says at each position, (B, H·W, E)."""
        if math.prod(size) > MAX_RASTER_POSITIONS:
            raise ValueError(
                f"expected a finer grid of at most {MAX_RASTER_POSITIONS} positions for "
                f"ordering='raster', got {size[0]}×{size[1]}"
            )
        state = self.condition(self.upsample(self.blocks(self.start(condition))))
        return state[..., : size[0], : size[1]].movedim(1, -1).flatten(1, 2)

    def _inputs(self, context: Tensor, before: Tensor, start: int) -> dict[str, Tensor]:
        embedded = self.backbone.get_input_embeddings()(before)
        if start == 0:
            embedded = F.pad(embedded, (0, 0, 1, 0))
        return {"inputs_embeds": context[:, start : start + embedded.shape[1]] + embedded}

    def _read(self, output: ModelOutput) -> Categorical | LowRankCategorical:
        return self.logits(output.last_hidden_state)


def make_decoder(config: ProgressiveVAELevelConfig) -> Decoder | None:
    if config.decoder_type == "auxiliary":
        return None
    return (RasterDecoder if config.decoder_type == "causal_lm" else GroupDecoder)(config)
