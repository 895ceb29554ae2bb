"""From a file to pixels: the one way in for training, the codec, scripts and the demo.

`list_files` walks a folder, `open_image` decodes a file, and `convert_image` makes what was decoded
an 8-bit image of a model's mode. Each says what it left out or changed.
"""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

MAX_IMAGE_PIXELS = 2**27  # of one file: the largest cameras' images, 403 MB in RGB
MODES = {1: "L", 3: "RGB"}  # of a number of channels
GRAY_MODES = ("1", "L", "LA", "La")

_LOSSLESS = {("1", "L"), ("1", "RGB"), ("L", "RGB"), ("P", "RGB")}
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_LFS_POINTER = b"version https://git-lfs.github.com/"
_IGNORED_FOLDERS = ("__MACOSX",)


class OpenedImage(NamedTuple):
    """An image as its file has it, upright, and what of the file is not in it."""

    image: PIL.Image.Image
    omissions: list[str]


class Conversion(NamedTuple):
    """An 8-bit image of mode "L" or "RGB", what was done to the original, and whether the original
    pixel values follow from the new ones."""

    image: PIL.Image.Image
    steps: list[str]
    is_lossless: bool


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that Pillow reads: {".png", ".jpg", …}."""
    extensions = PIL.Image.registered_extensions()
    return frozenset(suffix for suffix, kind in extensions.items() if kind in PIL.Image.OPEN)


def list_files(folder: Path, hidden: bool = False) -> list[Path]:
    """All files below a folder, sorted by their paths.

    Links to folders are followed, but not in circles.

    Args:
        hidden: also files and folders whose names begin with a dot.
    """
    return sorted(_walk(folder, hidden, frozenset()))


def _walk(folder: Path, hidden: bool, ancestors: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in ancestors:
        return
    for path in folder.iterdir():
        if not hidden and (path.name.startswith(".") or path.name in _IGNORED_FOLDERS):
            continue
        if path.is_dir():
            yield from _walk(path, hidden, ancestors | {real})
        elif path.is_file():
            yield path


def is_utf8(path: str | Path) -> bool:
    """Whether a name can be stored as text: file systems also allow other bytes."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str | Path) -> str:
    """A name for people, with escapes for what is not UTF-8."""
    return os.fspath(path).encode(errors="backslashreplace").decode()


def open_image(contents: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> OpenedImage:
    """The decoded image of a file, turned as its EXIF orientation says.

    Raises:
        ValueError: a file that is no image, is damaged, or has more pixels than the limit; the
            message is the reason alone, for callers to name the file.
    """
    if contents.startswith(_LFS_POINTER):
        raise ValueError("a git-lfs pointer in place of an image: run `git lfs pull`")
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and max_image_pixels > limit:
        PIL.Image.MAX_IMAGE_PIXELS = max_image_pixels  # Pillow would refuse the file first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file is decoded, or refused with a reason
        try:
            image = PIL.Image.open(BytesIO(contents))
            if image.width * image.height <= max_image_pixels:
                omissions = _omissions(image)
                image.load()
                PIL.ImageOps.exif_transpose(image, in_place=True)
                return OpenedImage(image, omissions)
        except PIL.Image.DecompressionBombError as error:
            raise ValueError(f"more than {max_image_pixels} pixels") from error
        except Exception as error:  # each format has errors of its own for damaged files
            raise ValueError(f"no image that Pillow can read ({_first_line(error)})") from error
    raise ValueError(f"more than {max_image_pixels} pixels: {image.width}×{image.height}")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    name = type(error).__name__
    # Pillow names the buffer in memory, which tells a reader nothing.
    if not lines or "BytesIO" in lines[0]:
        return name
    return f"{name}: {lines[0]}"


def _omissions(image: PIL.Image.Image) -> list[str]:
    omissions = []
    # Further images of an MPO are a depth map, a gain map or a thumbnail of the first one.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        omissions.append(f"only the first of {frames} frames")
    # Pillow decodes color of 16 bits as 8 bits; only the tile's description tells.
    if image.mode in ("RGB", "RGBA") and ";16" in str(getattr(image, "tile", "")):
        omissions.append("16 bits a channel reduced to 8")
    return omissions


def is_gray(image: PIL.Image.Image) -> bool:
    return image.mode in GRAY_MODES or is_deep(image)


def is_deep(image: PIL.Image.Image) -> bool:
    """Whether its single channel has more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_transparency(image: PIL.Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def convert_image(image: PIL.Image.Image, mode: str, reduce_depth: bool = False) -> Conversion:
    """Any image as an 8-bit one of `mode`, "L" or "RGB".

    Transparent pixels are composited on white, so that colors hidden below alpha 0 are not seen.

    Args:
        reduce_depth: map more than 8 bits to 8, over the image's own range of values.

    Raises:
        ValueError: more than 8 bits a channel, without `reduce_depth`.
    """
    steps = []
    if is_deep(image):
        if not reduce_depth:
            raise ValueError(f"more than 8 bits a channel (mode {image.mode!r})")
        image = _reduce_depth(image)
        steps.append("reduced to 8 bits over its range of values")
    is_lossless = not steps
    if has_transparency(image):
        image = _composite_on_white(image)
        steps.append("transparency composited on white")
        is_lossless = False
    if image.mode != mode:
        is_lossless = is_lossless and (image.mode, mode) in _LOSSLESS
        steps.append(f"converted from {image.mode} to {'grayscale' if mode == 'L' else mode}")
        if image.mode == "LAB":  # Pillow converts it to RGB alone
            image = image.convert("RGB")
        image = image.convert(mode)
    return Conversion(image, steps, is_lossless)


def _reduce_depth(image: PIL.Image.Image) -> PIL.Image.Image:
    array = np.nan_to_num(np.asarray(image, np.float64))
    array -= array.min()
    return PIL.Image.fromarray((255 * array / (array.max() or 1)).astype(np.uint8))


def _composite_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An opaque image, "L" of a gray one, else "RGB"."""
    mode = "L" if image.mode in GRAY_MODES else "RGB"
    if image.mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    layer = image.convert("RGBA")
    background = PIL.Image.new("RGBA", layer.size, "white")
    background.alpha_composite(layer)
    return background.convert(mode)


def image_array(image: PIL.Image.Image) -> np.ndarray:
    """uint8 (C, H, W) of an image of mode "L" or "RGB"."""
    array = np.array(image)  # a copy: torch warns of arrays that cannot be written
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


# ---- size ----------------------------------------------------------------------------------------


def crop_square(image: PIL.Image.Image, rng: np.random.Generator | None = None) -> PIL.Image.Image:
    """The middle square, or with `rng` one from anywhere along the longer side."""
    side = min(image.size)
    margins = [length - side for length in image.size]
    left, upper = (
        (margin // 2 if rng is None else int(rng.integers(margin + 1))) for margin in margins
    )
    return image.crop((left, upper, left + side, upper + side))


def resize_shorter_side(
    image: PIL.Image.Image, resolution: int, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> PIL.Image.Image:
    """
    Raises:
        ValueError: the result would have more pixels than the limit, as that of a narrow image.
    """
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(length * scale)) for length in image.size)
    if width * height > max_image_pixels:
        raise ValueError(
            f"{image.width}×{image.height} would become {width}×{height}, "
            f"more than {max_image_pixels} pixels"
        )
    if image.size == (width, height):
        return image
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)
