"""A transformer over positions that are decoded in groups, with a static key-value cache.

A position passes through the layers before its value is decoded. Then later groups attend to it, by
keys and values of its states with the embedded value:

    next_state = layer.attend(state, visible)
    visible += layer.project_visible(state + embedded value)

So each position costs one pass, in sampling as with teacher forcing. Its own group, whose positions
are decoded at the same time, is invisible to it. z is always visible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .device_constant import device_constant
from .layers import ResidualLinear
from .orderings import group_positions

MLP_RATIO = 2  # of the gated hidden layer's width to that of the states
MIN_HEAD_DIM = 16
NUM_HEADS = 8  # more, of 64 channels each, in layers of more than 512 channels


def num_heads(width: int) -> int:
    """Attention heads of a layer of this width."""
    return max(
        n
        for n in range(1, max(NUM_HEADS, width // 64) + 1)
        if width % n == 0 and (n == 1 or width >= MIN_HEAD_DIM * n)
    )


class TransformerLayer(GradientCheckpointingLayer):
    """Attention and a gated feed-forward network (SwiGLU, Shazeer 2020), each after a norm.

    It is the identity at initialization. With gradient checkpointing the backward pass computes the
    activations again.

    Shape letters: n positions of width E, which attend to m visible ones, in heads of width D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = num_heads(width)
        self.attention_norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, width, bias=False)
        self.keys_and_values = nn.Linear(width, 2 * width, bias=False)
        self.output = ResidualLinear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 2 * MLP_RATIO * width, bias=False)
        self.down = ResidualLinear(MLP_RATIO * width, width, bias=False)

    def forward(self, state: Tensor, embedded: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """The states of all L positions after this layer, with teacher forcing: (B, L, E).

        Args:
            state: (B, L, E).
            embedded: the embedded values of all positions, (B, L, E).
            z: the states of the coarser grid, (B, h·w, E).
            mask: `attention_mask`, (L, h·w + L).
        """
        visible = self.project_visible(torch.cat([z, state + embedded], 1))
        return self.attend(state, visible, mask)

    def project_visible(self, state: Tensor) -> Tensor:
        """Keys and values of states (B, m, E): (2, B, heads, m, D)."""
        visible = self.keys_and_values(self.attention_norm(state))
        return visible.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, state: Tensor, visible: Tensor, mask: Tensor | None = None) -> Tensor:
        """The states of n positions after this layer, (B, n, E).

        Args:
            state: (B, n, E).
            visible: keys and values of what they attend to, (2, B, heads, m, D).
            mask: which of these each position sees, bool (n, m); `None`: all.
        """
        queries = self.queries(self.attention_norm(state))
        queries = queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = visible.unbind()
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask)  # (B, heads, n, D)
        state = state + self.output(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(state)).chunk(2, -1)
        return state + self.down(F.silu(gate) * up)


class KeyValueCache:
    """Keys and values of one layer, allocated once for `length` positions.

    Args:
        visible: the first ones, (2, B, heads, m, D).
    """

    def __init__(self, visible: Tensor, length: int):
        self.count = 0
        shape = (*visible.shape[:-2], length, visible.shape[-1])
        self.slots = visible.new_empty(shape)  # (2, B, heads, length, D)
        self.append(visible)

    @property
    def visible(self) -> Tensor:
        """All keys and values so far, (2, B, heads, m, D)."""
        return self.slots.narrow(-2, 0, self.count)

    def append(self, visible: Tensor):
        """Add keys and values, (2, B, heads, n, D)."""
        start = self.count
        self.count += visible.shape[-2]
        if torch.is_grad_enabled():  # the backward pass reads the earlier slots
            self.slots = self.slots.slice_scatter(visible, -2, start, self.count)
        else:
            self.slots[..., start : self.count, :] = visible


@device_constant
def attention_mask(
    ordering: str, num_groups: int, size: tuple[int, int], z_length: int, device: torch.device
) -> Tensor:
    """What each of L positions sees, bool (L, h·w + L): z, and the positions of earlier groups."""
    cpu = torch.device("cpu")
    group_of = torch.empty(size[0] * size[1], dtype=torch.long)
    for i, positions in enumerate(group_positions(ordering, num_groups, size, cpu)):
        group_of[positions] = i
    is_earlier = group_of < group_of[:, None]
    return F.pad(is_earlier, (z_length, 0), value=True).to(device)
