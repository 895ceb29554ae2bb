"""Decoders `P_Θ(finer | z)`: one autoregressive loop over groups of positions.

An ordering splits the positions of the finer grid into groups, which are predicted in sequence.
Within a group positions are independent given z and all earlier groups; the color channels of a
pixel are predicted one after the other.

Sampling, coding and likelihood run the same `walk` with different step functions. A value becomes
visible to the network only after its step, so `GroupDecoder` is causal by construction. The other
decoders compute the likelihood in one pass: `TransformerDecoder` with a mask over the groups,
`RasterDecoder` with a causal language model.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from ..configuration.level import (
    MANY_CODES,
    MAX_RASTER_POSITIONS,
    MAX_TRANSFORMER_SIDE,
    ProgressiveVAELevelConfig,
)
from .causal_lm import NUM_CHECKED_TOKENS, CausalLMMixin
from .condition_attention import ConditionAttention
from .conditioning import Conditioning
from .distributions import Categorical, CopyMixture, LowRankCategorical, joint_log_prob
from .heads import Head, Neighborhood, make_categorical_head, make_head
from .layers import (
    AlignedLinear,
    Downsample,
    PixelEmbedding,
    ResidualLinear,
    SmallEmbedding,
    Upsample,
    ZeroConv2d,
    ZeroEmbedding,
    add_dither,
    apply_each,
    embed_channels,
    residual_blocks,
)
from .orderings import (
    ORDERINGS,
    Group,
    PositionsOfAllGroups,
    ValidPositions,
    group_positions,
    group_schedule,
    positions_of_all_groups,
)
from .palette import NO_COLOR, ColorKeys, ColorPointer, ColorSources, Palette, pack_colors
from .transformer import (
    NEIGHBOR_RATIO,
    NUM_NEIGHBORS,
    KeyValueCache,
    TransformerLayer,
    attention_mask,
    earlier_neighbors,
)
from .walk import StepFn, TeacherForcing, WalkStep, call_step_fn


class Condition(NamedTuple):
    """The inputs of a decoder besides the finer grid.

    Args:
        quantized: codebook[z], (B, D, h, w).
        conditioning: classes and embeddings.
        code_noise: the probability with which each code of z was replaced, (B,); `None` is 0.
        preview: the auxiliary decoder's mean image, if the config is guided: float (B, C, H, W)
            in 0 … V − 1.
    """

    quantized: Tensor
    conditioning: Conditioning
    code_noise: Tensor | None = None
    preview: Tensor | None = None


class Decoder(nn.Module):
    """`P_Θ(finer | z) = ∏_groups ∏_channels ∏_positions P(x | z, earlier groups and channels)`.

    The finer grid is int64 (B, C, H, W) with values 0 … V − 1: pixels with C channels and V = 256,
    or codes with C = 1 and V = K_{i+1}. This base class embeds the condition. Subclasses have

    - `walk(condition, size, step_fn)`: the autoregressive loop over a finer grid of `size` (H, W),
      which returns the values of all steps, int64 (B, C, H, W);
    - `step_sizes(size)`: the number of positions of each step of `walk`;
    - `log_prob(condition, finer)`: log P_Θ(finer | z) in nats, (B,);
    - `check_causal()`: raises a `ValueError` if `walk` and `log_prob` disagree.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__()
        self.config = config
        assert config.codebook_dim is not None  # the config sets it
        self.stem = nn.Conv2d(config.codebook_dim, config.hidden_size, 3, padding=1)
        if config.num_classes:
            self.class_embedding = ZeroEmbedding(config.num_classes + 1, config.hidden_size)
        if config.condition_dim is not None:
            self.condition_attention = ConditionAttention(config.hidden_size, config.condition_dim)
        if config.code_noise:
            self.corruption_embedding = ZeroEmbedding(1, config.hidden_size)

    def embed_condition(self, condition: Condition) -> Tensor:
        """The state before the first group, (B, width, h, w)."""
        quantized, conditioning, code_noise, _ = condition
        state = self.stem(add_dither(quantized, -self.config.dither))
        if self.config.num_classes:
            class_ids = conditioning.class_ids.to(state.device)
            state = state + self.class_embedding(class_ids)[:, :, None, None]
        if self.config.condition_dim is not None and conditioning.embeddings is not None:
            # Each position of z attends to them.
            size = state.shape[-2:]
            state = state.movedim(1, -1).flatten(1, 2)  # (B, h·w, width)
            state = self.condition_attention(state, conditioning)
            state = state.unflatten(1, size).movedim(-1, 1)
        if self.config.code_noise and code_noise is not None:
            strength = (code_noise / self.config.code_noise).to(state)[:, None]  # 0 … 1
            state = state + (strength * self.corruption_embedding.weight)[:, :, None, None]
        return state.contiguous(memory_format=torch.channels_last)

    def walk(self, condition: Condition, size: tuple[int, int], step_fn: StepFn) -> Tensor:
        raise NotImplementedError

    def step_sizes(self, size: tuple[int, int]) -> list[int]:
        raise NotImplementedError

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        raise NotImplementedError

    def check_causal(self):
        raise NotImplementedError


class Stage(nn.Module):
    """The layers of a group decoder that belong to one group. Their names are state-dict keys."""

    def __init__(
        self, config: ProgressiveVAELevelConfig, num_upsamples: int, is_first: bool, is_final: bool
    ):
        super().__init__()
        width = config.hidden_size
        channels = config.value_channels
        heads = [make_head(config) for _ in range(channels)]
        embed_dim = config.value_embed_dim + heads[0].residual_dim  # of one decoded value
        self.upsample = nn.Sequential(*(Upsample(width) for _ in range(num_upsamples)))
        # `look` adds the neighbors' values to the state; the first group has no neighbors.
        neighbor_dim = 0 if is_first else channels * heads[0].neighbor_dim
        self.look = AlignedLinear(neighbor_dim, width) if neighbor_dim else None
        self.blocks = residual_blocks(width, config.num_layers, config.block_kernel_size)
        # `head` maps the state to features, `logits` has one output head per channel.
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.logits = nn.ModuleList(heads)
        # `colours` conditions each later channel on the previous one of the same pixel.
        self.colours = nn.ModuleList(AlignedLinear(embed_dim, width) for _ in range(channels - 1))
        # The first group has no colors to copy.
        self.pointer = None if is_first or not config.copies_colors else ColorPointer(width)
        if not is_final:
            # `take_in` adds the group's values to the state.
            self.take_in = nn.Conv2d(channels * embed_dim, width, 3, padding=1)

    @property
    def heads(self) -> Sequence[Head]:
        """The heads of the channels; `logits` is their state-dict key."""
        return cast("Sequence[Head]", self.logits)

    def forward(
        self, state: Tensor, coarse_state: Tensor | None, neighbors: Tensor | None
    ) -> Tensor:
        """Refine the state before the group is predicted.

        It has no argument that differs from group to group but in its shape: stages share graphs.

        Args:
            state: (B, width, h, w), at the previous group's stride.
            coarse_state: the embedded z at this group's stride, if it enters again.
            neighbors: `look` of the embedded neighbors of the group's positions, as a map of the
                refined state's size.
        """
        state = self.upsample(state)
        if coarse_state is not None:
            state = state + coarse_state
        if neighbors is not None:
            state = state + neighbors
        return self.blocks(state)


class GroupDecoder(Decoder):
    """A convolutional network that carries one state through all groups.

    Its stages together cost one forward pass, whatever the number of groups. If the first lattices
    are coarser than z, the state starts at their stride, and z enters again at each halving of the
    stride down to its own. This is a U-net with a linear way down, whose way up is the walk.

    The state covers the grid padded to whole cells of the coarsest lattice. Values in the padding
    are 0, and steps leave them out.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        self.num_groups = config.num_groups or 1
        cell_size = (config.downsample, config.downsample)
        assert config.ordering is not None  # the config sets it
        self.ordering = config.ordering
        cpu = torch.device("cpu")  # positions need values, also if weights are on "meta"
        groups = ORDERINGS[self.ordering](self.num_groups, cell_size, cpu)
        embedding = PixelEmbedding if config.is_finest else nn.Embedding
        if len(groups) > 1 or config.value_channels > 1:  # else no value is an input
            self.embedding = embedding(config.num_values, config.value_embed_dim)
        if config.copies_colors:
            self.color_keys = ColorKeys(config.value_channels, config.value_embed_dim)
        self.cell = max(config.downsample, groups[0].stride)
        # Accelerate compiles an empty list of modules into a module without an iterator.
        self.descents: Iterable[nn.Module] = ()
        if num_descents := int(math.log2(self.cell // config.downsample)):
            self.descents = nn.ModuleList(
                Downsample(config.hidden_size, config.hidden_size) for _ in range(num_descents)
            )
        previous_strides = [self.cell, *(group.stride for group in groups)]
        self.stages = nn.ModuleList(
            Stage(
                config,
                int(math.log2(previous // group.stride)),
                is_first=group is groups[0],
                is_final=group is groups[-1],
            )
            for previous, group in zip(previous_strides, groups, strict=False)
        )

    def walk(self, condition: Condition, size: tuple[int, int], step_fn: StepFn) -> Tensor:
        """Run the autoregressive loop: group after group, channel after channel."""
        padded_size = self._padded_size(size)
        states = self.pyramid(condition, padded_size)
        state = states.pop()  # (B, width, h, w)
        grid = state.new_zeros(
            len(state), self.config.value_channels, *padded_size, dtype=torch.long
        )
        preview = _pad(condition.preview, padded_size)
        schedule = self._schedule(size, grid.device)
        colors: list[Tensor] = []  # packed, of the pixels of each earlier group, (B, n)
        stages = cast("Iterable[Stage]", self.stages)
        for i, ((group, valid), stage) in enumerate(zip(schedule, stages, strict=True)):
            # 1. Collect the decoded neighbors of the group's positions.
            neighborhood = Neighborhood.gather(group, valid.num_padded, grid, size, preview)
            means = stage.heads[0].component_means(neighborhood, grid.device)  # (G, B, C, n')
            # 2. Refine the state with them; z enters again at strides down to its own.
            neighbors = None
            if stage.look is not None:
                neighbors = stage.look(stage.heads[0].embed_neighbors(means).to(state))
                neighbors = group.scatter_features(neighbors, _state_size(group, padded_size))
            coarse_state = states.pop() if len(stage.upsample) and states else None
            state = stage(state, coarse_state, neighbors)
            # 3. Predict the group's values and write them into the grid.
            sources = None
            if stage.pointer is not None and neighborhood.neighbors is not None:
                sources = self._color_sources(
                    valid.select(neighborhood.neighbors), torch.cat(colors, 1)
                )
            embedded = self._walk_group(
                i, group, valid, stage, state, means, sources, grid, step_fn
            )
            # 4. Add the values to the state, for the groups that follow.
            if embedded is not None:
                state = state + stage.take_in(group.scatter_features(embedded, state.shape[-2:]))
            if self.config.copies_colors:
                colors.append(valid.select(pack_colors(group.gather_values(grid))))
        return grid[..., : size[0], : size[1]]

    def _walk_group(
        self,
        group_index: int,
        group: Group,
        valid: ValidPositions,
        stage: Stage,
        state: Tensor,
        component_means: Tensor,
        sources: ColorSources | None,
        grid: Tensor,
        step_fn: StepFn,
    ) -> Tensor | None:
        """Predict the channels of one group in sequence and write their values into `grid`.

        The group has n' positions in the padded grid, n of them in the true grid.

        Args:
            state: (B, width, h, w).
            component_means: (G, B, C, n').
            sources: the colors that the n pixels can copy.
            grid: int64 (B, C, H, W).

        Returns:
            the embedded values, (B, n', C·E), or `None` after the final group.
        """
        is_final = group_index + 1 == len(self.stages)
        features = stage.head(valid.select(group.gather_features(state), 1))  # (B, n, width)
        embedded: list[Tensor] = []
        previous_residuals = None
        log_weights = None
        if stage.pointer is not None and sources is not None:
            log_weights = self._copy_weights(stage.pointer, features, sources)
        for channel, head in enumerate(stage.heads):
            means = component_means[:, :, channel]  # (G, B, n')
            step = WalkStep(group_index, channel, valid.positions)
            if len(step.positions):
                distribution = head(F.silu(features), valid.select(means), previous_residuals)
                if sources is not None and log_weights is not None:
                    copies = sources.colors[:, channel]
                    distribution = CopyMixture(log_weights, copies, distribution)
                values = call_step_fn(step_fn, distribution, step, len(grid))  # (B, n)
                if isinstance(distribution, CopyMixture):
                    log_weights = distribution.posterior(values)
            else:
                values = grid.new_zeros(len(grid), 0)
            values = valid.scatter(values)  # (B, n')
            group.scatter_values(grid[:, channel], values)
            if is_final and channel + 1 == len(stage.logits):
                return None  # the last values of the grid are no inputs
            # The next channel and later groups are conditioned on the value and its residuals.
            residuals = values - means  # (G, B, n')
            embedded += [self.embedding(values), head.embed_residuals(residuals).to(state)]
            if channel + 1 < len(stage.logits):
                channel_embedding = valid.select(torch.cat(embedded[-2:], -1), 1)  # (B, n, E)
                features = features + stage.colours[channel](channel_embedding)
                previous_residuals = valid.select(residuals)
        return torch.cat(embedded, -1)

    def _color_sources(self, nearest: Tensor, packed: Tensor) -> ColorSources:
        """The colors that pixels of a group can copy.

        Args:
            nearest: the nearest decoded values, (4, B, C, n).
            packed: the colors of all pixels of earlier groups, (B, n').
        """
        palette = Palette.of_pixels(packed, self.config.value_channels, self.config.palette_size)
        return ColorSources(nearest.long(), palette)

    def _copy_weights(
        self, pointer: ColorPointer, features: Tensor, sources: ColorSources
    ) -> Tensor:
        """The log-weights of a `CopyMixture`, from features of the first channel (B, n, width)."""
        keys = self.color_keys(self.embedding(sources.palette.colors))
        return pointer(F.silu(features), keys, sources.palette)

    def pyramid(self, condition: Condition, padded_size: tuple[int, int]) -> list[Tensor]:
        """The embedded condition at z's own stride, then at each coarser stride of lattices."""
        state = self.embed_condition(condition)
        height, width = (n // self.config.downsample for n in padded_size)
        states = [_pad(state, (height, width))]
        for descent in self.descents:
            states.append(descent(states[-1]))
        return states

    def step_sizes(self, size: tuple[int, int]) -> list[int]:
        schedule = self._schedule(size, torch.device("cpu"))
        channels = range(self.config.value_channels)
        return [len(valid.positions) for _, valid in schedule for _ in channels]

    def _schedule(
        self, size: tuple[int, int], device: torch.device
    ) -> list[tuple[Group, ValidPositions]]:
        padded_size = self._padded_size(size)
        return group_schedule(
            self.ordering, self.num_groups, (size[0], size[1]), padded_size, device
        )

    def _padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W), each rounded up to whole cells of the coarsest lattice."""
        return math.ceil(size[0] / self.cell) * self.cell, math.ceil(
            size[1] / self.cell
        ) * self.cell

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        """log P_Θ(finer | z) in nats, (B,).

        On accelerators, where each operation has a price, one pass for all groups; on processors,
        whose caches hold the tables of a single group, the walk with teacher forcing. Whole colors
        are compared in one operation, where a walk compares channel after channel.
        """
        is_copying = self.config.copies_colors and not torch.compiler.is_compiling()
        is_on_cpu = finer.device.type == "cpu" and not is_copying
        if is_on_cpu or self.config.num_values > MANY_CODES:
            teacher = TeacherForcing(finer)
            self.walk(condition, (finer.shape[-2], finer.shape[-1]), teacher)
            return teacher.log_prob()
        return self.log_prob_of_all_groups(condition, finer)

    def log_prob_of_all_groups(self, condition: Condition, finer: Tensor) -> Tensor:
        """`log_prob` in a tenth of the operations of a walk, for up to `MANY_CODES` values.

        All values are known, so only the state passes from group to group. Whatever is computed
        from values alone, and the heads, on which no state depends, runs once for all groups.
        """
        size = (finer.shape[-2], finer.shape[-1])
        padded_size = self._padded_size(size)
        states = self.pyramid(condition, padded_size)
        state = states.pop()
        grid = _pad(finer, padded_size)
        joined = positions_of_all_groups(
            self.ordering, self.num_groups, size, padded_size, finer.device
        )
        stages = [*cast("Iterable[Stage]", self.stages)]
        head = stages[0].heads[0]
        # 1. Values, component means and embedded values, at the positions of all groups.
        values = joined.gather_values(grid)  # (B, C, N)
        means = self._component_means(joined, grid, _pad(condition.preview, padded_size))
        residuals = values - means  # (G, B, C, N)
        embedded = None
        if hasattr(self, "embedding"):
            parts = [self.embedding(values), head.embed_residuals(residuals).to(state)]
            embedded = torch.cat(parts, -1)  # (B, C, N, E)
        neighbors = self._look_at_neighbors(joined, stages, means, state)
        # 2. The state, group after group.
        features: list[Tensor] = []  # (B, n', width) each
        inputs: list[Tensor | None] = [None] * len(stages)
        if embedded is not None:
            inputs = [*embedded.movedim(1, 2).flatten(2).split(joined.counts, 1)]
        for stage, (group, _), group_inputs, group_neighbors in zip(
            stages, self._schedule(size, finer.device), inputs, neighbors, strict=True
        ):
            coarse_state = states.pop() if len(stage.upsample) and states else None
            if group_neighbors is not None:
                state_size = _state_size(group, padded_size)
                group_neighbors = group.scatter_features(group_neighbors, state_size)
            state = stage(state, coarse_state, group_neighbors)
            features.append(group.gather_features(state))
            if group_inputs is not None and stage is not stages[-1]:
                state = state + stage.take_in(
                    group.scatter_features(group_inputs, (state.shape[-2], state.shape[-1]))
                )
        # 3. The heads, and the distribution of all values.
        hidden = self._hidden_of_all_groups(joined, stages, features)
        params = self._params_of_all_groups(joined, stages, hidden, embedded)  # (B, C, N, P)
        previous = F.pad(residuals, (0, 0, 1, 0))[:, :, :-1]  # the first channel has none
        nats = head.distribution(params, means, previous).log_prob(values).sum(1)  # (B, N)
        if self.config.copies_colors:
            nats = self._mix_copies(joined, stages, hidden, grid, values, nats)
        if joined.is_valid is not None:
            nats = nats * joined.is_valid
        return nats.sum(1)

    def _mix_copies(
        self,
        joined: PositionsOfAllGroups,
        stages: Sequence[Stage],
        hidden: Sequence[Tensor],
        grid: Tensor,
        values: Tensor,
        base_nats: Tensor,
    ) -> Tensor:
        """The nats of whole colors under a `CopyMixture`, (B, N).

        Args:
            hidden: of `_hidden_of_all_groups`.
            values: (B, C, N).
            base_nats: of whole colors, (B, N).
        """
        nearest = joined.mask_undecoded(joined.gather_neighbors(grid))  # (4, B, C, N')
        packed = pack_colors(values)  # (B, N)
        colors = packed
        if joined.is_valid is not None:
            colors = packed.masked_fill(~joined.is_valid, NO_COLOR)
        first = stop = joined.counts[0]
        nats = [base_nats[:, :first]]
        for stage, features, count in zip(stages[1:], hidden[1:], joined.counts[1:], strict=True):
            start = stop
            stop += count
            assert stage.pointer is not None
            sources = self._color_sources(
                nearest[..., start - first : stop - first], colors[:, :start]
            )
            log_weights = self._copy_weights(stage.pointer, features, sources)
            is_copy = pack_colors(sources.colors) == packed[:, start:stop, None]
            joint = joint_log_prob(log_weights, is_copy, base_nats[:, start:stop])
            nats.append(joint.logsumexp(-1))
        return torch.cat(nats, 1)

    def _component_means(
        self, joined: PositionsOfAllGroups, grid: Tensor, preview: Tensor | None
    ) -> Tensor:
        """The heads' component means at the positions of all groups, (G, B, C, N)."""
        head = cast("Stage", self.stages[0]).heads[0]
        first, rest = joined.counts[0], sum(joined.counts[1:])
        shape = grid.shape[:2]
        previews = None if preview is None else joined.gather_values(preview)
        initial = Neighborhood(
            torch.Size((*shape, first)), None, None if previews is None else previews[..., :first]
        )
        means = head.component_means(initial, grid.device)
        if not rest:
            return means
        neighborhood = Neighborhood(torch.Size((*shape, rest)))
        if joined.neighbors is not None:
            neighborhood = Neighborhood(
                neighborhood.shape,
                joined.mask_undecoded(joined.gather_neighbors(grid)).float(),
                None if previews is None else previews[..., first:],
                None if preview is None else joined.gather_neighbors(preview),
            )
        return torch.cat([means, head.component_means(neighborhood, grid.device)], -1)

    def _look_at_neighbors(
        self,
        joined: PositionsOfAllGroups,
        stages: Sequence[Stage],
        component_means: Tensor,
        state: Tensor,
    ) -> list[Tensor | None]:
        """`look` of the neighbors of each group, (B, n', width); `None` where it has none."""
        if len(stages) == 1 or stages[1].look is None:
            return [None] * len(stages)
        first = joined.counts[0]
        embedded = stages[0].heads[0].embed_neighbors(component_means[..., first:]).to(state)
        looks: list[Tensor | None] = [None]
        for groups, positions in joined.runs(first_group=1):
            run = [cast("nn.Module", stage.look) for stage in stages[groups]]
            inputs = _split_groups(embedded[:, positions], len(run))
            looks += apply_each(run, inputs, "unaligned").unbind()
        return looks

    def _hidden_of_all_groups(
        self, joined: PositionsOfAllGroups, stages: Sequence[Stage], features: Sequence[Tensor]
    ) -> list[Tensor]:
        """`head` of the state at each group's positions, (B, n', width) each."""
        hidden: list[Tensor] = []
        for groups, _ in joined.runs():
            heads = [stage.head for stage in stages[groups]]
            hidden += apply_each(heads, torch.stack([*features[groups]])).unbind()
        return hidden

    def _params_of_all_groups(
        self,
        joined: PositionsOfAllGroups,
        stages: Sequence[Stage],
        hidden: Sequence[Tensor],
        embedded: Tensor | None,
    ) -> Tensor:
        """The parameters of all distributions, (B, C, N, P), with few matrix products.

        Args:
            hidden: of `_hidden_of_all_groups`.
            embedded: the embedded values, (B, C, N, E).
        """
        channels = self.config.value_channels
        params = []
        for groups, positions in joined.runs():
            run = stages[groups]
            by_channel = [torch.stack([*hidden[groups]])]  # (S, B, n, width) each
            for channel in range(channels - 1):
                assert embedded is not None
                values = _split_groups(embedded[:, channel, positions], len(run))
                change = apply_each([x.colours[channel] for x in run], values, "unaligned")
                by_channel.append(by_channel[-1] + change)
            x = F.silu(torch.stack(by_channel, 1)).flatten(0, 1)  # (S·C, B, n, width)
            heads = [head for stage in run for head in stage.heads]
            x = apply_each(heads, x, "params").unflatten(0, (-1, channels))  # (S, C, B, n, P)
            params.append(x.permute(2, 1, 0, 3, 4).flatten(2, 3))
        return torch.cat(params, 2)

    def check_causal(self):
        """Passes: `log_prob` is a walk, in which later values do not exist yet."""


def _state_size(group: Group, padded_size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the padded grid -> that of the group's state."""
    return padded_size[0] // group.stride, padded_size[1] // group.stride


def _split_groups(x: Tensor, num_groups: int) -> Tensor:
    """Positions of groups of equal size, (B, S·n, E) -> (S, B, n, E)."""
    return x.unflatten(1, (num_groups, -1)).movedim(1, 0)


def _pad(x: Tensor | None, size: tuple[int, int]) -> Any:
    """Zeros below and to the right of (..., H, W), up to `size`."""
    if x is None or x.shape[-2:] == size:
        return x
    return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


class RasterDecoder(CausalLMMixin, Decoder):
    """A causal language model of transformers over codes in raster order.

    Its input at a position is the upsampled condition there plus the embedding of the previous
    code. The default backbone learns absolute positions: in a small grid these matter more than
    distances in raster order.
    """

    backbone: PreTrainedModel

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        width = config.hidden_size
        self.blocks = residual_blocks(width, config.num_layers, config.block_kernel_size)
        self.upsample = nn.Sequential(
            *(Upsample(width) for _ in range(int(math.log2(config.downsample))))
        )
        with torch.device("meta"):  # without weights: only its width is needed
            backbone = AutoModel.from_config(config.raster_config)
            embed_dim = backbone.get_input_embeddings().embedding_dim
        # Starts at zero: otherwise z outweighs the backbone's embeddings, which start small.
        self.condition = ZeroConv2d(width, embed_dim, 1)
        self.backbone = AutoModel.from_config(config.raster_config)
        self.logits = make_categorical_head(config, embed_dim)

    def walk(self, condition: Condition, size: tuple[int, int], step_fn: StepFn) -> Tensor:
        """Run the autoregressive loop; each group is one position."""
        context = self._context(condition, size)
        return self._generate(context, math.prod(size), step_fn).unflatten(1, (1, *size))

    def step_sizes(self, size: tuple[int, int]) -> list[int]:
        return [1] * math.prod(size)

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        """One pass for all positions."""
        context = self._context(condition, (finer.shape[-2], finer.shape[-1]))
        return self._teacher_forced_log_prob(context, finer.flatten(1))[0]

    def check_causal(self):
        """`CausalLMMixin._check_causal` on a few random codes."""
        generator = torch.Generator().manual_seed(0)
        on_cpu = {"generator": generator, "device": generator.device}
        length = math.ceil(NUM_CHECKED_TOKENS / self.config.downsample)
        shape = (2, self.config.codebook_dim, 1, length)
        quantized = torch.randn(shape, dtype=torch.float32, **on_cpu).to(self.stem.weight)
        tokens = torch.randint(self.config.num_values, (2, NUM_CHECKED_TOKENS), **on_cpu)
        conditioning = Conditioning.from_labels(None, self.config, 2, quantized.device)
        context = self._context(Condition(quantized, conditioning), (1, NUM_CHECKED_TOKENS))
        self._check_causal(context, tokens.to(context.device))

    def _context(self, condition: Condition, size: tuple[int, int]) -> Tensor:
        """The upsampled condition at each position, (B, H·W, E)."""
        if math.prod(size) > MAX_RASTER_POSITIONS:
            raise ValueError(
                f"expected a finer grid of at most {MAX_RASTER_POSITIONS} positions for "
                f"ordering='raster', got {size[0]}×{size[1]}"
            )
        state = self.condition(self.upsample(self.blocks(self.embed_condition(condition))))
        return state[..., : size[0], : size[1]].movedim(1, -1).flatten(1, 2)

    def _inputs(self, context: Tensor, previous: Tensor, start: int) -> dict[str, Tensor]:
        embedded = self.backbone.get_input_embeddings()(previous)
        if start == 0:
            embedded = F.pad(embedded, (0, 0, 1, 0))
        return {"inputs_embeds": context[:, start : start + embedded.shape[1]] + embedded}

    def _distribution(self, output: ModelOutput) -> Categorical | LowRankCategorical:
        return self.logits(output["last_hidden_state"])


class TransformerDecoder(Decoder):
    """A transformer over codes or pixels, whose attention is causal over groups.

    Residual blocks refine the embedded z. The first state of a position is the upsampled z there,
    plus embeddings of its row and column, and of the values of its neighbors in earlier groups. The
    layers attend to z and to the positions of earlier groups, with their values. The colors of a
    pixel, or the blocks of a code that is split, are predicted one after another.
    """

    def __init__(self, config: ProgressiveVAELevelConfig):
        super().__init__(config)
        width = config.hidden_size
        assert config.condition_num_layers is not None  # the config sets it
        self.blocks = residual_blocks(width, config.condition_num_layers, config.block_kernel_size)
        self.upsample = nn.Sequential(
            *(Upsample(width) for _ in range(int(math.log2(config.downsample))))
        )
        if config.condition_num_layers:
            # Starts at zero: otherwise z outweighs the embeddings.
            self.condition = ZeroConv2d(width, width, 1)
        self.row_embedding = SmallEmbedding(MAX_TRANSFORMER_SIDE, width)
        self.column_embedding = SmallEmbedding(MAX_TRANSFORMER_SIDE, width)
        channels = config.value_channels
        self.embedding = SmallEmbedding(channels * config.num_values, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.attention_head_dim, config.dropout)
            for _ in range(config.num_layers)
        )
        if config.neighbor_inputs:
            rank = math.ceil(width / NEIGHBOR_RATIO)
            self.neighbor_values = nn.Linear(width, rank, bias=False)
            self.neighbor_projection = ResidualLinear(NUM_NEIGHBORS * rank, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.logits = make_categorical_head(config, width)
        if channels > 1:
            self.hidden = nn.Linear(width, width)
            later = range(channels - 1)
            self.block_embeddings = nn.ModuleList(
                ZeroEmbedding(config.num_values, width) for _ in later
            )
            self.later_logits = nn.ModuleList(make_categorical_head(config, width) for _ in later)

    def walk(self, condition: Condition, size: tuple[int, int], step_fn: StepFn) -> Tensor:
        """Run the autoregressive loop: one evaluation of the network for each group."""
        z, context = self._embed(condition, size)
        groups = group_positions(*self._ordering, (size[0], size[1]), context.device)
        layers = self._layers
        length = len(z) + len(context)
        caches = [KeyValueCache(layer.project_visible(z), length) for layer in layers]
        neighbor_grid = None  # what neighbors see, and a zero vector, (L + 1, B, R)
        if self.config.neighbor_inputs:
            shape = len(context) + 1, context.shape[1], self.neighbor_values.out_features
            neighbor_grid = context.new_zeros(shape)
        values: list[Tensor] = []  # of each group, int64 (B, C, n)
        num_left = len(context)
        for i, positions in enumerate(groups):
            if not len(positions):  # in a small grid some groups are empty
                continue
            # 1. Evaluate the network at the group's positions.
            state = self._with_neighbors(context[positions], neighbor_grid, size, positions)
            states = [state]  # before each layer, (n, B, E)
            for layer, cache in zip(layers, caches, strict=True):
                states.append(layer.attend(states[-1], cache.visible))
            # 2. Predict their values.
            channels: list[Tensor] = []
            features = self._features(states.pop())
            for channel in range(self.config.value_channels):
                step = WalkStep(i, channel, positions)
                distribution = self._distribution(features, channel)
                channels.append(call_step_fn(step_fn, distribution, step, len(features)))
                features = self._with_value(features, channels[-1], channel)
            values.append(torch.stack(channels, 1))
            # 3. Make them visible to the groups that follow.
            num_left -= len(positions)
            if num_left:
                embedded = embed_channels(self.embedding, values[-1]).transpose(0, 1)
                if neighbor_grid is not None:
                    neighbor_grid.index_copy_(0, positions, self.neighbor_values(embedded))
                for layer, cache, state in zip(layers, caches, states, strict=True):
                    cache.append(layer.project_visible(state + embedded))
        in_sequence = torch.cat(values, 2)
        grid = torch.empty_like(in_sequence).index_copy(2, torch.cat(groups), in_sequence)
        return grid.unflatten(2, size)

    def step_sizes(self, size: tuple[int, int]) -> list[int]:
        groups = group_positions(*self._ordering, (size[0], size[1]), torch.device("cpu"))
        channels = range(self.config.value_channels)
        return [len(positions) for positions in groups for _ in channels]

    def log_prob(self, condition: Condition, finer: Tensor) -> Tensor:
        """One pass for all positions."""
        size = (finer.shape[-2], finer.shape[-1])
        values = finer.flatten(2)  # (B, C, L)
        z, state = self._embed(condition, size)
        embedded = embed_channels(self.embedding, values).transpose(0, 1)
        neighbor_grid = None
        if self.config.neighbor_inputs:
            neighbor_grid = F.pad(self.neighbor_values(embedded), (0, 0, 0, 0, 0, 1))
        state = self._with_neighbors(state, neighbor_grid, size)
        mask = attention_mask(*self._ordering, size, len(z), finer.device)
        for layer in self._layers:
            state = layer(state, embedded, z, mask)
        features = self._features(state)
        nats = []
        for channel, of_channel in enumerate(values.unbind(1)):
            nats.append(self._distribution(features, channel).log_prob(of_channel))
            features = self._with_value(features, of_channel, channel)
        return torch.stack(nats).sum((0, 2))

    def check_causal(self):
        """Passes: the mask hides later groups."""

    @property
    def _layers(self) -> Sequence[TransformerLayer]:
        return cast("Sequence[TransformerLayer]", self.layers)

    @property
    def _ordering(self) -> tuple[str, int]:
        """The ordering and its number of groups, which some orderings do not read."""
        assert self.config.ordering is not None  # the config sets it
        return self.config.ordering, self.config.num_groups or 1

    def _embed(self, condition: Condition, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The states of z, (h·w, B, E), and of all positions before the first layer, (L, B, E).

        A code of z has the place of its first position in the finer grid.
        """
        height, width = size
        if max(size) > MAX_TRANSFORMER_SIDE:
            raise ValueError(
                f"expected a finer grid of at most {MAX_TRANSFORMER_SIDE} rows and columns for "
                f"decoder_type='transformer', got {height}×{width}"
            )
        z = self.blocks(self.embed_condition(condition))
        state = self.upsample(z)
        if self.config.condition_num_layers:
            state = self.condition(state)
        state = state[..., :height, :width]
        rows = self.row_embedding(torch.arange(height, device=z.device))
        columns = self.column_embedding(torch.arange(width, device=z.device))
        places = (rows[:, None] + columns)[:, :, None]  # (H, W, 1, E)
        stride = self.config.downsample
        z_state = z.permute(2, 3, 0, 1) + places[::stride, ::stride]
        return z_state.flatten(0, 1), (state.permute(2, 3, 0, 1) + places).flatten(0, 1)

    def _with_neighbors(
        self,
        state: Tensor,
        neighbor_grid: Tensor | None,
        size: tuple[int, int],
        positions: Tensor | None = None,
    ) -> Tensor:
        """The first states of some positions, (n, B, E), with the values of their neighbors.

        Args:
            state: without them, (n, B, E).
            neighbor_grid: what neighbors see of all positions, and a zero vector, (L + 1, B, R);
                `None`: nothing.
            size: (H, W) of the finer grid.
            positions: int64 (n,); `None`: all.
        """
        if neighbor_grid is None:
            return state
        neighbors = earlier_neighbors(*self._ordering, (size[0], size[1]), state.device)
        if positions is not None:
            neighbors = neighbors[:, positions]
        values = neighbor_grid[neighbors]  # (8, n, B, R)
        return state + self.neighbor_projection(values.permute(1, 2, 0, 3).flatten(2))

    def _features(self, state: Tensor) -> Tensor:
        """The input of the heads, (B, n, E), before any block of a code is known.

        Args:
            state: after all layers, (n, B, E).
        """
        # A linear map of another layout would add its bias in another operation, which rounds.
        state = self.norm(state).transpose(0, 1).contiguous()
        return self.hidden(state) if self.config.value_channels > 1 else state

    def _distribution(self, features: Tensor, channel: int) -> Categorical | LowRankCategorical:
        """That of one block of the codes."""
        if self.config.value_channels == 1:
            return self.logits(features)
        heads = [self.logits, *self.later_logits]
        return heads[channel](F.silu(features))

    def _with_value(self, features: Tensor, values: Tensor, channel: int) -> Tensor:
        """The features for the next block, given the values (B, n) of this one."""
        if channel + 1 == self.config.value_channels:
            return features
        return features + self.block_embeddings[channel](values)


# The decoder of each type; "auxiliary" has none beside the auxiliary decoder.
DECODERS: dict[str, type[Decoder]] = {
    "conv": GroupDecoder,
    "causal_lm": RasterDecoder,
    "transformer": TransformerDecoder,
}


def make_decoder(config: ProgressiveVAELevelConfig) -> Decoder | None:
    decoder = DECODERS.get(config.decoder_type)
    return None if decoder is None else decoder(config)
