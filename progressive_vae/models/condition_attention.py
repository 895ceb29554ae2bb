"""Attention to the embeddings of a condition, as of a caption."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import Conditioning
from .layers import ResidualLinear
from .transformer import num_heads

MIN_HEAD_DIM = 16


class ConditionAttention(nn.Module):
    """state + attention of each state to the embeddings of its example's condition.

    It is cross-attention with one residual branch (Vaswani et al. 2017). With learned states it
    turns a sequence of any length into a fixed number of vectors, as the latents of Perceiver
    (Jaegle et al. 2021) and the pooling of the set transformer (Lee et al. 2019).

    It is the identity at initialization, and always for examples without an embedding.

    Args:
        width: E, of the states.
        condition_dim: D, of the embeddings.
    """

    def __init__(self, width: int, condition_dim: int):
        super().__init__()
        self.num_heads = num_heads(width, MIN_HEAD_DIM)
        self.norm = nn.LayerNorm(width)
        self.condition_norm = nn.LayerNorm(condition_dim)
        self.queries = nn.Linear(width, width, bias=False)
        self.keys_and_values = nn.Linear(condition_dim, 2 * width, bias=False)
        self.output = ResidualLinear(width, width, bias=False)

    def forward(self, state: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, n, E) -> (B, n, E)."""
        if conditioning.embeddings is None or conditioning.mask is None:
            return state
        mask = conditioning.mask.to(state.device)  # (B, T)
        # Padding may hold anything, and 0 · NaN is NaN.
        embeddings = conditioning.embeddings.to(state).masked_fill(~mask[..., None], 0)
        queries = self.queries(self.norm(state)).unflatten(-1, (self.num_heads, -1))
        visible = self.keys_and_values(self.condition_norm(embeddings))
        keys, values = visible.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        is_empty = ~mask.any(1, keepdim=True)  # (B, 1)
        # The softmax of an empty row would be NaN, also in the gradient: it sees its padding.
        seen = (mask | is_empty)[:, None, None]
        mixed = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, seen)
        branch = self.output(mixed.transpose(1, 2).flatten(2))
        return torch.where(is_empty[..., None], state, state + branch)
