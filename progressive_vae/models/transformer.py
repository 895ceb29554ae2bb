"""A transformer over positions that are decoded in groups, with a static key-value cache.

A position has a key and a value twice. Those of its state are for its own group, whose positions
are decoded at the same time; those of its state and its decoded value are for later groups:

    queries, undecoded = layer.project(state)
    decoded = layer.project_decoded(state, embedded value)

So a position passes through the layers once, with teacher forcing as in sampling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .device_constant import device_constant
from .layers import ResidualLinear
from .orderings import group_positions

MLP_RATIO = 2  # of the gated hidden layer's width to that of the states


class SlicedLinear(nn.Linear):
    """A linear map without bias, of which a call can leave out the first outputs."""

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        return F.linear(x, self.weight[start:])


class TransformerLayer(GradientCheckpointingLayer):
    """Attention and a gated feed-forward network (SwiGLU, Shazeer 2020), each after a norm.

    It is the identity at initialization. With gradient checkpointing the backward pass computes the
    activations again.

    Shape letters: n positions of width E, in `num_heads` heads of width D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        # About one head for 32 channels; their number has to divide the width.
        self.num_heads = max(n for n in range(1, width // 32 + 2) if width % n == 0)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = SlicedLinear(width, 3 * width, bias=False)
        self.output = ResidualLinear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 2 * MLP_RATIO * width, bias=False)
        self.down = ResidualLinear(MLP_RATIO * width, width, bias=False)

    def forward(self, state: Tensor, embedded: Tensor, mask: Tensor) -> Tensor:
        """The states of all L positions after this layer, with teacher forcing: (B, L, E).

        Args:
            state: (B, L, E).
            embedded: the embedded values of all positions, (B, L, E).
            mask: `attention_mask`, (L, 2L).
        """
        queries, undecoded = self.project(state)
        decoded = self.project_decoded(state, embedded)
        return self.attend(state, queries, torch.cat([undecoded, decoded], -2), mask)

    def project(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, (B, heads, n, D), with keys and values before decoding, (2, B, heads, n, D)."""
        qkv = self._split_heads(self.qkv(self.attention_norm(state)))
        return qkv[0], qkv[1:]

    def project_decoded(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Keys and values of decoded positions, (2, B, heads, n, D)."""
        x = self.attention_norm(state + embedded)
        return self._split_heads(self.qkv(x, start=self.width))  # without queries

    def attend(
        self, state: Tensor, queries: Tensor, keys_and_values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The states of n positions after this layer, which see m others: (B, n, E).

        Args:
            state: (B, n, E).
            queries: (B, heads, n, D).
            keys_and_values: (2, B, heads, m, D).
            mask: which of these each position sees, bool (n, m); `None`: all.
        """
        keys, values = keys_and_values
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask)  # (B, heads, n, D)
        state = state + self.output(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(state)).chunk(2, -1)
        return state + self.down(F.silu(gate) * up)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, n, k·E) -> (k, B, heads, n, D)."""
        return x.unflatten(-1, (-1, self.num_heads, self.width // self.num_heads)).permute(
            2, 0, 3, 1, 4
        )


class KeyValueCache:
    """The keys and values of one layer at L positions, in the sequence of decoding."""

    def __init__(self, length: int):
        self.length = length
        self.slots: Tensor | None = None  # (2, B, heads, L, D)

    def write(self, keys_and_values: Tensor, start: int) -> Tensor:
        """Write those of n positions, (2, B, heads, n, D), from `start` on.

        Returns:
            those of all positions up to these, (2, B, heads, start + n, D).
        """
        if self.slots is None:
            *shape, _, dim = keys_and_values.shape
            self.slots = keys_and_values.new_zeros(*shape, self.length, dim)
        stop = start + keys_and_values.shape[-2]
        if torch.is_grad_enabled():  # the backward pass reads what was in the slots before
            self.slots = self.slots.slice_scatter(keys_and_values, -2, start, stop)
        else:
            self.slots[..., start:stop, :] = keys_and_values
        return self.slots[..., :stop, :]


@device_constant
def attention_mask(
    ordering: str, num_groups: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """What each of L positions sees, bool (L, 2L): keys and values before decoding of its own
    group, then those after decoding of earlier groups."""
    group_of = torch.empty(size[0] * size[1], dtype=torch.long)
    for i, positions in enumerate(group_positions(ordering, num_groups, size, torch.device("cpu"))):
        group_of[positions] = i
    own = group_of[:, None]
    return torch.cat([group_of == own, group_of < own], 1).to(device)
