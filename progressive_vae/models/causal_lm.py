"""Autoregressive models over a sequence of codes, with a causal language model of transformers.

The token-by-token loop uses the model's key-value cache; likelihood takes one pass over all tokens;
a check compares the two.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .distributions import Categorical, LowRankCategorical
from .fused_steps import FusedSteps, can_fuse
from .walk import StepFn, WalkStep, call_step_fn

NUM_CHECKED_TOKENS = 8

_needs_own_steps = ContextVar("_needs_own_steps", default=False)


class CausalLMMixin:
    """`∏_t P(token_t | context, earlier tokens)` for modules with a causal network `backbone`.

    Subclasses define the backbone's inputs and how its output is read:

    - `_inputs(context, previous, start)` -> the backbone's keyword arguments, (B, n, ...), for the
      n steps from `start` on. `context` has one row per example. `previous` has the token before
      each of these steps, int64 (B, n); from step 0 on (B, n − 1), as step 0 has none. The inputs
      of step 0 may begin with a prefix of further positions.
    - `_distribution(output)` -> the distributions of the n tokens.
    """

    backbone: nn.Module

    def _inputs(self, context: Tensor, previous: Tensor, start: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _distribution(self, output: ModelOutput) -> Categorical | LowRankCategorical:
        raise NotImplementedError

    def _generate(self, context: Tensor, length: int, step_fn: StepFn) -> Tensor:
        """Run the autoregressive loop with a key-value cache: the tokens, int64 (B, length)."""
        positions = torch.arange(length, device=context.device)
        previous = positions.new_zeros(len(context), 0)
        inputs = self._inputs(context, previous, 0)
        run_step = _steps(self.backbone, length - 1 + _num_positions(inputs))
        tokens = []
        for t, position in enumerate(positions.split(1)):
            if t:
                inputs = self._inputs(context, previous, t)
            *_, output = _run_each(run_step, inputs)  # the last position is that of the token
            distribution = self._distribution(output)
            step = WalkStep(t, 0, position)
            previous = call_step_fn(step_fn, distribution, step, len(context))  # (B, 1)
            tokens.append(previous)
        return torch.cat(tokens, 1)

    def _teacher_forced_log_prob(
        self, context: Tensor, tokens: Tensor, **output_flags: bool | None
    ) -> tuple[Tensor, ModelOutput]:
        """One pass over tokens (B, L): their log-probability in nats, (B,), and the output."""
        inputs = self._inputs(context, tokens[:, :-1], 0)
        output = self.backbone(**inputs, use_cache=False, **output_flags)
        return self._distribution(output).log_prob(tokens).sum(1), output

    @torch.no_grad()
    def _check_causal(self, context: Tensor, tokens: Tensor):
        """Compare the backbone's outputs token by token, with its cache, to those of one pass.

        It compares hidden states or logits of the backbone itself, since a layer after it may be
        initialized at zero.

        Raises:
            ValueError: they differ, so the one-pass likelihood depends on later tokens.
        """
        inputs = self._inputs(context, tokens[:, :-1], 0)
        expected = self.backbone(**inputs, use_cache=False)[0]  # (B, L, E)
        outputs = []
        for output in _run_each(_steps(self.backbone, _num_positions(inputs)), inputs):
            self._distribution(output)  # raises if the output lacks what is read from it
            outputs.append(output[0])
        difference = (torch.cat(outputs, 1) - expected).abs().max()
        if not difference <= 1e-3 * expected.abs().max():  # also catches NaN
            raise ValueError(
                "expected backbone_config of a causal language model, got "
                f"{type(self.backbone.config).__name__}, whose outputs differ by "
                f"{difference.item():.2g} when later codes are in the input"
            )


def _num_positions(inputs: dict[str, Tensor]) -> int:
    return next(iter(inputs.values())).shape[1]


def _run_each(
    run_step: Callable[..., ModelOutput], inputs: dict[str, Tensor]
) -> Iterator[ModelOutput]:
    """The output of each position of inputs (B, n, ...), one after the other."""
    for i in range(_num_positions(inputs)):
        yield run_step(**{name: value[:, i : i + 1] for name, value in inputs.items()})


@contextmanager
def transformers_steps() -> Iterator[None]:
    """Backbones run their own forward at each step inside, which rounds as in earlier versions."""
    token = _needs_own_steps.set(True)
    try:
        yield
    finally:
        _needs_own_steps.reset(token)


def _steps(backbone: nn.Module, length: int) -> Callable[..., ModelOutput]:
    """The steps of one sequence of `length` tokens: inputs as of `cached_step` -> the output."""
    # Compiled graphs serve sampling only, and cannot read the variable.
    needs_own_steps = not torch.compiler.is_compiling() and _needs_own_steps.get()
    if not needs_own_steps and can_fuse(backbone):
        return FusedSteps(backbone, length)
    cache = None

    def run_step(**inputs: Tensor) -> ModelOutput:
        nonlocal cache
        output, cache = cached_step(backbone, cache, **inputs)
        return output

    return run_step


@functools.cache
def _cache_argument(forward: Callable) -> str:
    """The argument name of the key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cached_step(backbone: nn.Module, cache, **inputs: Tensor):
    """Run one step of a causal model of transformers.

    Args:
        cache: the key-value cache of the previous steps, `None` at the first.
        inputs: `input_ids`, int64 (B, 1), or `inputs_embeds`, (B, 1, width).

    Returns:
        The model's output, and the cache with this step added.

    Raises:
        ValueError: the model returns no cache.
    """
    name = _cache_argument(type(backbone).forward)
    output = backbone(**inputs, **{name: cache}, use_cache=True)
    if name not in output:
        raise ValueError(
            "expected backbone_config of a causal language model with a key-value cache, got "
            f"{type(backbone.config).__name__}, which returns {list(output)}"
        )
    return output, output[name]
