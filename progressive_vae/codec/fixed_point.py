"""Arithmetic that comes to the same on every machine: networks computed in whole numbers.

What a sum of floating-point numbers comes to depends on the order in which a machine adds them
up, and so on its kind, its threads and the size of a batch. A sum of whole numbers below 2⁵³ in
float64 does not: factors of products are rounded to 18 bits first. (Ballé et al. 2019, "Integer
networks for data compression with latent-variable models", do so with 8 bits, for which they
train.) The sum, product or quotient of two numbers and a square root are the same everywhere by
IEEE 754, and exponentials and sines are made of these.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR_BITS = 18  # beside the sign; of more than 2¹⁷ products that are added up fewer
NUMBERS_AT_A_TIME = 2**15  # which a processor keeps at hand
EXACT_BITS = 53  # of whole numbers in float64

# They move, compare or round numbers, or do one thing to two.
EXACT = set(
    """
    _local_scalar_dense _to_copy _unsafe_view abs add alias all amax amin any arange argmax
    as_strided bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_xor cat ceil clamp
    clamp_max clamp_min clone constant_pad_nd copy detach div embedding empty empty_like eq
    equal expand eye fill flip floor full full_like gather ge gt index index_copy index_put
    index_select is_same_size isfinite isnan le lift lift_fresh logical_and logical_not
    logical_or logical_xor lt masked_fill masked_select max maximum min minimum mul ne neg
    new_empty new_full new_ones new_zeros nonzero ones ones_like permute pixel_shuffle
    pixel_unshuffle reciprocal relu remainder repeat roll round rsub scalar_tensor scatter
    select sign slice split split_with_sizes sqrt squeeze stack sub t transpose
    tril triu trunc unbind unfold unsqueeze view where zero zeros zeros_like
    """.split()
)


@contextmanager
def fixed_point_arithmetic() -> Iterator[None]:
    """Operations of torch inside are exact, replaced by exact ones, or a `ValueError`."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Whole():
        yield


class _Whole(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        plain = name.removesuffix("_")
        if plain in REPLACED:
            found = REPLACED[plain](*args, **kwargs)
            return args[0].copy_(found) if name != plain else found
        if plain not in EXACT and name not in EXACT:
            raise ValueError(f"expected networks of operations that can be done in whole numbers, "
                             f"got {name}")  # fmt: skip
        is_scaled = plain in ("add", "sub", "rsub") and (len(args) > 2 or "alpha" in kwargs)
        if is_scaled or kwargs.get("accumulate") or (plain == "index_put" and len(args) > 3):
            raise ValueError(f"expected a plain {name} in whole numbers, got alpha or accumulate")
        if plain == "div" and not isinstance(args[1], Tensor):  # else a GPU takes the reciprocal
            kind = torch.result_type(*args[:2])
            args = (args[0], torch.tensor(args[1], dtype=kind, device=args[0].device))
        return func(*args, **kwargs)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2ᵉ for e from −1022 to 1023, in float64, by its bits."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _whole(x: Tensor, dims: int | list[int], bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of so many bits, and the power of two by which they are x: one for all numbers
    along `dims`."""
    x = x.double()
    exponent = torch.frexp(x.abs().amax(dims, keepdim=True))[1]
    return (x * _power_of_two(bits - exponent)).round(), _power_of_two(exponent - bits)


# ---- sums ----------------------------------------------------------------------------------------


def _factor_bits(count: int) -> int:
    """Of factors of so many products, whose sum has to be exact."""
    return min(FACTOR_BITS, (EXACT_BITS - count.bit_length()) // 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(…, m, k) times (…, k, n), in float64."""
    bits = _factor_bits(a.shape[-1])
    rows, row_scale = _whole(a, -1, bits)
    columns, column_scale = _whole(b, -2, bits)
    return (rows @ columns) * (row_scale * column_scale)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b).to(a.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    return (_product(a, b) * alpha + bias.double() * beta).to(a.dtype)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """By products of matrices, which libraries of convolutions may leave for other ways."""
    if transposed or groups != 1 or weight.ndim != 4:
        raise ValueError("expected plain convolutions of pictures in whole numbers, got others")
    bits = _factor_bits(weight[0].numel())
    images, image_scale = _whole(x, [1, 2, 3], bits)
    kernels, kernel_scale = _whole(weight, [1, 2, 3], bits)
    with torch.backends.cudnn.flags(enabled=False):
        found = conv2d(images, kernels, None, stride, padding, dilation)
    found = found * (image_scale * kernel_scale.view(1, -1, 1, 1))
    found = found if bias is None else found + bias.double()[:, None, None]
    return found.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _terms(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Whole numbers that add up exactly along `dims`, and their scale."""
    count = math.prod(x.shape[dim] for dim in dims)
    return _whole(x, dims, min(EXACT_BITS - 18, EXACT_BITS - count.bit_length()))


def _sum(x: Tensor, dim=None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    dims = list(range(x.ndim)) if dim is None else dim
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not x.is_floating_point():
        return x.sum(dims, keepdim, dtype=dtype)
    terms, scale = _terms(x, dims)
    total = terms.sum(dims, keepdim=True) * scale
    return (total if keepdim else total.squeeze(dims)).to(dtype or x.dtype)


def _mean(x: Tensor, dim=None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    total = _sum(x.double(), dim, keepdim)
    count = x.numel() // max(1, total.numel())
    return (total / torch.full_like(total, count)).to(dtype or x.dtype)


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if not x.is_floating_point():
        return x.cumsum(dim, dtype=dtype)
    terms, scale = _terms(x, [dim])
    return (terms.cumsum(dim) * scale).to(dtype or x.dtype)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    mean = _mean(x.double(), dims, True)
    away = x.double() - mean
    inverse = 1 / (_mean(away * away, dims, True) + eps).sqrt()
    found = away * inverse
    found = found if weight is None else found * weight.double()
    found = found if bias is None else found + bias.double()
    return found.to(x.dtype), mean.to(x.dtype), inverse.to(x.dtype)


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    high = x.double().amax(dim, keepdim=True)
    masses = exp(torch.where(high == -math.inf, 0.0, x.double() - high))
    found = masses / _sum(masses, dim, True)
    return found.to(torch.float32 if half_to_float else x.dtype)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    away = x.double() - x.double().amax(dim, keepdim=True)
    found = away - log(_sum(exp(away), dim, True))
    return found.to(torch.float32 if half_to_float else x.dtype)


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    nothing = (x == -math.inf).all(dim, keepdim=True)
    return _softmax(x, dim).masked_fill(nothing, 0.0).to(dtype or x.dtype)


# ---- functions of one number, in float64 ---------------------------------------------------------

LN_2 = (float.fromhex("0x1.62e42fefa0000p-1"), float.fromhex("0x1.cf79abc9e3b3ap-40"))
HALF_PI = (float.fromhex("0x1.921fb54440000p+0"), float.fromhex("0x1.68c234c4c6628p-39"))


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """The highest power's coefficient comes first."""
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(x).add_(coefficient)  # in two steps, lest a machine makes one of them
    return total


def exp(x: Tensor) -> Tensor:
    """By Taylor's series of degree 10 between −½ ln 2 and ½ ln 2: right to 12 digits."""
    found = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    parts = x.flatten().split(NUMBERS_AT_A_TIME)
    for part, into in zip(parts, found.view(-1).split(NUMBERS_AT_A_TIME), strict=True):
        kept = part.double().clamp(-708, 709)
        power = (kept * (1 / (LN_2[0] + LN_2[1]))).round_()
        rest = kept.sub_(power * LN_2[0]).sub_(power * LN_2[1])
        series = _polynomial(rest, [1 / math.factorial(n) for n in range(10, -1, -1)])
        into.copy_(series.mul_(_power_of_two(power)).masked_fill_(part < -708, 0.0))
    return found


def log(x: Tensor) -> Tensor:
    """By the series of artanh, of numbers between √½ and √2."""
    fraction, power = torch.frexp(x.double())
    is_low = fraction < 0.5**0.5
    fraction, power = torch.where(is_low, 2 * fraction, fraction), (power - is_low.int()).double()
    ratio = (fraction - 1) / (fraction + 1)
    series = _polynomial(ratio * ratio, [2 / (2 * n + 1) for n in range(10, -1, -1)])
    found = power * LN_2[0] + (power * LN_2[1] + ratio * series)
    return torch.where(x == 0, -math.inf, torch.where(x < 0, math.nan, found))


def _sine(x: Tensor, quarters: int) -> Tensor:
    """sin(x + quarters · π/2), by Taylor's series between −π/4 and π/4."""
    quarter = (x * (1 / (HALF_PI[0] + HALF_PI[1]))).round()
    rest = x - quarter * HALF_PI[0]
    rest = rest - quarter * HALF_PI[1]
    square = rest * rest
    sine = rest * _polynomial(
        square, [(-1) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1)]
    )
    cosine = _polynomial(square, [(-1) ** n / math.factorial(2 * n) for n in range(8, -1, -1)])
    turn = (quarter.long() + quarters) % 4
    found = torch.where(turn % 2 == 0, sine, cosine)
    return torch.where(turn >= 2, -found, found)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


def _sinh(x: Tensor) -> Tensor:
    high = exp(x)
    return (high - 1 / high) * 0.5


def _power(x: Tensor, exponent: float) -> Tensor:
    if isinstance(exponent, Tensor) or exponent not in (2, 3, 4):
        raise ValueError(f"expected powers of 2 to 4 in whole numbers, got {exponent}")
    found = x
    for _ in range(int(exponent) - 1):
        found = found * x
    return found


def _of_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(x: Tensor, *more: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(f"expected functions of tensors in whole numbers, got one of {x}")
        return function(x.double(), *more).to(x.dtype)

    return replaced


REPLACED: dict[str, Callable] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "convolution": _convolution,
    "sum": _sum,
    "mean": _mean,
    "cumsum": _cumsum,
    "native_layer_norm": _layer_norm,
    "_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "_log_softmax": _log_softmax,
    "addcmul": lambda x, a, b, *, value=1: x + a * b * value,
    "exp": _of_one(exp),
    "log": _of_one(log),
    "sin": _of_one(lambda x: _sine(x, 0)),
    "cos": _of_one(lambda x: _sine(x, 1)),
    "sigmoid": _of_one(_sigmoid),
    "silu": _of_one(lambda x: x * _sigmoid(x)),
    "tanh": _of_one(lambda x: 1 - 2 / (exp(2 * x) + 1)),
    "sinh": _of_one(_sinh),
    "rsqrt": _of_one(lambda x: 1 / x.sqrt()),
    "pow": _of_one(_power),
}
