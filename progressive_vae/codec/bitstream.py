"""What stands before the code of an image.

| bytes | |
|---|---|
| 1 | format; 128 more where a class follows, 64 more in whole numbers |
| 2 | hash of the weights |
| 1 | hash of what floats depend on: device, kind of processor, torch, images at a time |
| 4 | CRC-32 of the pixels |
| … | the class, seven bits a byte, if there is one |
| … | z_1, z_2 … z_N and s, in words of 32 bits |
"""

import struct
from dataclasses import dataclass, field

FORMAT, IS_WHOLE, HAS_CLASS = 1, 64, 128  # to the first the others are added


@dataclass
class Header:
    """What stands before the code of an image, but for the class's own bytes as in the table."""

    weights: bytes
    arithmetic: bytes
    checksum: int
    label: int | None = None
    is_whole: bool = False
    length: int = field(default=0, compare=False)

    def to_bytes(self) -> bytes:
        kind = FORMAT + IS_WHOLE * self.is_whole + HAS_CLASS * (self.label is not None)
        start = struct.pack("<B2s1sI", kind, self.weights, self.arithmetic, self.checksum)
        return start if self.label is None else start + _as_varint(self.label)

    @classmethod
    def from_bytes(cls, stream: bytes, which: str) -> "Header":
        """Of a stream's first bytes, `length` of them.

        Raises:
            ValueError: too few bytes, or a format that is none or of a later version.
        """
        start = struct.Struct("<B2s1sI")
        if len(stream) < start.size:
            raise ValueError(f"expected {which} of {start.size} bytes or more, got {len(stream)}")
        kind, weights, arithmetic, checksum = start.unpack_from(stream)
        if (found := kind % IS_WHOLE) != FORMAT:
            raise ValueError(f"expected {which} of format {FORMAT}, got {found}: it is "
                             "damaged, no such stream, or of a later version")  # fmt: skip
        is_whole = bool(kind & IS_WHOLE)
        header = cls(weights, arithmetic, checksum, None, is_whole, start.size)
        if kind >= HAS_CLASS:
            header.label, read = _of_varint(stream[start.size :], which)
            header.length += read
        return header


def _as_varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have 128 added."""
    rest, byte = divmod(number, 128)
    return bytes([byte + 128]) + _as_varint(rest) if rest else bytes([byte])


def _of_varint(stream: bytes, which: str) -> tuple[int, int]:
    """A number below 2²⁸, and its bytes."""
    number = 0
    for i, byte in enumerate(stream[:4]):
        number += byte % 128 << 7 * i
        if byte < 128:
            return number, i + 1
    raise ValueError(f"expected {which} with a class in its header, got {stream[:4]!r}")
