import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode

from helpers.models import tiny_level
from progressive_vae.training.mixed_precision import Float32Attention, MixedPrecisionForward


@pytest.fixture(autouse=True)
def fresh_state():
    """An accelerator with another precision can be made, before and after a test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class AttentionDtypes(TorchFunctionMode):
    """Collects the dtypes of queries."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder_type", ["transformer", "causal_lm"])
def test_attention_on_a_cpu_is_in_float32(decoder_type):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    level = tiny_level(num_symbols=5, decoder_type=decoder_type)
    finer = torch.randint(5, (2, 4, 4))
    inputs = {"finer": finer, "codes": level.encode(finer)}
    forward = MixedPrecisionForward(level, accelerator.prepare(level), accelerator)
    with AttentionDtypes() as attention:
        forward(**inputs).loss.backward()
    assert attention.dtypes == {torch.float32}
    with AttentionDtypes() as attention, torch.autocast("cpu", torch.bfloat16):
        level(**inputs)
    assert torch.bfloat16 in attention.dtypes  # without it


def test_attention_in_float32_returns_the_dtype_of_its_queries():
    queries, keys, values = torch.randn(3, 2, 4, 5, 8, dtype=torch.bfloat16)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(queries.float(), keys.float(), values.float(), mask)
    with Float32Attention():
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        # Masks that are added are cast too, and names may be given.
        added = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill(~mask, -math.inf)
        named = F.scaled_dot_product_attention(
            query=queries, key=keys, value=values, attn_mask=added
        )
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, expected.bfloat16())
    assert torch.equal(named, mixed)
