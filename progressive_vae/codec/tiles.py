"""Images of any size as tiles of a model's size, and their bytes in an archive.

The bytes of an image are

| bytes | |
|---|---|
| 4 | CRC-32 of the rest of this header and of the pixels |
| 5 varints | height, width, channels, lengths of the two fields that follow |
| … | PNG chunks before the pixels, and after them |
| … | tiles in raster order |

A tile is a varint 4·n + kind, and bytes that depend on its kind: a color (n bytes); nothing, where
it repeats the tile n places before it; its pixels, as they are or by deflate (n bytes); or a
stream of the model without a header (n bytes).
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bitstream import from_varint, to_varint
from .exact_image import MAX_PIXELS, ExactImage

CONSTANT, REPEAT, PIXELS, STREAM = range(4)
# Deflate that reaches this share of the pixels is not compared with the model.
TRIVIAL_SHARE = 1 / 32
_CHECKSUM_SIZE = 4


class TileCode(NamedTuple):
    """A tile in an archive. A repetition has no body."""

    kind: int
    number: int  # length of the body, or places back to the tile that is repeated
    body: bytes = b""

    def to_bytes(self) -> bytes:
        return to_varint(4 * self.number + self.kind) + self.body


class ImageHeader(NamedTuple):
    height: int
    width: int
    channels: int
    before: bytes
    after: bytes

    def to_bytes(self) -> bytes:
        numbers = [*self[:3], len(self.before), len(self.after)]
        return b"".join(map(to_varint, numbers)) + self.before + self.after

    def checksum(self, pixels: np.ndarray) -> bytes:
        crc = zlib.crc32(np.ascontiguousarray(pixels).data, zlib.crc32(self.to_bytes()))
        return crc.to_bytes(_CHECKSUM_SIZE, "big")

    def tile_shapes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of each tile's part of the image, without padding."""
        heights, widths = (
            [min(side, length - start) for start in range(0, length, side)]
            for length, side in zip((self.height, self.width), size, strict=True)
        )
        return [(height, width) for height in heights for width in widths]


def header_of(image: ExactImage) -> ImageHeader:
    height, width, channels = image.pixels.shape
    return ImageHeader(height, width, channels, image.before, image.after)


def image_to_bytes(image: ExactImage, codes: list[TileCode]) -> bytes:
    header = header_of(image)
    parts = [header.checksum(image.pixels), header.to_bytes()]
    return b"".join([*parts, *(code.to_bytes() for code in codes)])


def image_from_bytes(
    data: bytes, size: tuple[int, int]
) -> tuple[bytes, ImageHeader, list[TileCode]]:
    """The checksum, the header and the tiles of an image.

    Args:
        size: (height, width) of a tile.

    Raises:
        ValueError: damaged bytes.
    """
    place = _CHECKSUM_SIZE

    def number() -> int:
        nonlocal place
        value, length = from_varint(data[place : place + 4], "an image")
        place += length
        return value

    def take(length: int) -> bytes:
        nonlocal place
        place += length
        if place > len(data):
            raise ValueError("expected all bytes of an image, got fewer")
        return data[place - length : place]

    height, width, channels, *lengths = (number() for _ in range(5))
    header = ImageHeader(height, width, channels, *map(take, lengths))
    if not 0 < height * width <= MAX_PIXELS or channels not in (1, 3):
        raise ValueError(f"expected an image, got one of {height}×{width}×{channels}")
    codes = list[TileCode]()
    for k, shape in enumerate(header.tile_shapes(size)):
        length, kind = divmod(number(), 4)
        if kind == REPEAT and not 1 <= length <= k or kind == CONSTANT and length != channels:
            raise ValueError(f"expected tile {k} of an image, got another")
        if kind == PIXELS and length > channels * shape[0] * shape[1]:
            raise ValueError(f"expected at most the pixels of tile {k}, got {length} bytes")
        codes.append(TileCode(kind, length, b"" if kind == REPEAT else take(length)))
    if place != len(data):
        raise ValueError("expected no more bytes of an image, got some")
    return data[:_CHECKSUM_SIZE], header, codes


def simple_codes(pixels: np.ndarray, size: tuple[int, int]) -> tuple[list[TileCode], list[int]]:
    """The code of each tile without the model, and the places of those for which it may be shorter.

    Args:
        pixels: uint8 (H, W, C).
    """
    height, width, channels = pixels.shape
    codes = list[TileCode]()
    places = list[int]()
    earlier = dict[bytes, int]()
    for top in range(0, height, size[0]):
        for left in range(0, width, size[1]):
            tile = pixels[top : top + size[0], left : left + size[1]]
            contents = tile.transpose(2, 0, 1).tobytes()  # one channel after the other
            k = len(codes)
            # Tiles of one shape repeat each other: those of the border may have others.
            key = contents + bytes(f"{tile.shape}", "ascii")
            if (tile == tile[0, 0]).all():
                codes.append(TileCode(CONSTANT, channels, tile[0, 0].tobytes()))
            elif key in earlier:
                codes.append(TileCode(REPEAT, k - earlier[key]))
            else:
                code = _pixel_code(contents)
                codes.append(code)
                if code.number > TRIVIAL_SHARE * len(contents):
                    places.append(k)
            earlier[key] = k
    return codes, places


def _pixel_code(contents: bytes) -> TileCode:
    deflated = zlib.compress(contents, 9)[2:-4]  # without zlib's header and checksum
    body = deflated if len(deflated) < len(contents) else contents
    return TileCode(PIXELS, len(body), body)


def decode_simple(code: TileCode, shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a constant tile, or of one of pixels: uint8 (h, w, C).

    Raises:
        ValueError: damaged bytes.
    """
    height, width, channels = shape
    if code.kind == CONSTANT:
        return np.broadcast_to(np.frombuffer(code.body, np.uint8), shape)
    contents = code.body
    count = height * width * channels
    if len(contents) < count:
        try:
            contents = zlib.decompressobj(-15).decompress(contents, count)
        except zlib.error as error:
            raise ValueError(f"expected the pixels of a tile, got others: {error}") from error
    if len(contents) != count:
        raise ValueError(f"expected {count} bytes of a tile, got {len(contents)}")
    return np.frombuffer(contents, np.uint8).reshape(channels, height, width).transpose(1, 2, 0)


def tile_at(pixels: np.ndarray, place: int, shape: tuple[int, int, int]) -> Tensor:
    """A tile of an image (H, W, C) in raster order, padded by repeating the border.

    Args:
        shape: (C, h, w) of the model.

    Returns:
        uint8 (C, h, w).
    """
    channels, height, width = shape
    row, column = divmod(place, -(-pixels.shape[1] // width))
    tile = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
    padding = [(0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0)]
    padded = np.pad(to_channels(tile, channels), padding, "edge")
    return torch.from_numpy(padded.transpose(2, 0, 1).copy())


def join_tiles(
    header: ImageHeader,
    codes: list[TileCode],
    decoded: dict[bytes, np.ndarray],
    shape: tuple[int, int, int],
) -> np.ndarray:
    """The image of tiles, uint8 (H, W, C).

    Args:
        decoded: tiles (h, w, C) of the model's streams.
        shape: (C, h, w) of the model.

    Raises:
        ValueError: damaged tiles.
        KeyError: a stream that is not in `decoded`.
    """
    image = np.empty((header.height, header.width, header.channels), np.uint8)
    tiles = list[np.ndarray]()
    num_columns = -(-header.width // shape[2])
    for k, (code, (height, width)) in enumerate(
        zip(codes, header.tile_shapes(shape[1:]), strict=True)
    ):
        if code.kind == STREAM:
            tile = decoded[code.body][:height, :width, : header.channels]
        elif code.kind == REPEAT:
            tile = tiles[k - code.number]
        else:
            tile = decode_simple(code, (height, width, header.channels))
        if tile.shape[:2] != (height, width):
            raise ValueError(f"expected tile {k} of {height}×{width}, got {tile.shape[:2]}")
        tiles.append(tile)
        row, column = divmod(k, num_columns)
        top = row * shape[1]
        left = column * shape[2]
        image[top : top + height, left : left + width] = tile  # a gray tile has all channels
    return image


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """An image (H, W, C) with the channels of a model.

    Raises:
        ValueError: colors, for a model of gray images.
    """
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 1 and (pixels != pixels[..., :1]).any():
        raise ValueError("colors, and the model is of gray images")
    return pixels[..., :1] if channels == 1 else np.repeat(pixels, channels, axis=-1)
