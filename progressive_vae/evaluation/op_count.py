"""Count the operations that would launch kernels on a GPU, and what would make the host wait."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..configuration import validation
from ..configuration.level import MANY_CODES
from ..models import conditioning, distributions, value_types
from ..models.decoders import GroupDecoder

FREE = set(
    """
    _reshape_alias _unsafe_view alias detach empty empty_like empty_strided lift_fresh new_empty
    new_empty_strided set_ _record_function_enter_new _record_function_exit
    """.split()
)
# They read numbers from the device, or return shapes that depend on values.
WAITS = set("_local_scalar_dense _unique2 bincount equal is_nonzero masked_select nonzero".split())


class OpCount(TorchDispatchMode):
    """Counts on a CPU, by name: `ops` without views, and `waits`. A list of tensors counts once."""

    def __init__(self):
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def num_ops(self) -> int:
        return self.ops.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        is_view = bool(returns) and all(
            value.alias_info is not None and not value.alias_info.is_write for value in returns
        )
        is_masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if is_masked or name in WAITS:
            self.waits[name] += 1
        if not (is_view or name in FREE or name == "_local_scalar_dense"):
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def count_ops(function: Callable[[], object], num_warmups: int = 1) -> OpCount:
    """The operations of one call, after others that fill caches."""
    for _ in range(num_warmups):
        function()
    with OpCount() as count:
        function()
    return count


def compiled_kernels(function: Callable[[], object]) -> Counter[str]:
    """The kernels of one call, by name, of which inductor compiles parts: fused kernels are
    "fused", other names are those of torch's operations."""
    from torch._inductor.utils import run_and_get_code  # loads the compiler

    torch.compiler.reset()
    _, sources = run_and_get_code(function)
    kernels: Counter[str] = Counter()
    for source in sources:
        calls = source[source.rindex("def call(") :]
        for name in re.findall(r"(?:extern_kernels|ops\.aten)\.(\w+)[.\w]*\(|fused_\w+\(", calls):
            kernels[name or "fused"] += 1
    return kernels


@torch.library.custom_op("progressive_vae::rms_norm", mutates_args=())
def rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` as one operation, which it is on an accelerator; on a CPU it is six."""
    return torch.rms_norm(x, normalized_shape, weight, eps)


@contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Tensors on the CPU take the branches of those on an accelerator: likelihood in one pass for
    all groups, samples of mixtures in few rounds, and no check that reads values."""
    log_prob = GroupDecoder.log_prob

    def log_prob_in_one_pass(decoder, condition, finer):
        has_many_codes = decoder.config.num_values > MANY_CODES
        one = log_prob if has_many_codes else GroupDecoder.log_prob_of_all_groups
        return one(decoder, condition, finer)

    with ExitStack() as patches:
        patches.enter_context(patch.object(GroupDecoder, "log_prob", log_prob_in_one_pass))
        limit = distributions.MAX_POSITIONS
        patches.enter_context(patch.object(distributions, "MAX_POSITIONS_ON_CPU", limit))
        patches.enter_context(patch.object(F, "rms_norm", rms_norm))
        for module in (validation, value_types, conditioning):
            patches.enter_context(patch.object(module, "has_readable_values", lambda tensor: False))
        yield
