"""Steps of a small causal language model of transformers in few operations: OPT and Llama.

A step computes what the model's own forward does with a key-value cache, up to rounding. Queries,
keys and values come from one product, and are written where the cache keeps them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.opt.modeling_opt import OPTForCausalLM, OPTModel
from transformers.utils import ModelOutput


class _Layer(NamedTuple):
    """One layer; `qkv` has weight and bias of the product for queries, keys and values."""

    norm: Callable[[Tensor], Tensor]
    qkv: tuple[Tensor, Tensor | None]
    num_heads: int
    scale: float
    output: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


class FusedSteps:
    """The steps of one sequence of `length` tokens, called one after the other.

    A call takes `input_ids`, int64 (B, 1), or `inputs_embeds`, (B, 1, width), and returns the
    output of the backbone: logits, or the last hidden state if it has no head.

    Args:
        backbone: one that `can_fuse`. Its weights are read here, so they must not change later.
    """

    def __init__(self, backbone: nn.Module, length: int):
        model: Any = getattr(backbone, "model", backbone)
        self.length = length
        self.head = getattr(backbone, "lm_head", None)
        self.embed = model.get_input_embeddings()
        if isinstance(model, OPTModel):
            decoder = model.decoder
            self.layers = [_opt_layer(layer) for layer in decoder.layers]
            self.positions: Tensor | None = decoder.embed_positions.weight[
                decoder.embed_positions.offset :
            ]
            self.rotary: tuple[Tensor, Tensor] | None = None
            self.norm: Callable[[Tensor], Tensor] = decoder.final_layer_norm
        else:
            self.layers = [_llama_layer(layer) for layer in model.layers]
            self.positions = None
            position_ids = torch.arange(length, device=self.embed.weight.device)[None]
            self.rotary = _rotary_tables(*model.rotary_emb(self.embed.weight, position_ids))
            self.norm = _rms_norm(model.norm)
        self.caches: list[Tensor] = []  # q, k and v of each layer, (L, B, 3, heads, D)
        self.step = 0

    def __call__(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> ModelOutput:
        state = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, 1, width)
        t = self.step
        self.step += 1
        if self.positions is not None:
            state = state + self.positions[t]
        for i, layer in enumerate(self.layers):
            x = layer.norm(state)[:, 0]  # (B, width)
            weight, bias = layer.qkv
            if i == len(self.caches):
                dim = len(weight) // (3 * layer.num_heads)
                self.caches.append(x.new_empty(self.length, len(x), 3, layer.num_heads, dim))
            qkv = self.caches[i][t]  # (B, 3, heads, D)
            if self.rotary is not None:
                straight = F.linear(x, weight, bias).view_as(qkv)
                cos, sin = (table[t] for table in self.rotary)
                torch.addcmul(straight * cos, _swap_halves(straight), sin, out=qkv)
            elif bias is not None:
                torch.addmm(bias, x, weight.T, out=qkv.flatten(1))
            else:
                torch.mm(x, weight.T, out=qkv.flatten(1))
            # (B, heads, t + 1, D) each
            queries, keys, values = self.caches[i][: t + 1].permute(2, 1, 3, 0, 4)
            mixed = F.scaled_dot_product_attention(
                queries[..., t:, :], keys, values, scale=layer.scale
            )
            state = state + layer.output(mixed.transpose(1, 2).flatten(2))
            state = state + layer.mlp(layer.mlp_norm(state))
        state = self.norm(state)
        if self.head is None:
            return BaseModelOutput(last_hidden_state=state)
        return CausalLMOutput(logits=self.head(state))


def can_fuse(backbone: nn.Module) -> bool:
    """Return whether `FusedSteps` computes what the backbone's own steps do: an OPT or Llama of
    the usual structure in evaluation mode, of plain modules and weights, without hooks."""
    model: Any = getattr(backbone, "model", backbone)
    if type(backbone) not in (OPTForCausalLM, OPTModel, LlamaForCausalLM, LlamaModel):
        return False
    config = model.config
    if isinstance(model, OPTModel):
        decoder = model.decoder
        is_usual = config.do_layer_norm_before and decoder.final_layer_norm is not None
        is_usual = is_usual and decoder.project_in is None
    else:
        is_usual = config.num_key_value_heads == config.num_attention_heads
        is_usual = is_usual and getattr(model.rotary_emb, "rope_type", None) == "default"
    if not is_usual or config._attn_implementation != "sdpa":
        return False
    if torch.is_grad_enabled() or backbone.training:  # the cache is written in place; dropout
        return False
    parameters = [*backbone.parameters()]
    device = parameters[0].device
    return all(map(_is_plain, backbone.modules())) and all(
        type(parameter) is nn.Parameter and parameter.device == device != torch.device("meta")
        for parameter in parameters
    )


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is of a library, and nobody replaced or hooked its forward."""
    is_of_library = type(module).__module__.startswith(("torch.nn.modules.", "transformers."))
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return is_of_library and not has_hooks and "forward" not in vars(module)


def _opt_layer(layer: Any) -> _Layer:
    attention = layer.self_attn
    return _Layer(
        layer.self_attn_layer_norm,
        _qkv(attention),
        attention.num_heads,
        attention.scaling,
        attention.out_proj,
        layer.final_layer_norm,
        nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2),
    )


def _llama_layer(layer: Any) -> _Layer:
    attention = layer.self_attn
    return _Layer(
        _rms_norm(layer.input_layernorm),
        _qkv(attention),
        attention.config.num_attention_heads,
        attention.scaling,
        attention.o_proj,
        _rms_norm(layer.post_attention_layernorm),
        layer.mlp,
    )


def _qkv(attention: Any) -> tuple[Tensor, Tensor | None]:
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    weight = torch.cat([linear.weight for linear in linears])
    return weight, torch.cat(biases) if biases else None


def _rms_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    shape = norm.weight.shape
    return partial(
        F.rms_norm, normalized_shape=shape, weight=norm.weight, eps=norm.variance_epsilon
    )


def _rotary_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of qkv and of qkv with swapped halves, (L, 3, 1, D) each, from cos and sin
    (1, L, D): the halves are the coordinates of each plane, and values do not rotate."""
    first, second = sin.chunk(2, -1)
    sin = torch.cat([-first, second], -1)
    cos = torch.cat([cos, cos, torch.ones_like(cos)])  # (3, L, D)
    sin = torch.cat([sin, sin, torch.zeros_like(sin)])
    return cos.movedim(0, 1)[:, :, None], sin.movedim(0, 1)[:, :, None]


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1)
