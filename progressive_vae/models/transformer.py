"""A transformer over positions that are decoded in groups, with a static key-value cache.

A position passes through the layers before its value is decoded. Then later groups attend to it, by
keys and values of its states with the embedded value:

    next_state = layer.attend(state, visible)
    visible += layer.project_visible(state + embedded value)

So each position costs one pass, in sampling as with teacher forcing. Its own group, whose positions
are decoded at the same time, is invisible to it. z is always visible.

Sequences come first in all shapes, (L, B, E). So each part of a concatenation is contiguous, and
one norm serves queries, keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .device_constant import device_constant
from .layers import ResidualLinear
from .orderings import group_positions

MLP_RATIO = 2  # of the gated hidden layer's width to that of the states
NUM_NEIGHBORS = 8  # of a position
NEIGHBOR_RATIO = 4  # of the width of states to that of a neighbor's value
NUM_HEADS = 8  # more, of 64 channels each, in layers of more than 512 channels


def num_heads(width: int, min_head_dim: int) -> int:
    """Attention heads of a layer of this width, of `min_head_dim` channels at least."""
    return max(
        n
        for n in range(1, max(NUM_HEADS, width // 64) + 1)
        if width % n == 0 and (n == 1 or width >= min_head_dim * n)
    )


class TransformerLayer(GradientCheckpointingLayer):
    """Attention and a gated feed-forward network (SwiGLU, Shazeer 2020), each after a norm.

    It is the identity at initialization. With gradient checkpointing the backward pass computes the
    activations again.

    Shape letters: n positions of width E, which attend to m visible ones, in heads of width D.

    Args:
        width: E.
        min_head_dim: the least D.
        dropout: probability of a 0 in what a branch adds to the states, in training.
    """

    def __init__(self, width: int, min_head_dim: int = 32, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.num_heads = num_heads(width, min_head_dim)
        self.attention_norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, width, bias=False)
        self.keys_and_values = nn.Linear(width, 2 * width, bias=False)
        self.output = ResidualLinear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 2 * MLP_RATIO * width, bias=False)
        self.down = ResidualLinear(MLP_RATIO * width, width, bias=False)

    def forward(self, state: Tensor, embedded: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """The states of all L positions after this layer, with teacher forcing: (L, B, E).

        Args:
            state: (L, B, E).
            embedded: the embedded values of all positions, (L, B, E).
            z: the states of the coarser grid, (h·w, B, E).
            mask: `attention_mask`, (L, h·w + L).
        """
        normed = self.attention_norm(torch.cat([state, z, state + embedded]))
        queries, visible = normed.tensor_split([len(state)])
        return self._add_branches(state, queries, self.keys_and_values(visible), mask)

    def project_visible(self, state: Tensor) -> Tensor:
        """Keys and values of states (m, B, E): (m, B, 2·E)."""
        return self.keys_and_values(self.attention_norm(state))

    def attend(self, state: Tensor, visible: Tensor) -> Tensor:
        """The states of n positions after this layer, (n, B, E).

        Args:
            state: (n, B, E).
            visible: keys and values of what they attend to, (m, B, 2·E).
        """
        return self._add_branches(state, self.attention_norm(state), visible)

    def _add_branches(
        self, state: Tensor, normed: Tensor, visible: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The states after attention and the feed-forward network.

        Args:
            state, normed: before and after the norm, (n, B, E).
            visible: (m, B, 2·E).
            mask: what each position sees, bool (n, m); `None`: all.
        """
        queries = self._split_heads(self.queries(normed))
        keys, values = map(self._split_heads, visible.chunk(2, -1))
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask)  # (B, heads, n, D)
        attended = self.output(mixed.permute(2, 0, 1, 3).flatten(2))
        state = state + F.dropout(attended, self.dropout, self.training)
        gate, up = self.gate_up(self.mlp_norm(state)).chunk(2, -1)
        return state + F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(n, B, E) -> (B, heads, n, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)


class KeyValueCache:
    """Keys and values of one layer, allocated once for `length` positions.

    Args:
        visible: the first ones, (m, B, 2·E).
    """

    def __init__(self, visible: Tensor, length: int):
        self.count = 0
        self.slots = visible.new_empty(length, *visible.shape[1:])  # (length, B, 2·E)
        self.append(visible)

    @property
    def visible(self) -> Tensor:
        """All keys and values so far, (m, B, 2·E)."""
        return self.slots[: self.count]

    def append(self, visible: Tensor):
        """Add keys and values, (n, B, 2·E)."""
        start = self.count
        self.count += len(visible)
        if torch.is_grad_enabled():  # the backward pass reads the earlier slots
            self.slots = self.slots.slice_scatter(visible, 0, start, self.count)
        else:
            self.slots[start : self.count] = visible


@device_constant
def attention_mask(
    ordering: str, num_groups: int, size: tuple[int, int], z_length: int, device: torch.device
) -> Tensor:
    """What each of L positions sees, bool (L, h·w + L): z, and the positions of earlier groups."""
    group_of = _group_of_each(ordering, num_groups, size)
    is_earlier = group_of < group_of[:, None]
    return F.pad(is_earlier, (z_length, 0), value=True).to(device)


@device_constant
def earlier_neighbors(
    ordering: str, num_groups: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """The neighbors of each of L positions in earlier groups: row-major indices, int64 (8, L).

    They are the eight around it, at the distance 1, or at the least power of 2 where one of them is
    decoded earlier. The index of others is L.
    """
    height, width = size
    length = height * width
    group_of = _group_of_each(ordering, num_groups, size)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T  # (2, L)
    neighbors = torch.full((NUM_NEIGHBORS, length), length)
    distance = 1
    while distance < max(size):
        steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
        shifted = torch.tensor(steps)[..., None] * distance + places
        is_inside = ((shifted >= 0) & (shifted < torch.tensor(size)[:, None])).all(1)
        indices = (shifted[:, 0] * width + shifted[:, 1]).where(is_inside, 0)
        is_earlier = is_inside & (group_of[indices] < group_of)
        has_none = (neighbors == length).all(0)
        neighbors = torch.where(is_earlier & has_none, indices, neighbors)
        distance *= 2
    return neighbors.to(device)


def _group_of_each(ordering: str, num_groups: int, size: tuple[int, int]) -> Tensor:
    """The group of each of L positions, int64 (L,)."""
    group_of = torch.empty(size[0] * size[1], dtype=torch.long)
    for i, positions in enumerate(group_positions(ordering, num_groups, size, group_of.device)):
        group_of[positions] = i
    return group_of
