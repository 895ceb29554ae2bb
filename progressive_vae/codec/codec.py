"""Images as bytes, as few as the model says: a range coder walks over the factors, coarse to fine.

Bytes and images are one to one only where both sides compute the same probabilities to the last
digit, which networks of floating-point numbers do not promise. So both walk alike, over batches of
one size, whatever the number of images; another machine may do otherwise, and then the checksum is
wrong, and there is an error in place of a wrong image. In whole numbers (`whole.py`) all machines
are alike, and take longer.
"""

import functools
import hashlib
import math
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_integer
from ..image_processor import Images, as_images, pixel_value_batches
from ..models.class_labels import Labels, known_labels, label_ids
from ..models.distributions import Distribution
from ..models.fingerprint import original_names
from ..models.orderings import StepFn, WalkStep
from ..models.value_types import signed_to_indices, uint8_to_signed, unit_to_uint8
from ..pipeline_inputs import CallingPipeline
from .bitstream import Header
from .fixed_point import fixed_point_arithmetic

ARITHMETICS = ("float", "integer")
WORD, NUM_WORDS_BEYOND = 4, 4  # bytes of a word of code; words after the last one
TOTAL = 2**24  # of the counts of all values, each one or more
MIN_IMAGES, MAX_IMAGES, MAX_VALUES = 8, 128, 2**18  # at a time, and of them together
_ALONE = threading.RLock()  # which kernels torch takes is a switch that all threads share


def _coder() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "compress and decompress take the range coder of constriction: "
            'pip install "progressive-vae[codec]"'
        ) from error
    return constriction.stream


@functools.cache
def _family() -> Any:
    """Tables that are taken as they come."""
    return _coder().model.Categorical(perfect=False)


def frequency_table(distribution: Distribution, count: int) -> np.ndarray:
    """Whole numbers (count, n, V) that add up to 2²⁴ − V, in proportion to the probabilities of the
    first examples: to each the coder adds one. As they are whole, no sum of them is rounded."""
    # Of all of them: some functions say another last digit in a batch of another size.
    probs = distribution.probs()
    num_values = probs.shape[-1]
    # Less than all, lest rounded ones add up to more: so no sum of theirs is rounded again.
    whole, slack = TOTAL - num_values, 64 + num_values // 8
    counts = probs[:count].mul_(whole - slack).floor_()
    counts[..., 0] += whole - counts.sum(-1)  # what is left, somewhere
    if not (counts[..., 0] >= 0).all():  # which NaN is not
        raise ValueError("expected probabilities that add up to 1, got others: a weight is not "
                         "finite, or too large")  # fmt: skip
    return counts.cpu().numpy()


class EntropyEncoder:
    """A `StepFn` that follows known grids, and writes down each of the first examples.

    Args:
        count: of the examples that are written.
    """

    def __init__(self, count: int):
        self.coders = [_coder().queue.RangeEncoder() for _ in range(count)]
        self.values = torch.empty(0, dtype=torch.long, device="cpu")

    def follow(self, values: Tensor) -> StepFn:
        """Of the factor that comes next, int64 (B, C, H, W)."""
        self.values = values.flatten(2)
        return self

    def __call__(self, distribution: Distribution, place: WalkStep) -> Tensor:
        values = self.values[:, place.color].index_select(1, place.positions)
        tables = frequency_table(distribution, len(self.coders))
        if tables.shape[-1] > 1:  # else there is nothing to say
            symbols = values.cpu().numpy().astype(np.int32)
            for coder, row, table in zip(self.coders, symbols, tables, strict=False):
                coder.encode(row, _family(), table)
        return values

    def words(self) -> list[bytes]:
        return [coder.get_compressed().astype(">u4").tobytes() for coder in self.coders]


class EntropyDecoder:
    """A `StepFn` that reads what an `EntropyEncoder` wrote; further examples repeat the last one.

    A stream that ends early is read twice, as if zeros or as if ones followed: as long as both say
    the same, what follows does not matter.

    Args:
        batch_size: of the distributions.
        numbers: of the streams, in errors.
        may_end: streams may end early, as not all of them is asked for.
    """

    def __init__(self, streams: list[bytes], batch_size: int, numbers: list[int], may_end: bool):
        self.batch_size, self.numbers = batch_size, numbers
        ends = (b"\x00", b"\xff") if may_end else (b"\x00",)
        self.coders = [[_decoder(stream, end) for end in ends] for stream in streams]

    def __call__(self, distribution: Distribution, place: WalkStep) -> Tensor:
        tables = frequency_table(distribution, len(self.coders))
        symbols = np.zeros(tables.shape[:2], np.int32)
        if tables.shape[-1] > 1:
            rows = zip(self.coders, tables, self.numbers, strict=True)
            for i, (coders, table, number) in enumerate(rows):
                symbols[i] = self._read(coders, table, number)
        rows = torch.from_numpy(symbols).long().to(place.positions.device)
        return torch.cat([rows, rows[-1:].expand(self.batch_size - len(rows), -1)])

    def _read(self, coders: list[Any], table: np.ndarray, number: int) -> np.ndarray:
        try:
            read, *others = [coder.decode(_family(), table) for coder in coders]
        except AssertionError as error:
            raise ValueError(f"expected stream {number} of this model and machine, got one that is "
                             "damaged, ends too early, or was made with other arithmetic"
                             ) from error  # fmt: skip
        if any((other != read).any() for other in others):
            raise ValueError(f"expected stream {number} to hold all levels that are asked for, got "
                             "one that ends before")  # fmt: skip
        return read


def _decoder(stream: bytes, end: bytes) -> Any:
    """It reads words of zeros beyond the last one."""
    whole = stream + end * (WORD * NUM_WORDS_BEYOND - len(stream) % WORD)
    return _coder().queue.RangeDecoder(np.frombuffer(whole, ">u4").astype(np.uint32))


class CodingPipeline(CallingPipeline):
    """A pipeline whose images are bytes, as many as its bits per dimension say."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def compress(
        self, images: Images, class_labels: Labels = None, arithmetic: str = "float"
    ) -> list[bytes]:
        """One stream of bytes for each image, whose length is `log_prob` in bits, rounded up to
        words of 32 bits, and eight bytes (with a class, nine or more).

        A stream is the same whatever images are beside it. Of floats it is not the same on all
        machines, and one that was made elsewhere may turn out not to be readable, which is then an
        error. In whole numbers it is, for several times the time and hardly a bit.

        Args:
            images: of the pipeline's size.
            class_labels: of the class-conditional factors, one for each image; they are in the
                streams. `None` is the null class.
            arithmetic: "float", or "integer", in whole numbers.

        Raises:
            ValueError: a pipeline without a prior, images, labels or arithmetic that are none, or
                a backbone that does what cannot be done in whole numbers.
            ImportError: the extra `codec` is not installed.
        """
        self._require_prior()
        self._check_arithmetic(arithmetic)
        is_whole, size, streams = arithmetic == "integer", self._at_a_time(), list[bytes]()
        images = as_images(images)
        labels = label_ids(class_labels, self._class_config, len(images))
        weights, made = self._weights_hash(), _hash(self._arithmetic(is_whole, size), 1)
        batches = pixel_value_batches(images, self.image_shape, size)
        for given, batch in zip(labels.split(size), batches, strict=True):
            batch = uint8_to_signed(signed_to_indices(batch).cpu())
            size, writer = len(batch) if is_whole else size, EntropyEncoder(len(batch))
            shown = _padded(given, size)
            with self._computing(is_whole):
                grids = self._encode_chain(_padded(batch, size), None)
                for factor, grid in enumerate(grids):
                    values = signed_to_indices(grid) if grid.ndim == 4 else grid[:, None]
                    self._walk(factor, grids[:factor], shown, writer.follow(values))
            pixels = signed_to_indices(batch).to(torch.uint8)
            for label, image, words in zip(given.tolist(), pixels, writer.words(), strict=True):
                checksum = zlib.crc32(image.numpy().tobytes())
                label = None if class_labels is None else label
                header = Header(weights, made, checksum, label, is_whole)
                streams.append(header.to_bytes() + words)
        self.maybe_free_model_hooks()
        return streams

    @torch.inference_mode(False)
    @torch.no_grad()
    def decompress(self, data: bytes | list[bytes], num_levels: int | None = None) -> Tensor:
        """The very images that were compressed, uint8 (B, C, H, W).

        Args:
            data: a stream, or a list of them.
            num_levels: k: read no more than z_1 … z_k, and show what the auxiliary decoders expect
                to see of them, or where there are none the most probable values. Streams may end
                early then: their first bytes are a picture. No checksum tells whether it is right.

        Raises:
            ValueError: streams that end too early, were made by another model, are damaged, or
                cannot be read with the arithmetic of this machine; a `num_levels` that is none.
            ImportError: the extra `codec` is not installed.
        """
        self._require_prior()
        kinds = (bytes, bytearray, memoryview)
        given = [data] if isinstance(data, kinds) else data
        is_list = isinstance(given, (list, tuple)) and all(isinstance(x, kinds) for x in given)
        if not is_list or not given:
            raise ValueError(f"expected data of bytes or a list of them, got {data!r:.80}")
        if num_levels is not None:
            num_levels = as_integer("num_levels", num_levels, 1, self.num_levels)
        streams = [bytes(stream) for stream in given]
        headers = [Header.from_bytes(stream, f"stream {i}") for i, stream in enumerate(streams)]
        self._check(headers)
        shape = (len(streams), *self.image_shape)
        images = torch.empty(shape, dtype=torch.uint8, device="cpu")
        sizes, usual = self._sizes(), self._at_a_time()
        made = [(header.is_whole, sizes.get(header.arithmetic, usual)) for header in headers]
        for is_whole, size in sorted(set(made)):
            alike = [i for i, kind in enumerate(made) if kind == (is_whole, size)]
            for start in range(0, len(alike), size):
                numbers = alike[start : start + size]
                padded = len(numbers) if is_whole else size
                images[numbers] = self._read(headers, streams, numbers, num_levels, padded)
        self.maybe_free_model_hooks()
        return images

    def _read(
        self,
        headers: list[Header],
        streams: list[bytes],
        numbers: list[int],
        num_levels: int | None,
        size: int,
    ) -> Tensor:
        """The images, uint8 (n, C, H, W), of n streams that were made alike, by their numbers;
        they are padded to `size`."""
        null, count = self._class_config.num_classes, len(numbers)
        headers = [headers[number] for number in numbers]
        labels = [null if header.label is None else header.label for header in headers]
        shown = _padded(torch.tensor(labels, device="cpu"), size)
        words = [streams[number][h.length :] for number, h in zip(numbers, headers, strict=True)]
        reader = EntropyDecoder(words, len(shown), numbers, may_end=num_levels is not None)
        grids = list[Tensor]()
        with self._computing(headers[0].is_whole):
            for factor in range(self.num_levels + 1 if num_levels is None else num_levels):
                grids.append(self._walk(factor, grids, shown, reader))
        if num_levels is not None:
            return self._shown([grid[:count] for grid in grids])  # without the padding
        pixels = signed_to_indices(grids[-1][:count]).to(torch.uint8).cpu()
        for i, header, image in zip(numbers, headers, pixels, strict=True):
            if zlib.crc32(image.numpy().tobytes()) != header.checksum:
                raise ValueError(f"expected pixels with the checksum of stream {i}, got others: "
                                 f"{self._reason(header)}")  # fmt: skip
        return pixels

    def _check(self, headers: list[Header]):
        """Raise a `ValueError` unless they are of this model."""
        weights, num_classes = self._weights_hash(), self._class_config.num_classes
        for i, header in enumerate(headers):
            if header.weights != weights:
                raise ValueError(f"expected stream {i} of the weights {weights.hex()}, which this "
                                 f"pipeline has, got one of {header.weights.hex()}")  # fmt: skip
            if header.label is not None and header.label > num_classes:
                raise ValueError(f"expected stream {i} of a class in 0 … {num_classes}, the last "
                                 f"one the null class, got {header.label}")  # fmt: skip

    def _reason(self, header: Header) -> str:
        here = self._arithmetic(header.is_whole, self._at_a_time())
        known = [_hash(here, 1)] if header.is_whole else self._sizes()
        if header.arithmetic in known:
            return "the stream is damaged, or ends too early, or torch was set otherwise"
        return ("it was made with other arithmetic (device, kind of processor, precision or "
                f"version of torch) than that of this machine, {here}")  # fmt: skip

    @contextmanager
    def _computing(self, is_whole: bool) -> Iterator[None]:
        with _ALONE, torch.autocast(self._execution_device.type, enabled=False):
            with fixed_point_arithmetic() if is_whole else nullcontext():
                yield

    def _walk(
        self,
        factor: int,
        before: list[Tensor],
        class_labels: Tensor,
        choose: StepFn,
        code_noise: float = 0.0,
    ) -> Tensor:
        """Over z_1 if `factor` is 0, else over z_{factor + 1} or s, given [z_1 … z_factor]."""
        if factor == 0:
            prior = self._require_prior()
            known = known_labels(class_labels, prior.config)
            return prior.walk(len(class_labels), choose, known)
        level, size = self.levels[factor - 1], self.grid_sizes[factor]
        known = known_labels(class_labels, level.config)
        return level.walk(before[factor - 1], choose, known, code_noise, size)

    def _shown(self, codes: list[Tensor]) -> Tensor:
        """What z_1 … z_k alone say, uint8 (B, C, H, W)."""
        codes = [grid.cpu() for grid in codes]
        if all(level.auxiliary is not None for level in self.levels):
            return unit_to_uint8(self.preview(codes, output_type="pt"))
        return unit_to_uint8(self(codes=codes, num_levels=len(codes), output_type="pt").images)

    def _at_a_time(self) -> int:
        """Always, with others for padding where there are fewer: what is computed of an image may
        differ in its last digits between batches of other sizes, and between places in a batch
        whose numbers do not fill the registers of a processor. A power of two, and not a small one,
        as those of registers are."""
        return _power_of_two(min(MAX_IMAGES, MAX_VALUES // math.prod(self.image_shape)))

    def _sizes(self) -> dict[bytes, int]:
        """How many at a time by the hash in a header: of this version's streams in floats, and of
        earlier ones'."""
        before = _power_of_two(min(64, 2**16 // math.prod(self.image_shape[1:])))
        sizes = (before, self._at_a_time())
        return {_hash(self._arithmetic(False, size), 1): size for size in sizes}

    def _arithmetic(self, is_whole: bool, images_at_a_time: int) -> str:
        device, dtype = self._execution_device, next(self.levels[0].parameters()).dtype
        if is_whole:
            return f"whole numbers, {dtype}"
        kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
        kind = torch.cuda.get_device_name(device) if kind == "cuda" else kind
        version = ".".join(torch.__version__.split(".")[:2])
        return f"{kind}, {dtype}, torch {version}, {images_at_a_time} images at a time"

    def stream_id(self, arithmetic: str = "float") -> str:
        """What all streams have in common that this pipeline makes on this machine, in hexadecimal.

        Args:
            arithmetic: as in `compress`.
        """
        self._check_arithmetic(arithmetic)
        made = self._arithmetic(arithmetic == "integer", self._at_a_time())
        return (self._weights_hash() + _hash(made, 1)).hex()

    @staticmethod
    def _check_arithmetic(arithmetic: str):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"expected arithmetic among {ARITHMETICS}, got {arithmetic!r}")

    def _weights_hash(self) -> bytes:
        """Of all weights, as they are now, and of what networks have computed when they were made:
        tables of rotary positions, which another machine may round otherwise."""
        digest = hashlib.sha256()
        for name in self.factor_names:
            part = getattr(self, name)
            tensors = {**part.state_dict(), **dict(part.named_buffers())}
            for key, value in sorted(original_names(tensors).items()):
                digest.update(f"{name}.{key} {tuple(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy())
        return digest.digest()[:2]


def _hash(text: str, num_bytes: int) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:num_bytes]


def _power_of_two(number: int) -> int:
    """The largest up to a number, and MIN_IMAGES at least."""
    return 1 << (max(MIN_IMAGES, number).bit_length() - 1)


def _padded(batch: Tensor, size: int) -> Tensor:
    """The last example repeated."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])
