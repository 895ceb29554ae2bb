"""Lossless compression: a range coder over the factors of P(s, z), coarse to fine.

    image -> encode -> [z_1 … z_N, s] -> walk over each factor, EntropyEncoder -> bytes
    bytes -> walk over each factor, EntropyDecoder -> [z_1 … z_N, s] -> image

A mixture of logistics has no table of all 256 values at hand. Its values x are coded as two digits,
by the chain rule: P(x) = P(⌊x / 16⌋) · P(x mod 16 | ⌊x / 16⌋), with 16 probabilities each.

Encoder and decoder must compute the same probabilities to the last bit, which floating-point
networks do not guarantee. Therefore both run the same walks over batches of one size, whatever the
number of images. If another machine computes other probabilities, the checksum differs, and there
is an error rather than a wrong image. Fixed-point arithmetic (`fixed_point.py`) is the same on all
machines, and slower.
"""

import functools
import hashlib
import math
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_integer
from ..image_processor import Images, as_images, from_pixel_values, pixel_value_batches
from ..models.causal_lm import transformers_steps
from ..models.conditioning import ClassLabels, Conditioning
from ..models.distributions import (
    NUM_INTERVALS,
    CopyMixture,
    DiscretizedLogisticMixture,
    Distribution,
)
from ..models.fingerprint import original_names
from ..models.value_types import signed_to_indices, uint8_to_signed, unit_to_uint8
from ..models.walk import StepFn, WalkStep
from ..stack import LevelStack
from .bitstream import FORMAT, FORMAT_OF_DIGITS, Header
from .fixed_point import fixed_point_arithmetic

ARITHMETICS = ("float", "integer")
WORD = 4  # bytes
NUM_PADDING_WORDS = 4  # that a decoder reads behind the last word
# Errors of one stream.
NOT_DECODABLE = "expected stream of this model and machine, got another: "
ENDS_BEFORE = "expected stream to hold all levels that are asked for, got one that ends before"
FLOAT_ADVICE = (
    'Streams of arithmetic="integer" are read by any CPU; for those of "float", set torch, '
    "ATEN_CPU_CAPABILITY, MKL_CBWR and ONEDNN_MAX_CPU_ISA as where they were made"
)
NO_TEXTS = "expected prompt=None, as streams are of the null condition or a class"
OTHER_PIXELS = "expected pixels with the checksum of stream, got others: "
TOTAL = 2**24  # sum of the counts of all values, each one or more
# Added to the masses of a block, so that they can be normalized where all are 0.
TINY = torch.finfo(torch.float32).tiny
# Images in a batch, and values of all of them together.
MIN_IMAGES = 8
MAX_IMAGES = 128
MAX_VALUES = 2**18
# Which kernels torch uses is a process-wide setting.
_LOCK = threading.RLock()


def _constriction_stream() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "compress and decompress need the range coder of constriction: "
            'pip install "progressive-vae[codec]"'
        ) from error
    return constriction.stream


@functools.cache
def _model_family() -> Any:
    """Categorical distributions whose tables are used unchanged."""
    return _constriction_stream().model.Categorical(perfect=False)


def frequency_table(probs: Tensor, count: int) -> np.ndarray:
    """Integers (count, n, V) that sum to 2²⁴ − V, in proportion to the probabilities of the first
    `count` examples; the coder adds one to each. Sums of integers are exact.

    Args:
        probs: float32 (B, n, V), which is overwritten.
    """
    num_values = probs.shape[-1]
    total = TOTAL - num_values
    # The slack absorbs probabilities that sum to more than 1 by rounding.
    slack = 64 + num_values // 8
    counts = probs[:count].mul_(total - slack).floor_()
    counts[..., 0] += total - counts.sum(-1)
    if not (counts[..., 0] >= 0).all():  # also catches NaN
        raise ValueError(
            "expected probabilities that add up to 1, got others: a weight is not finite, or too "
            "large"
        )
    return counts.cpu().numpy()


# A function that codes the digits `values // place % D` of a step by tables (count, n, D), and
# returns those of all examples, int64 (B, n).
CodeDigits = Callable[[np.ndarray, int], Tensor]


def code_values(
    distribution: Distribution, count: int, format_number: int, code_digits: CodeDigits
) -> Tensor:
    """Code the values of a step in one or two digits, and return them, int64 (B, n).

    Args:
        count: of the examples that are coded; the others are padding.
        format_number: of the streams.
        code_digits: is called with tables and a place.
    """
    # Masses are of all examples: in a batch of another size some functions differ in the last bit.
    if format_number < FORMAT_OF_DIGITS or not _has_two_digits(distribution):
        return code_digits(frequency_table(distribution.probs(), count), 1)
    masses = distribution.interval_masses(None, NUM_INTERVALS)
    first = code_digits(frequency_table(masses, count), NUM_INTERVALS) * NUM_INTERVALS
    masses = distribution.interval_masses(first, 1) + TINY
    masses /= masses.sum(-1, keepdim=True)
    return first + code_digits(frequency_table(masses, count), 1)


def _has_two_digits(
    distribution: Distribution,
) -> TypeGuard[DiscretizedLogisticMixture | CopyMixture]:
    base = distribution.base if isinstance(distribution, CopyMixture) else distribution
    return isinstance(base, DiscretizedLogisticMixture) and base.num_values == NUM_INTERVALS**2


class EntropyEncoder:
    """A `StepFn` that follows target grids, and encodes those of the first examples.

    Args:
        count: of the examples that are encoded; the others are padding.
        format_number: of the streams.
    """

    def __init__(self, count: int, format_number: int = FORMAT):
        self.format_number = format_number
        self.coders = [_constriction_stream().queue.RangeEncoder() for _ in range(count)]
        self.values = torch.empty(0, dtype=torch.long, device="cpu")

    def set_target(self, values: Tensor) -> StepFn:
        """Set the grid of the next factor, int64 (B, C, H, W)."""
        self.values = values.flatten(2)
        return self

    def __call__(self, distribution: Distribution, step: WalkStep) -> Tensor:
        values = self.values[:, step.channel].index_select(1, step.positions)
        rows = values.cpu().numpy().astype(np.int32)

        def encode(tables: np.ndarray, place: int) -> Tensor:
            num_digits = tables.shape[-1]
            digits = rows // place % num_digits
            if num_digits > 1:  # a single possible value needs no bits
                for coder, row, table in zip(self.coders, digits, tables, strict=False):
                    coder.encode(row, _model_family(), table)
            return torch.from_numpy(digits).long().to(values.device)

        return code_values(distribution, len(self.coders), self.format_number, encode)

    def streams(self) -> list[bytes]:
        return [coder.get_compressed().astype(">u4").tobytes() for coder in self.coders]


class NothingToDecodeError(Exception):
    """Raised where no stream of a batch can be decoded any further."""


class EntropyDecoder:
    """A `StepFn` that decodes what an `EntropyEncoder` encoded; padding repeats the last example.

    A prefix of a stream is decoded twice, continued by zeros and by ones: as long as both results
    agree, the missing bits do not matter. A stream that cannot be decoded does not stop the others:
    its values are zeros, and `errors` has the reason.

    Args:
        batch_size: of the distributions.
        may_end: streams may be prefixes.
        format_number: of the streams.
    """

    def __init__(
        self, streams: list[bytes], batch_size: int, may_end: bool, format_number: int = FORMAT
    ):
        self.batch_size = batch_size
        self.format_number = format_number
        self.errors = dict[int, str]()
        # Whether values behind the end of a stream are expected ones instead of an error.
        self.has_means = False
        self.ended = set[int]()  # the streams of which some are
        endings = (b"\x00", b"\xff") if may_end else (b"\x00",)
        self.coders = [[_range_decoder(stream, end) for end in endings] for stream in streams]

    def __call__(self, distribution: Distribution, step: WalkStep) -> Tensor:
        count = len(self.coders)
        device = step.positions.device
        # Values of which not even the first of two digits is in the stream.
        is_missing = np.zeros((count, len(step.positions)), bool)

        def decode(tables: np.ndarray, place: int) -> Tensor:
            digits = np.zeros(tables.shape[:2], np.int32)
            if tables.shape[-1] > 1:
                for i, (coders, table) in enumerate(zip(self.coders, tables, strict=True)):
                    if i not in self.errors:
                        digits[i], is_decoded = self._decode_row(i, coders, table)
                        if place > 1 and i in self.ended:
                            is_missing[i] = ~is_decoded
            return self._padded(digits, device).long()

        values = code_values(distribution, count, self.format_number, decode)
        if is_missing.any():
            means = _means(frequency_table(distribution.probs(), count))
            values = torch.where(
                self._padded(is_missing, device), self._padded(means, device).long(), values
            )
        return values

    def _padded(self, rows: np.ndarray, device: torch.device) -> Tensor:
        decoded = torch.from_numpy(rows).to(device)
        padding = decoded[-1:].expand(self.batch_size - len(decoded), -1)
        return torch.cat([decoded, padding])

    def _decode_row(
        self, i: int, coders: list[Any], table: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The digits of stream i, and which of them are in the stream."""
        is_decoded = np.ones(len(table), bool)
        if i in self.ended:
            return _means(table), ~is_decoded
        try:
            digits, *alternatives = [coder.decode(_model_family(), table) for coder in coders]
        except AssertionError:
            error = NOT_DECODABLE
            digits = np.zeros(len(table), np.int32)
            is_decoded[:] = False
        else:
            error = ENDS_BEFORE
            for other in alternatives:
                is_decoded &= other == digits
            is_decoded = np.logical_and.accumulate(is_decoded)
        if is_decoded.all():
            return digits, is_decoded
        if self.has_means:
            self.ended.add(i)
            return np.where(is_decoded, digits, _means(table)), is_decoded
        self.errors[i] = error
        if len(self.errors) == len(self.coders):
            raise NothingToDecodeError
        return np.zeros(len(table), np.int32), is_decoded


def _means(table: np.ndarray) -> np.ndarray:
    """The expected values (...) of frequency tables (..., V), rounded."""
    values = np.arange(table.shape[-1], dtype=float)
    return np.rint(table @ values / table.sum(-1, dtype=float)).astype(np.int32)


def _range_decoder(stream: bytes, ending: bytes) -> Any:
    """A decoder of a stream that `ending` continues to full words."""
    padded = stream + ending * (WORD * NUM_PADDING_WORDS - len(stream) % WORD)
    words = np.frombuffer(padded, ">u4").astype(np.uint32)
    return _constriction_stream().queue.RangeDecoder(words)


# ---- images <-> streams --------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.no_grad()
def compress(
    stack: LevelStack, images: Images, class_labels: ClassLabels = None, arithmetic: str = "float"
) -> list[bytes]:
    """One stream of bytes for each image; see `ProgressiveVAEPipeline.compress`."""
    stack.require_prior()
    check_arithmetic(arithmetic)
    is_fixed_point = arithmetic == "integer"
    batch_size = batch_size_of(stack)
    images = as_images(images)
    conditioning = stack.as_conditioning(class_labels, len(images))
    if conditioning.embeddings is not None:
        raise ValueError(f"{NO_TEXTS}, got embeddings")
    weights = weights_digest(stack)[:2]
    arithmetic_hash = _hash(_describe_arithmetic(stack, is_fixed_point, batch_size), 1)
    streams: list[bytes] = []
    batches = pixel_value_batches(images, stack.image_shape, batch_size)
    all_rows = torch.arange(len(images), device="cpu").split(batch_size)
    for rows, batch in zip(all_rows, batches, strict=True):
        pixels = signed_to_indices(batch).to(torch.uint8).cpu()
        payloads = encode_batch(stack, pixels, conditioning[rows], is_fixed_point)
        class_ids = conditioning.class_ids[rows].tolist()
        for class_id, image, payload in zip(class_ids, pixels, payloads, strict=True):
            checksum = zlib.crc32(image.numpy().tobytes())
            label = None if class_labels is None else class_id
            header = Header(weights, arithmetic_hash, checksum, label, is_fixed_point)
            streams.append(header.to_bytes() + payload)
    return streams


@torch.inference_mode(False)
@torch.no_grad()
def encode_batch(
    stack: LevelStack, pixels: Tensor, conditioning: Conditioning, is_fixed_point: bool
) -> list[bytes]:
    """The payloads of at most `batch_size_of` images: their streams without headers.

    Args:
        pixels: uint8 (n, C, H, W), on the CPU.
        conditioning: of the n images.
    """
    count = len(pixels)
    size = count if is_fixed_point else batch_size_of(stack)
    padded_conditioning = conditioning[_pad(torch.arange(count, device="cpu"), size)]
    padded_conditioning = padded_conditioning.to(stack.device)
    encoder = EntropyEncoder(count)
    # Encode to [z_1 … z_N, s], then code each factor given the next coarser grid.
    with _arithmetic_context(stack, is_fixed_point):
        pixel_values = _pad(uint8_to_signed(pixels), size).to(stack.device)
        grids = [*stack.encode(pixel_values), pixel_values]
        for factor, grid in enumerate(grids):
            values = stack.to_indices(factor, grid)
            coarser = grids[factor - 1] if factor else None
            stack.walk(factor, coarser, encoder.set_target(values), padded_conditioning)
    return encoder.streams()


@torch.inference_mode(False)
@torch.no_grad()
def decompress(
    stack: LevelStack,
    data: bytes | list[bytes],
    num_levels: int | None = None,
    allow_truncated: bool = False,
) -> Tensor:
    """Images, uint8 (B, C, H, W); see `ProgressiveVAEPipeline.decompress`."""
    stack.require_prior()
    kinds = (bytes, bytearray, memoryview)
    items = [data] if isinstance(data, kinds) else data
    is_list = isinstance(items, (list, tuple)) and all(isinstance(x, kinds) for x in items)
    if not is_list or not items:
        raise ValueError(f"expected data of bytes or a list of them, got {data!r:.80}")
    if num_levels is not None:
        num_levels = as_integer("num_levels", num_levels, 1, stack.num_levels)
    streams = [bytes(item) for item in items]
    headers = [Header.from_bytes(stream, f"stream {i}") for i, stream in enumerate(streams)]
    _check_headers(stack, headers)
    shape = (len(streams), *stack.image_shape)
    images = torch.empty(shape, dtype=torch.uint8, device="cpu")
    # A batch holds streams of one format and arithmetic, in the batch size with which they were
    # made.
    batch_sizes = _batch_sizes(stack)
    default_size = batch_size_of(stack)
    kinds_of_streams = [
        (
            header.is_fixed_point,
            batch_sizes.get(header.arithmetic, default_size),
            header.format_number,
        )
        for header in headers
    ]
    for kind in sorted(set(kinds_of_streams)):
        is_fixed_point, size, format_number = kind
        rows = [i for i, other in enumerate(kinds_of_streams) if other == kind]
        for start in range(0, len(rows), size):
            numbers = rows[start : start + size]
            padded_size = len(numbers) if is_fixed_point else size
            batch_headers = [headers[number] for number in numbers]
            payloads = [streams[number][headers[number].length :] for number in numbers]
            conditioning = _conditioning_of(stack, batch_headers)
            decoded, errors = decode_batch(
                stack,
                payloads,
                conditioning,
                is_fixed_point,
                padded_size,
                num_levels,
                allow_truncated,
                format_number,
            )
            if num_levels is None and not allow_truncated:
                errors |= _checksum_errors(decoded, batch_headers)
            for i, error in sorted(errors.items()):
                if error != ENDS_BEFORE:
                    error += _reason(stack, batch_headers[i], streams[numbers[i]])
                raise ValueError(error.replace("stream", f"stream {numbers[i]}", 1))
            images[numbers] = decoded
    return images


def _conditioning_of(stack: LevelStack, headers: list[Header]) -> Conditioning:
    null = stack.class_config.num_classes
    labels = [null if header.label is None else header.label for header in headers]
    return Conditioning(torch.tensor(labels, device="cpu"), null)


def _checksum_errors(pixels: Tensor, headers: list[Header]) -> dict[int, str]:
    return {
        i: OTHER_PIXELS
        for i, (header, image) in enumerate(zip(headers, pixels, strict=True))
        if zlib.crc32(image.numpy().tobytes()) != header.checksum
    }


@torch.inference_mode(False)
@torch.no_grad()
def decode_batch(
    stack: LevelStack,
    payloads: list[bytes],
    conditioning: Conditioning,
    is_fixed_point: bool,
    size: int,
    num_levels: int | None = None,
    allow_truncated: bool = False,
    format_number: int = FORMAT,
) -> tuple[Tensor, dict[int, str]]:
    """The images of payloads, uint8 (n, C, H, W), and an error for each one that is not decoded.

    Without an error the image is right if arithmetic and weights are those of the encoder; only a
    checksum tells.

    Args:
        size: of the batch, to which payloads are padded.
        num_levels: k: previews from z_1 … z_k, for which prefixes of payloads suffice.
        allow_truncated: payloads may end within the pixels; the others are expected values, each
            group given the groups before it.
        format_number: of the streams.
    """
    count = len(payloads)
    may_end = num_levels is not None or allow_truncated
    decoder = EntropyDecoder(payloads, size, may_end, format_number)
    padded_conditioning = conditioning[_pad(torch.arange(count, device="cpu"), size)]
    padded_conditioning = padded_conditioning.to(stack.device)
    grids: list[Tensor] = []
    try:
        with _arithmetic_context(stack, is_fixed_point):
            for factor in range(stack.num_levels + 1 if num_levels is None else num_levels):
                coarser = grids[-1] if grids else None
                decoder.has_means = allow_truncated and factor == stack.num_levels
                grids.append(stack.walk(factor, coarser, decoder, padded_conditioning))
    except NothingToDecodeError:
        return torch.zeros((count, *stack.image_shape), dtype=torch.uint8), decoder.errors
    finest = grids[-1][:count]  # without the padding
    if num_levels is not None:
        return _preview(stack, finest, num_levels), decoder.errors
    return signed_to_indices(finest).to(torch.uint8).cpu(), decoder.errors


def _preview(stack: LevelStack, codes: Tensor, level: int) -> Tensor:
    """An image of z_k, uint8 (B, C, H, W): the auxiliary decoders' expected one, or that of the
    most probable finer values."""
    if stack.has_previews:
        pixel_values = stack.preview(codes, level)
    else:
        null = stack.as_conditioning(None, len(codes))
        grid = codes
        for factor in range(level, stack.num_levels + 1):
            grid = stack.sample(factor, grid, null, temperature=0.0)
        pixel_values = grid.cpu()
    images = from_pixel_values(pixel_values, "pt")
    assert isinstance(images, Tensor)
    return unit_to_uint8(images)


# ---- what a header identifies --------------------------------------------------------------------


def arithmetic_of(stack: LevelStack, arithmetic: str) -> str:
    """What the results of an arithmetic depend on, in words."""
    check_arithmetic(arithmetic)
    return _describe_arithmetic(stack, arithmetic == "integer", batch_size_of(stack))


def stream_id(stack: LevelStack, arithmetic: str = "float") -> str:
    """The hashes of weights and arithmetic in the header of every stream made here, in
    hexadecimal."""
    return (weights_digest(stack)[:2] + _hash(arithmetic_of(stack, arithmetic), 1)).hex()


def check_arithmetic(arithmetic: str):
    """Raise a `ValueError` for an unknown arithmetic."""
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"expected arithmetic among {ARITHMETICS}, got {arithmetic!r}")


def _check_headers(stack: LevelStack, headers: list[Header]):
    """Raise a `ValueError` unless the streams are of this model."""
    weights = weights_digest(stack)[:2]
    num_classes = stack.class_config.num_classes
    for i, header in enumerate(headers):
        if header.weights != weights:
            raise ValueError(
                f"expected stream {i} of the weights {weights.hex()}, which this pipeline has, "
                f"got one of {header.weights.hex()}"
            )
        if header.label is not None and header.label > num_classes:
            raise ValueError(
                f"expected stream {i} of a class in 0 … {num_classes}, the last one the null "
                f"class, got {header.label}"
            )


def _reason(stack: LevelStack, header: Header, stream: bytes) -> str:
    """Why a stream cannot be decoded, or only to wrong pixels, and what helps."""
    local = _describe_arithmetic(stack, header.is_fixed_point, batch_size_of(stack))
    readable = [_hash(local, 1)] if header.is_fixed_point else [*_batch_sizes(stack)]
    if header.arithmetic not in readable:
        reason = (
            "it was made with other arithmetic (device, kind of processor, precision or version "
            f"of torch) than that of this machine, {local}"
        )
    else:
        reason = "it is damaged, ends too early, or torch was set otherwise"
    if not header.is_fixed_point:
        reason += f". {FLOAT_ADVICE}"
    if _holds_codes(stack, header, stream):
        reason += ". Its first bytes are a preview: decompress(stream, num_levels=1)"
    return reason


def _holds_codes(stack: LevelStack, header: Header, stream: bytes) -> bool:
    """Whether z_1 is in the first bytes of a stream, of which the rest may be missing."""
    conditioning = _conditioning_of(stack, [header])
    size = 1 if header.is_fixed_point else batch_size_of(stack)
    payloads = [stream[header.length :]]
    return not decode_batch(stack, payloads, conditioning, header.is_fixed_point, size, 1)[1]


@contextmanager
def _arithmetic_context(stack: LevelStack, is_fixed_point: bool) -> Iterator[None]:
    """Networks inside compute without autocast, one thread at a time, in the given arithmetic.

    Causal language models round as in earlier versions, whose streams are decoded, too.
    """
    with _LOCK, torch.autocast(stack.device.type, enabled=False), transformers_steps():
        models = [stack.factor(index) for index in range(stack.num_levels + 1)]
        with fixed_point_arithmetic(*models) if is_fixed_point else nullcontext():
            yield


def batch_size_of(stack: LevelStack) -> int:
    """Of all batches, with padding where there are fewer images: results may differ in the last
    bits between batch sizes, and between rows that do not fill a processor's registers. A power of
    two, and not a small one, as register widths are."""
    return _power_of_two(min(MAX_IMAGES, MAX_VALUES // math.prod(stack.image_shape)))


def _batch_sizes(stack: LevelStack) -> dict[bytes, int]:
    """Batch sizes of float streams by the hash in their header: of this version and of earlier
    ones."""
    earlier = _power_of_two(min(64, 2**16 // math.prod(stack.image_shape[1:])))
    sizes = (earlier, batch_size_of(stack))
    return {_hash(_describe_arithmetic(stack, False, size), 1): size for size in sizes}


def _describe_arithmetic(stack: LevelStack, is_fixed_point: bool, batch_size: int) -> str:
    """What results depend on. Its hash is in every stream, so that its words never change."""
    dtype = next(stack.levels[0].parameters()).dtype
    if is_fixed_point:
        return f"whole numbers, {dtype}"
    device = stack.device
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    kind = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    version = ".".join(torch.__version__.split(".")[:2])
    return f"{kind}, {dtype}, torch {version}, {batch_size} images at a time"


def weights_digest(stack: LevelStack) -> bytes:
    """The SHA-256 of all weights and buffers, and of tables that networks computed when they were
    made, such as rotary position embeddings, which another machine may round differently."""
    digest = hashlib.sha256()
    for index, name in enumerate(stack.factor_names):
        part = stack.factor(index)
        tensors = {**part.state_dict(), **dict(part.named_buffers())}
        for key, value in sorted(original_names(tensors).items()):
            digest.update(f"{name}.{key} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def _hash(text: str, num_bytes: int) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:num_bytes]


def _power_of_two(number: int) -> int:
    """The largest power of two up to a number, and at least MIN_IMAGES."""
    return 1 << (max(MIN_IMAGES, number).bit_length() - 1)


def _pad(batch: Tensor, size: int) -> Tensor:
    """A batch of `size` examples, the last one repeated."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])
