"""Tiles to streams of the model and back, with a journal of what was done before a kill."""

import hashlib
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..stack import LevelStack
from . import codec
from .bitstream import FORMAT


class Journal:
    """Results by keys of 16 bytes, in a file that is read again after a kill.

    Args:
        path: `None`: without a file.

    Raises:
        ValueError: a file that is no journal.
    """

    _MAGIC = b"\x8bPVJ\r\n\x1a\n"
    _HEAD = struct.Struct("<16sII")

    def __init__(self, path: Path | None):
        self.path = path
        self.results = dict[bytes, bytes]()
        self.file: BinaryIO | None = None
        if path is not None and path.is_file():
            self._read(path.read_bytes())

    def _read(self, data: bytes):
        if not data.startswith(self._MAGIC[: len(data)]):
            raise ValueError(
                f"expected {self.path} of an interrupted run, got another file: move it elsewhere"
            )
        place = len(self._MAGIC)
        while len(data) - place >= self._HEAD.size:
            key, length, crc = self._HEAD.unpack_from(data, place)
            result = data[place + self._HEAD.size :][:length]
            if len(result) < length or zlib.crc32(result, zlib.crc32(key)) != crc:
                break
            self.results[key] = result
            place += self._HEAD.size + length

    def add(self, results: dict[bytes, bytes]):
        if self.path is None:
            self.results |= results
            return
        if self.file is None:
            self.file = open(self.path, "wb")  # noqa: SIM115
            self.file.write(self._MAGIC)
            results = self.results | results
        self.results |= results
        for key, result in results.items():
            crc = zlib.crc32(result, zlib.crc32(key))
            self.file.write(self._HEAD.pack(key, len(result), crc) + result)
        self.file.flush()

    def clear(self):
        """Forget all results."""
        self.results = {}
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class TileCoder:
    """Tiles of a model to streams and back, in batches, with a journal.

    Args:
        stack: the model.
        is_fixed_point: the arithmetic.
        journal: of streams or of tiles.
        format_number: of the streams that are decoded.
    """

    def __init__(
        self,
        stack: LevelStack,
        is_fixed_point: bool,
        journal: Journal,
        format_number: int = FORMAT,
    ):
        self.stack = stack
        self.is_fixed_point = is_fixed_point
        self.journal = journal
        self.format_number = format_number
        self.batch_size = codec.batch_size_of(stack)
        self.salt = codec.weights_digest(stack) + bytes([is_fixed_point, format_number])
        self.num_wrong = 0  # streams that were not decoded to their tiles

    def key(self, contents: bytes) -> bytes:
        return hashlib.sha256(self.salt + contents).digest()[:16]

    def encode(self, batch: Tensor, verify: bool) -> list[bytes]:
        """A stream for each tile, uint8 (n, C, h, w); it is empty if it is not decoded to the
        tile."""
        conditioning = self._conditioning(len(batch))
        streams = codec.encode_batch(self.stack, batch, conditioning, self.is_fixed_point)
        if verify:
            decoded, errors = self._decode_batch(streams, None)
            for i, (tile, result) in enumerate(zip(batch, decoded, strict=True)):
                if i in errors or not torch.equal(tile, result):
                    streams[i] = b""
                    self.num_wrong += 1
        return streams

    def decode(self, streams: Iterable[bytes], num_levels: int | None) -> dict[bytes, np.ndarray]:
        """The tiles, uint8 (h, w, C), of the streams that can be decoded.

        Args:
            num_levels: k: previews from z_1 … z_k.
        """
        prefix = bytes([num_levels or 0])
        keys = {stream: self.key(prefix + stream) for stream in streams}
        pending = [stream for stream, key in keys.items() if key not in self.journal.results]
        for start in range(0, len(pending), self.batch_size):
            batch = pending[start : start + self.batch_size]
            pixels, errors = self._decode_batch(batch, num_levels)
            decoded = {
                keys[stream]: image.numpy().tobytes()
                for i, (stream, image) in enumerate(zip(batch, pixels, strict=True))
                if i not in errors
            }
            self.journal.add(decoded)
        shape = self.stack.image_shape
        return {
            stream: np.frombuffer(tile, np.uint8).reshape(shape).transpose(1, 2, 0)
            for stream, key in keys.items()
            if (tile := self.journal.results.get(key)) is not None
        }

    def _decode_batch(
        self, streams: list[bytes], num_levels: int | None
    ) -> tuple[Tensor, dict[int, str]]:
        size = len(streams) if self.is_fixed_point else self.batch_size
        conditioning = self._conditioning(len(streams))
        return codec.decode_batch(
            self.stack,
            streams,
            conditioning,
            self.is_fixed_point,
            size,
            num_levels,
            format_number=self.format_number,
        )

    def _conditioning(self, count: int) -> Conditioning:
        return self.stack.as_conditioning(None, count)
