"""A causal network of transformers over a sequence of symbols: step by step with its key-value
cache, all steps in one pass, and the check that both say the same."""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .distributions import Categorical, LowRankCategorical
from .orderings import StepFn, WalkStep, call_step_fn

NUM_CHECKED = 8  # symbols by which a network is found causal or not


class CausalLMMixin:
    """`∏_t P(token_t | context, tokens before it)`, for whoever has a causal network `backbone`.

    Who inherits says what the network is given and how its output is read:

    - `_inputs(context, before, start)` -> keywords of the backbone, (B, n, ...), for n steps from
      `start` on. The context has a row for each example. `before` are the tokens before these
      steps, int64 (B, n), or (B, n − 1) from step 0 on, as there is none before it.
    - `_read(output)` -> the distributions of the n tokens.
    """

    backbone: nn.Module

    def _inputs(self, context: Tensor, before: Tensor, start: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _read(self, output: ModelOutput) -> Categorical | LowRankCategorical:
        raise NotImplementedError

    def _steps(self, context: Tensor, length: int, choose: StepFn) -> Tensor:
        """The chosen tokens, int64 (B, length)."""
        positions = torch.arange(length, device=context.device)
        before, known, tokens = positions.new_zeros(len(context), 0), None, []
        for step, position in enumerate(positions.split(1)):
            inputs = self._inputs(context, before, step)
            output, known = cached_step(self.backbone, known, **inputs)
            before = call_step_fn(
                choose, self._read(output), WalkStep(step, 0, position), len(context)
            )
            tokens.append(before)
        return torch.cat(tokens, 1)

    def _teacher_forced_log_prob(
        self, context: Tensor, tokens: Tensor, **asked: bool | None
    ) -> tuple[Tensor, ModelOutput]:
        """Nats of the tokens (B, L), (B,), and the output of the backbone that gives them."""
        inputs = self._inputs(context, tokens[:, :-1], 0)
        output = self.backbone(**inputs, use_cache=False, **asked)
        return self._read(output).log_prob(tokens).sum(1), output

    @torch.no_grad()
    def _check_causal(self, context: Tensor, tokens: Tensor):
        """Raise a `ValueError` unless the backbone says of a symbol, step by step with its cache,
        what it says in one pass over all of them: only then can its bits be believed."""
        kind = type(self.backbone.config).__name__
        inputs = self._inputs(context, tokens[:, :-1], 0)
        # What it says is its output, not what is read there, which may start at zero.
        at_once, known, steps = self.backbone(**inputs, use_cache=False)[0], None, []
        for step in range(tokens.shape[1]):
            one = {name: value[:, step : step + 1] for name, value in inputs.items()}
            output, known = cached_step(self.backbone, known, **one)
            self._read(output)
            steps.append(output[0])
        difference = (torch.cat(steps, 1) - at_once).abs().max()
        if not difference <= 1e-3 * at_once.abs().max():
            raise ValueError(
                f"expected backbone_config of a causal language model, got {kind}, whose logits "
                f"differ by {difference.item():.2g} when the codes that follow are known"
            )


@cache
def _cache_name(forward: Callable) -> str:
    """What a causal model calls its key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cached_step(backbone: nn.Module, known, **inputs: Tensor):
    """One step of a causal model of transformers.

    Args:
        known: the key-value cache of the steps before, `None` at first.
        inputs: `input_ids`, int64 (B, 1), or `inputs_embeds`, (B, 1, width).

    Returns:
        The model's output, and the cache that knows this step too.
    """
    name = _cache_name(type(backbone).forward)
    output = backbone(**inputs, **{name: known}, use_cache=True)
    if name not in output:
        raise ValueError(
            "expected backbone_config of a causal language model with a key-value cache, got "
            f"{type(backbone.config).__name__}, which gives {list(output)}"
        )
    return output, output[name]
