"""Image files whose pixels and metadata come back as a PNG file, with nothing lost.

These are images of 8-bit gray or color, without alpha, in one of four formats. All that a PNG file
has besides its pixels is in its other chunks (color profile, EXIF with the orientation, text),
which stay as they are. For other formats they are made here.
"""

import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFile

MAX_PIXELS = 2**26
SUFFIXES = (".png", ".bmp", ".dib", ".ppm", ".pgm", ".pnm", ".tif", ".tiff")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LOSSY = ("JPEG", "MPO")
_BMP_HEADER = (40).to_bytes(4, "little")  # its length; longer ones have a color space
# Of an image and how it is stored, and what a PNG file also has: resolution and profile.
_TIFF_TAGS = {254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 283, 284, 296, 317,
              322, 323, 324, 325, 339, 34675}  # fmt: skip
_BITS, _ORIENTATION, _RESOLUTION, _PLANES, _SAMPLES = 258, 274, 282, 284, 339
_MODES = {
    "1": "one bit a pixel",
    "P": "a palette",
    "PA": "a palette and alpha",
    "LA": "gray with alpha",
    "La": "gray with alpha",
    "RGBA": "colors with alpha",
    "RGBa": "colors with alpha",
    "CMYK": "four colors for print",
    "I": "more than 8 bits a channel",
    "F": "floating-point pixels",
}


class ExactImage(NamedTuple):
    """The pixels of an image as its file has them, and the PNG chunks before and after them.

    Args:
        pixels: uint8 (H, W, C), C = 1 or 3; not turned as EXIF says, which is among the chunks.
        before: the chunks between the header and the pixels.
        after: the chunks between the pixels and the end.
    """

    pixels: np.ndarray
    before: bytes
    after: bytes

    def to_png(self) -> bytes:
        pixels = self.pixels[..., 0] if self.pixels.shape[-1] == 1 else self.pixels
        parts = {kind: b"" for kind in (b"IHDR", b"IDAT", b"IEND")}
        for kind, chunk in _chunks(_png_of(PIL.Image.fromarray(pixels))):
            parts[kind] += chunk
        header, data, end = parts.values()
        return SIGNATURE + header + self.before + data + self.after + end


def read_exact_image(contents: bytes) -> ExactImage:
    """
    Raises:
        ValueError: no image, or one that would lose something as PNG; the message is the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = PIL.Image.open(BytesIO(contents))
            if image.width * image.height > MAX_PIXELS:
                raise _Reason(f"more than {MAX_PIXELS} pixels")
            _check_kind(image)
            before, after = _checked_chunks(image, contents)
            pixels = np.array(image)
        except _Reason:
            raise
        except Exception as error:  # each format has errors of its own for damaged files
            raise _Reason(f"no image that Pillow can read ({type(error).__name__})") from error
    return ExactImage(pixels.reshape(*pixels.shape[:2], -1), before, after)


class _Reason(ValueError):
    pass


def _check_kind(image: PIL.ImageFile.ImageFile):
    if image.format in _LOSSY:
        raise _Reason(f"{image.format}: smaller than its pixels without loss")
    if image.format not in ("PNG", "BMP", "DIB", "PPM", "TIFF"):
        raise _Reason(f"{image.format}: a PNG file would lose what only this format has")
    if (count := getattr(image, "n_frames", 1)) > 1:
        raise _Reason(f"{count} images in one file")
    if image.mode not in ("L", "RGB"):
        mode = image.mode.split(";")[0]
        raise _Reason(f"{_MODES.get(mode, 'no 8-bit gray or color')} (mode {image.mode})")


def _checked_chunks(image: PIL.ImageFile.ImageFile, contents: bytes) -> tuple[bytes, bytes]:
    """The PNG chunks before and after the pixels."""
    match image.format:
        case "PNG":
            return _png_chunks(contents)
        case "TIFF":
            _check_tiff(image)
        case "PPM":
            size = b"%d" % image.width + rb"\s+" + b"%d" % image.height
            header = re.match(rb"P[56]\s+" + size + rb"\s+255\s", contents)
            length = image.width * image.height * len(image.getbands())
            if header is None or len(contents) != header.end() + length:
                raise _Reason("PPM with comments, or other than 8 bits, or more than one image")
        case _:
            row = -(-image.width * len(image.getbands()) // 4) * 4
            tile = image.tile[0]
            if tile[0] != "raw" or _raw_mode(image) not in ("L", "BGR"):
                raise _Reason("BMP of other than 8 bits a channel")
            palette = 1024 if image.mode == "L" else 0
            start = 14 if image.format == "BMP" else 0  # of the header; DIB has no file header
            header_size = contents[start : start + 4]
            if header_size != _BMP_HEADER or tile[2] != start + 40 + palette:
                raise _Reason(
                    "BMP with a color space, a profile, few grays or data before its pixels"
                )
            if len(contents) > tile[2] + row * image.height + 4:
                raise _Reason("BMP with data behind its pixels")
    names = ["icc_profile"]
    # For a TIFF file without a resolution, Pillow reports 1 dpi.
    if image.format != "TIFF" or _RESOLUTION in image.tag_v2:  # type: ignore[attr-defined]
        names.append("dpi")
    metadata = {name: image.info[name] for name in names if name in image.info}
    return _png_chunks(_png_of(PIL.Image.new(image.mode, (1, 1)), **metadata))


def _check_tiff(image: PIL.ImageFile.ImageFile):
    tags = image.tag_v2  # type: ignore[attr-defined]
    if others := sorted({*tags} - _TIFF_TAGS):
        raise _Reason(f"TIFF with tags that a PNG file would lose: {others[:5]}")
    bits = {*tags.get(_BITS, (1,))}
    samples = {*tags.get(_SAMPLES, (1,))}  # 2: signed
    is_plain = tags.get(_PLANES, 1) == tags.get(_ORIENTATION, 1) == 1
    if bits != {8} or samples != {1} or not is_plain or _raw_mode(image) not in ("L", "RGB"):
        raise _Reason("TIFF of other than unsigned 8 bits a channel, or turned, or in planes")


def _raw_mode(image: PIL.ImageFile.ImageFile) -> str:
    """How a file stores a pixel, in Pillow's words."""
    arguments = image.tile[0][3]
    return arguments if isinstance(arguments, str) else (arguments or ("",))[0]


def _png_of(image: PIL.Image.Image, **metadata) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **metadata)
    return buffer.getvalue()


def _png_chunks(contents: bytes) -> tuple[bytes, bytes]:
    before = b""
    after = b""
    has_pixels = False
    for kind, chunk in _chunks(contents):
        if kind == b"IHDR" and (chunk[16] != 8 or chunk[17] not in (0, 2)):
            raise _Reason(f"{chunk[16]} bits a channel")
        if kind == b"acTL":
            raise _Reason("an animation")
        has_pixels |= kind == b"IDAT"
        if kind not in (b"IHDR", b"IDAT", b"IEND"):
            before += b"" if has_pixels else chunk
            after += chunk if has_pixels else b""
    return before, after


def _chunks(contents: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kind of each chunk of a PNG file, and all its bytes."""
    place = len(SIGNATURE)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", contents, place)
        chunk = contents[place : place + length + 12]
        if len(chunk) < length + 12 or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise _Reason("a PNG file that is damaged")
        yield kind, chunk
        place += len(chunk)
    if place != len(contents):
        raise _Reason("data behind the end of a PNG file")
