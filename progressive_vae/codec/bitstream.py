"""The header of a compressed image.

| bytes | |
|---|---|
| 1 | format; plus 128 if a class follows, plus 64 for fixed-point arithmetic |
| 2 | hash of the weights |
| 1 | hash of what floats depend on: device, kind of processor, torch, batch size |
| 4 | CRC-32 of the pixels |
| … | the class as a varint, if there is one |
| … | z_1, z_2 … z_N and s, entropy-coded, in words of 32 bits |

In format 2, the values of mixtures of logistics are coded in two digits; in format 1, which is
still read, in one. All other values are the same in both.
"""

import struct
from dataclasses import dataclass, field

FORMAT = 2
FORMAT_OF_DIGITS = 2  # the first one with two digits
FORMATS = (1, 2)  # that are read
# Flags that are added to the format.
IS_FIXED_POINT = 64
HAS_CLASS = 128
_FIXED_PART = struct.Struct("<B2s1sI")


@dataclass
class Header:
    """The fields of the table above; `length` is the header's own, in bytes, where it was read."""

    weights: bytes
    arithmetic: bytes
    checksum: int
    label: int | None = None
    is_fixed_point: bool = False
    format_number: int = FORMAT
    length: int = field(default=0, compare=False)

    def to_bytes(self) -> bytes:
        flags = IS_FIXED_POINT * self.is_fixed_point + HAS_CLASS * (self.label is not None)
        kind = self.format_number + flags
        start = _FIXED_PART.pack(kind, self.weights, self.arithmetic, self.checksum)
        return start if self.label is None else start + to_varint(self.label)

    @classmethod
    def from_bytes(cls, stream: bytes, name: str) -> "Header":
        """Read the first bytes of a stream, which errors call `name`.

        Raises:
            ValueError: too few bytes, or an unknown format.
        """
        size = _FIXED_PART.size
        if len(stream) < size:
            raise ValueError(f"expected {name} of {size} bytes or more, got {len(stream)}")
        kind, weights, arithmetic, checksum = _FIXED_PART.unpack_from(stream)
        format_number = kind % IS_FIXED_POINT
        if format_number not in FORMATS:
            raise ValueError(
                f"expected {name} of a format in {FORMATS}, got {format_number}: it is damaged, "
                "no such stream, or of a later version"
            )
        is_fixed_point = bool(kind & IS_FIXED_POINT)
        header = cls(weights, arithmetic, checksum, None, is_fixed_point, format_number, size)
        if kind >= HAS_CLASS:
            header.label, num_bytes = from_varint(stream[size:], name)
            header.length += num_bytes
        return header


def to_varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have 128 added."""
    rest, byte = divmod(number, 128)
    return bytes([byte + 128]) + to_varint(rest) if rest else bytes([byte])


def from_varint(stream: bytes, name: str) -> tuple[int, int]:
    """A number below 2²⁸, and its length in bytes."""
    number = 0
    for i, byte in enumerate(stream[:4]):
        number += byte % 128 << 7 * i
        if byte < 128:
            return number, i + 1
    raise ValueError(f"expected {name} with a class in its header, got {stream[:4]!r}")
