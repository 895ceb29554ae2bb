"""Fixed-point arithmetic: networks whose results are the same on every machine.

The result of a floating-point sum depends on the order of its terms, and so on the kind of
processor, the number of threads and the batch size. A sum of integers below 2⁵³ in float64 is
exact: the factors of products are rounded to 18 bits first. (Ballé et al. 2019, "Integer networks
for data compression with latent-variable models", use 8 bits, and train for them.) By IEEE 754 the
sum, product or quotient of two numbers and a square root are the same everywhere. Exponentials and
sines are made of these.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.distributions import IS_LAYOUT_INVARIANT

FACTOR_BITS = 18  # without the sign; fewer for sums of more than 2¹⁷ products
CHUNK_SIZE = 2**16  # numbers that fit into a processor's cache
# Relative difference of `exp` and torch's own function in float64: the 11th term of the series.
ERROR = 4e-13
EXACT_BITS = 53  # of integers in float64
# Of the 64 bits of a number.
_FRACTION_BITS = 52
_EXPONENT = 0x7FF << _FRACTION_BITS
_HALF = 1 << (_FRACTION_BITS - 1)

# Operations that move, compare or round numbers, or combine two of them: exact already.
EXACT_OPERATIONS = set(
    """
    _local_scalar_dense _to_copy _unsafe_view abs add alias all amax amin any arange argmax
    as_strided bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor cat ceil clamp
    clamp_max clamp_min clone constant_pad_nd copy detach div embedding empty empty_like eq
    equal expand eye fill flip floor full full_like gather ge gt index index_copy index_put
    index_select is_same_size isfinite isnan le lift lift_fresh logical_and logical_not
    logical_or logical_xor lt masked_fill masked_select max maximum min minimum mul ne neg
    new_empty new_full new_ones new_zeros nonzero ones ones_like permute pixel_shuffle
    pixel_unshuffle reciprocal relu remainder repeat roll round rsub scalar_tensor scatter
    select sign slice sort split split_with_sizes sqrt squeeze stack sub t topk transpose
    tril triu trunc unbind unfold unsqueeze view where zero zeros zeros_like
    __and__ __lshift__ __or__ __rshift__
    """.split()
)


@contextmanager
def fixed_point_arithmetic(*models: torch.nn.Module) -> Iterator[None]:
    """Torch's operations inside are exact, or replaced by exact ones, or raise a `ValueError`.

    Args:
        models: whose parameters do not change inside: they are rounded once.
    """
    token = _CONSTANTS.set(_Constants(models))
    layout_token = IS_LAYOUT_INVARIANT.set(True)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _FixedPointMode():
            yield
    finally:
        _CONSTANTS.reset(token)
        IS_LAYOUT_INVARIANT.reset(layout_token)


class _FixedPointMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, replacement = _implementation(func)
        if replacement is not None:
            result = replacement(*args, **kwargs)
            return args[0].copy_(result) if name.endswith("_") else result
        return func(*_exact_arguments(name, args, kwargs), **kwargs)


@functools.cache
def _implementation(func: OpOverload) -> tuple[str, Callable | None]:
    """The name of an operation, and what replaces it.

    Raises:
        ValueError: an operation that is neither exact nor has a replacement.
    """
    name = func.overloadpacket.__name__
    plain = name.removesuffix("_")
    if plain not in REPLACEMENTS and plain not in EXACT_OPERATIONS and name not in EXACT_OPERATIONS:
        raise ValueError(
            f"expected networks of operations that fixed-point arithmetic has, got {name}"
        )
    return name, REPLACEMENTS.get(name, REPLACEMENTS.get(plain))


def _exact_arguments(name: str, args: tuple, kwargs: dict) -> tuple:
    """The arguments with which an operation is exact.

    Raises:
        ValueError: there are none.
    """
    plain = name.removesuffix("_")
    is_scaled = plain in ("add", "sub", "rsub") and (len(args) > 2 or "alpha" in kwargs)
    if is_scaled or kwargs.get("accumulate") or (plain == "index_put" and len(args) > 3):
        raise ValueError(f"expected {name} in fixed-point arithmetic without alpha or accumulate")
    if plain == "div" and not isinstance(args[1], Tensor):
        # A GPU would multiply by the reciprocal of a Python number.
        kind = torch.result_type(*args[:2])
        return args[0], torch.tensor(args[1], dtype=kind, device=args[0].device)
    return args


def _in_parts(
    function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor, size: int = 0
) -> Tensor:
    """The results of parts of the first dimension, one behind the other.

    What a part needs fits into a processor's cache. Memory that the system has to provide first
    takes longer than most operations.

    Args:
        size: of an example, if it is not that of the first tensor.
    """
    length = len(tensors[0])
    count = max(1, CHUNK_SIZE * length // max(1, size * length or tensors[0].numel()))
    if length <= count:
        # As the results of several parts: torch computes linear maps of other layouts otherwise.
        return function(*tensors).to(dtype).contiguous()
    result = None
    for start in range(0, length, count):
        part = function(*(tensor[start : start + count] for tensor in tensors))
        if result is None:
            result = part.new_empty((length, *part.shape[1:]), dtype=dtype)
        result[start : start + count] = part
    assert result is not None
    return result


def _along(function: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor, dim: int) -> Tensor:
    """A function of rows (n, K), applied to the vectors along a dimension."""
    vectors = x.movedim(dim, -1)
    rows = _in_parts(function, dtype, vectors.reshape(-1, vectors.shape[-1]))
    return rows.view(vectors.shape).movedim(-1, dim)


def _elementwise(function: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not x.is_contiguous():
        # Between convolutions, numbers would be moved twice.
        return _elementwise(function, dtype, x.movedim(1, -1)).movedim(-1, 1)
    return _in_parts(function, dtype, x.reshape(-1)).view(x.shape)


def _rounding_term(x: Tensor, dims: int | tuple[int, ...], bits: int) -> Tensor:
    """A number 1.5 · 2ⁿ, to which float64 adds x by rounding it to multiples of 2ⁿ⁻⁵².

    Args:
        bits: of the highest number along `dims`, in these multiples.
    """
    highest = x.abs().amax(dims, keepdim=True).double()
    # Of the highest number's 64 bits the exponent remains; the fraction of 1.5 is its first bit.
    exponents = highest.view(torch.int64).bitwise_and_(_EXPONENT)
    return exponents.add_(((EXACT_BITS - bits) << _FRACTION_BITS) + _HALF).view(torch.float64)


def _to_fixed_point(x: Tensor, dims: int | tuple[int, ...], bits: int) -> Tensor:
    """x in float64, rounded to multiples of a power of two that all numbers along `dims` share, so
    that the highest has `bits` bits."""
    term = _rounding_term(x, dims, bits)
    # The sum is rounded, and the difference is exact.
    return (x.double() + term).sub_(term)


class _Constants:
    """Parameters in fixed point."""

    def __init__(self, models: Iterable[torch.nn.Module]):
        parameters = [parameter for model in models for parameter in model.parameters()]
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.converted = dict[tuple, Tensor]()

    def to_fixed_point(self, x: Tensor, dims: int | tuple[int, ...], bits: int) -> Tensor:
        storage = x.untyped_storage().data_ptr()
        if storage not in self.storages:
            return _to_fixed_point(x, dims, bits)
        key = (storage, x.storage_offset(), x.shape, x.stride(), dims, bits)
        if key not in self.converted:
            self.converted[key] = _to_fixed_point(x, dims, bits)
        return self.converted[key]


_CONSTANTS: ContextVar[_Constants] = ContextVar("constants")


# ---- sums ----------------------------------------------------------------------------------------


def _factor_bits(count: int) -> int:
    """Bits of the factors of `count` products whose sum is exact."""
    return min(FACTOR_BITS, (EXACT_BITS - count.bit_length()) // 2)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product of (m, k) and (k, n), or of batches of both."""
    bits = _factor_bits(a.shape[-1])
    convert = _CONSTANTS.get().to_fixed_point
    if a.ndim == 3:
        size = max(a[0].numel(), b[0].numel(), a.shape[1] * b.shape[2])
        return _in_parts(
            lambda a, b: convert(a, -1, bits) @ convert(b, -2, bits), a.dtype, a, b, size=size
        )
    factor = convert(b, -2, bits)
    return _in_parts(lambda rows: convert(rows, -1, bits) @ factor, a.dtype, a, size=max(b.shape))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    bits = _factor_bits(a.shape[-1])
    convert = _CONSTANTS.get().to_fixed_point
    factor = convert(b, -2, bits)
    biases = (bias.double() * beta).expand(len(a), b.shape[1])

    def product(rows: Tensor, biases: Tensor) -> Tensor:
        result = convert(rows, -1, bits) @ factor
        return (result if alpha == 1 else result.mul_(alpha)).add_(biases)

    return _in_parts(product, a.dtype, a, biases, size=max(b.shape))


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
    """A convolution as a sum of matrix products, one for each row of the kernel."""
    if transposed or groups != 1 or weight.ndim != 4:
        raise ValueError("expected plain 2-D convolutions in fixed-point arithmetic, got others")
    bits = _factor_bits(weight[0].numel())
    kernels = _CONSTANTS.get().to_fixed_point(weight, (1, 2, 3), bits)
    kernels = kernels.permute(2, 3, 1, 0).flatten(1, 2)  # (rows, columns · C, channels)
    height, width = (
        (length + 2 * border - step * (kernel - 1) - 1) // stride_step + 1
        for length, border, step, kernel, stride_step in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    )

    def convolve(images: Tensor, terms: Tensor) -> Tensor:
        images = images.permute(2, 0, 3, 1)  # (H, B, W, C): rows of all images are neighbors
        size = [
            images.shape[0] + 2 * padding[0],
            images.shape[1],
            images.shape[2] + 2 * padding[1],
            images.shape[3],
        ]
        allocate = images.new_zeros if any(padding) else images.new_empty
        padded = allocate(size, dtype=torch.float64)
        inner = padded[padding[0] :, :, padding[1] :][: len(images), :, : images.shape[2]]
        terms = terms.transpose(0, 1)
        inner.copy_(images).add_(terms).sub_(terms)
        shifted = [
            padded[:, :, start : start + stride[1] * (width - 1) + 1 : stride[1]]
            for start in range(0, weight.shape[3] * dilation[1], dilation[1])
        ]
        columns = torch.cat(shifted, dim=-1) if len(shifted) > 1 else shifted[0]

        def rows(i: int) -> Tensor:
            start = i * dilation[0]
            stop = start + stride[0] * (height - 1) + 1
            return columns[start : stop : stride[0]].reshape(-1, kernels.shape[1])

        result = rows(0) @ kernels[0]
        for i in range(1, len(kernels)):
            result.addmm_(rows(i), kernels[i])
        if bias is not None:
            result.add_(bias.double())
        return result.view(height, size[1], width, len(weight)).transpose(0, 1)

    size = math.prod(x.shape[1:])
    terms = _rounding_term(x, (1, 2, 3), bits)
    result = _in_parts(convolve, x.dtype, x, terms, size=size)
    return result.permute(0, 3, 1, 2)  # channels last


def _term_bits(count: int) -> int:
    """Bits of `count` terms whose sum is exact."""
    return min(EXACT_BITS - 18, EXACT_BITS - count.bit_length())


def _terms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x in fixed point, so that the sum along `dims` is exact."""
    return _to_fixed_point(x, dims, _term_bits(math.prod(x.shape[dim] for dim in dims)))


def _sum(x: Tensor, dim=None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    dims = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else (*dim,)
    if not x.is_floating_point():
        return x.sum(dims, keepdim, dtype=dtype)

    def total(x: Tensor) -> Tensor:
        return _terms(x, dims).sum(dims, keepdim)

    dtype = dtype or x.dtype
    is_whole = x.ndim == 0 or any(dim % x.ndim == 0 for dim in dims)
    return total(x).to(dtype) if is_whole else _in_parts(total, dtype, x)


def _mean(x: Tensor, dim=None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    total = _sum(x.double(), dim, keepdim)
    count = x.numel() // max(1, total.numel())
    return (total / torch.full_like(total, count)).to(dtype or x.dtype)


def _row_mean(rows: Tensor) -> Tensor:
    """The means of rows (n, K) in float64, (n, 1)."""
    return _terms(rows, (-1,)).sum(-1, True).div_(rows.new_full((), rows.shape[-1]))


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    if not x.is_floating_point():
        return x.cumsum(dim, dtype=dtype)
    return _terms(x, (dim,)).cumsum(dim).to(dtype or x.dtype)


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """x plus sums of numbers of the source, whose destinations can be the same."""
    if not x.is_floating_point():
        return x.scatter_add(dim, index, source)

    def total(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
        sums = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        return sums.scatter_add_(dim, index, _terms(source, (dim,))).add_(x.double())

    if dim % x.ndim > 0 and len(x) == len(index) == len(source):
        return _in_parts(total, x.dtype, x, index, source)
    return total(x, index, source).to(x.dtype)


def _negative_log_likelihood(
    log_probs: Tensor, values: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    if weight is not None or reduction != 0:
        raise ValueError("expected no weight and reduction='none' in fixed-point arithmetic")
    return -log_probs.gather(1, values[:, None])[:, 0], log_probs.new_zeros(())


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if len(shape) != 1:
        raise ValueError(f"expected norms of one dimension in fixed-point arithmetic, got {shape}")

    scale = None if weight is None else weight.double()
    shift = None if bias is None else bias.double()

    def normalized(rows: Tensor) -> Tensor:
        result = rows.double()
        result = result - _row_mean(result)
        result.mul_(1 / (_row_mean(result * result) + eps).sqrt())
        result = result if scale is None else result.mul_(scale)
        return result if shift is None else result.add_(shift)

    unused = x.new_empty(0)  # mean and scale are for gradients
    return _along(normalized, x.dtype, x, -1), unused, unused


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    dtype = torch.float32 if half_to_float else x.dtype

    def probabilities(rows: Tensor) -> Tensor:
        high = rows.amax(-1, keepdim=True)
        is_empty = high == -math.inf
        centered = rows.double() - high.double()
        if is_empty.any():
            centered.masked_fill_(is_empty, 0.0)
        if dtype == torch.float64:
            masses = _exp(centered)
            return masses.div_(_sum_of_masses(masses))
        masses, total = _exponentials(centered)
        masses.div_(total)
        return _round_or_recompute(
            masses, dtype, lambda *places: _exp(centered[places]).div_(total[places[0], 0])
        )

    return _along(probabilities, dtype, x, dim)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    def log_probabilities(rows: Tensor) -> Tensor:
        centered = rows.double() - rows.amax(-1, keepdim=True).double()
        return centered.sub_(log(_exponentials(centered)[1]))

    return _along(log_probabilities, torch.float32 if half_to_float else x.dtype, x, dim)


def _exponentials(centered: Tensor) -> tuple[Tensor, Tensor]:
    """torch's exponentials of rows (n, K) whose highest number is 0, and the exact sums (n, 1).

    A row is computed again by `_exp` if an error of `ERROR` could change a rounded term.
    """
    masses = centered.exp()
    low, high = ((masses * (1 + sign * ERROR)).add_(_mass_term(masses)) for sign in (-1, 1))
    row_indices = (low != high).any(-1).nonzero()[:, 0]  # or NaN
    total = low.sub_(_mass_term(masses)).sum(-1, True)
    if len(row_indices):
        total[row_indices] = _sum_of_masses(_exp(centered[row_indices]))
    return masses, total


def _mass_term(masses: Tensor) -> float:
    """`_rounding_term` of rows (n, K) whose highest number is 1."""
    return 1.5 * 2.0 ** (EXACT_BITS - _term_bits(masses.shape[-1]))


def _sum_of_masses(masses: Tensor) -> Tensor:
    """The sums (n, 1) of rows (n, K) whose highest number is 1."""
    term = _mass_term(masses)
    return (masses + term).sub_(term).sum(-1, True)


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    is_masked_out = (x == -math.inf).all(dim, keepdim=True)
    return _softmax(x, dim).masked_fill(is_masked_out, 0.0).to(dtype or x.dtype)


# ---- elementwise functions, in float64 -----------------------------------------------------------

# Constants as a short high part, whose small multiples are exact, and a low part (Cody & Waite).
LN_2 = (float.fromhex("0x1.62e42fefa0000p-1"), float.fromhex("0x1.cf79abc9e3b3ap-40"))
HALF_PI = (float.fromhex("0x1.921fb54440000p+0"), float.fromhex("0x1.68c234c4c6628p-39"))


ROUND = 1.5 * 2.0**_FRACTION_BITS
EXP_SERIES = [1 / math.factorial(n) for n in range(10, -1, -1)]


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Horner's scheme; the coefficient of the highest power comes first."""
    total = (x * coefficients[0]).add_(coefficients[1])
    for coefficient in coefficients[2:]:
        total.mul_(x).add_(coefficient)  # two steps: no fused multiply-add
    return total


def exp(x: Tensor) -> Tensor:
    """eˣ to 12 digits: the Taylor series of degree 10 in −½ ln 2 … ½ ln 2, times a power of two."""
    return _elementwise(lambda part: _exp(part.double()), torch.float64, x)


def _exp(x: Tensor) -> Tensor:
    is_far = x.numel() > 0 and not bool((x.amin() >= -708) & (x.amax() <= 709))  # or NaN
    near = x.clamp(-708, 709) if is_far else x
    # The sum with ROUND is rounded to an integer, the power, which is in its lowest bits.
    shifted = (near * (1 / (LN_2[0] + LN_2[1]))).add_(ROUND)
    power = shifted - ROUND
    rest = torch.sub(near, power, alpha=LN_2[0])  # this product is exact
    result = _polynomial(rest.sub_(power.mul_(LN_2[1])), EXP_SERIES)
    # To multiply by a power of two, add to the bits of the exponent.
    exponents = shifted.view(torch.int64).bitwise_left_shift_(_FRACTION_BITS)
    result.view(torch.int64).add_(exponents)
    if is_far:
        result.masked_fill_(x < -708, 0.0).masked_fill_(x.isnan(), math.nan)
    return result


def log(x: Tensor) -> Tensor:
    """ln x by the artanh series in √½ … √2, plus a power of two."""
    fraction, power = torch.frexp(x.double())
    is_low = fraction < 0.5**0.5
    fraction = torch.where(is_low, 2 * fraction, fraction)
    power = (power - is_low.int()).double()
    ratio = (fraction - 1) / (fraction + 1)
    series = _polynomial(ratio * ratio, [2 / (2 * n + 1) for n in range(10, -1, -1)])
    result = power * LN_2[0] + (power * LN_2[1] + ratio * series)
    return torch.where(x == 0, -math.inf, torch.where(x < 0, math.nan, result))


def _sine(x: Tensor, quarters: int) -> Tensor:
    """sin(x + quarters · π/2) by the Taylor series in −π/4 … π/4."""
    quarter = (x * (1 / (HALF_PI[0] + HALF_PI[1]))).round()
    rest = x - quarter * HALF_PI[0]
    rest = rest - quarter * HALF_PI[1]
    square = rest * rest
    sine = rest * _polynomial(
        square, [(-1) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1)]
    )
    cosine = _polynomial(square, [(-1) ** n / math.factorial(2 * n) for n in range(8, -1, -1)])
    turn = (quarter.long() + quarters) % 4
    result = torch.where(turn % 2 == 0, sine, cosine)
    return torch.where(turn >= 2, -result, result)


def _sigmoid(x: Tensor) -> Tensor:
    return exp(-x).add_(1).reciprocal_()


def _sinh(x: Tensor) -> Tensor:
    high = exp(x)
    return (high - 1 / high) * 0.5


def _power(x: Tensor, exponent: float) -> Tensor:
    if isinstance(exponent, Tensor) or exponent not in (2, 3, 4):
        raise ValueError(f"expected powers of 2 to 4 in fixed-point arithmetic, got {exponent}")
    result = x
    for _ in range(int(exponent) - 1):
        result = result * x
    return result


def _exact(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of float64 that is exact."""

    def replacement(x: Tensor, *more: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"expected functions of tensors in fixed-point arithmetic, got one of {x}"
            )
        return _elementwise(lambda part: function(part.double(), *more), x.dtype, x)

    return replacement


def _rounded(native: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]) -> Callable:
    """A function of which few results are computed exactly; see `_round_or_recompute`."""

    def rounded(x: Tensor) -> Tensor:
        return _round_or_recompute(
            native(x.double()), x.dtype, lambda places: exact(x[places].double())
        )

    return lambda x: _elementwise(exact if x.dtype == torch.float64 else rounded, x.dtype, x)


def _round_or_recompute(value: Tensor, dtype: torch.dtype, exact: Callable[..., Tensor]) -> Tensor:
    """Round torch's results in float64, which are overwritten, to `dtype`.

    Where the bounds ± `ERROR` are rounded to different numbers, the exact results count.

    Args:
        exact: these results, in float64, for the indices of their places.
    """
    result = (value * (1 - ERROR)).to(dtype)
    difference = value.mul_(1 + ERROR).to(dtype).sub_(result)
    if difference.abs_().sum() != 0:  # or NaN
        places = difference.nonzero(as_tuple=True)
        result[places] = exact(*places).to(dtype)
    return result


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    product = a * b
    return x + (product if value == 1 else product * value)


def _addcmul_(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    product = a * b
    return x.add_(product if value == 1 else product * value)


def _silu(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


# Operations whose floating-point results depend on the machine, and what computes them exactly.
REPLACEMENTS: dict[str, Callable] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "convolution": _convolution,
    "sum": _sum,
    "mean": _mean,
    "cumsum": _cumsum,
    "scatter_add": _scatter_add,
    "nll_loss_forward": _negative_log_likelihood,
    "native_layer_norm": _layer_norm,
    "_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "_log_softmax": _log_softmax,
    "addcmul": _addcmul,
    "addcmul_": _addcmul_,
    "exp": _rounded(torch.exp_, exp),
    "log": _exact(log),
    "sin": _exact(lambda x: _sine(x, 0)),
    "cos": _exact(lambda x: _sine(x, 1)),
    "sigmoid": _rounded(torch.sigmoid_, _sigmoid),
    "silu": _rounded(lambda x: torch.sigmoid(x).mul_(x), _silu),
    "tanh": _exact(lambda x: 1 - 2 / (exp(2 * x) + 1)),
    "sinh": _exact(_sinh),
    "rsqrt": _exact(lambda x: 1 / x.sqrt()),
    "pow": _exact(_power),
}
