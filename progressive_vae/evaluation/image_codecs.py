"""What image files cost: bits/dim of lossless formats, rate and distortion of lossy ones."""

import io
from contextlib import suppress

import numpy as np
import PIL.Image
import torch

from .likelihood import psnr_of

LOSSY = {"JPEG": range(1, 40, 4), "WebP": range(0, 60, 6), "JPEG-XL": range(25, 5, -2)}
LOSSLESS: dict[str, dict] = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "quality": 100, "method": 6},
    "JPEG-XL": {"lossless": True, "effort": 9},
}


def image_files(images: torch.Tensor) -> tuple[dict[str, float], dict[str, list]]:
    """Of image files, one file an image: bits/dim of lossless ones, and (bits/dim, mean squared
    error) of lossy ones at low qualities."""
    arrays = [image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
              for image in images]  # fmt: skip
    curves: dict[str, list[tuple[float, float]]] = {}
    lossless = {}
    for name, options in LOSSLESS.items():
        with suppress(ImportError):  # imagecodecs is not there
            bits, squares = file_figures(name, arrays, options)
            assert squares == 0
            lossless[f"{name} files of {len(images)} images"] = bits
    for name, qualities in LOSSY.items():
        for quality in qualities:
            with suppress(ImportError):
                options = {"distance": quality} if name == "JPEG-XL" else {"quality": quality}
                curves.setdefault(name, []).append(file_figures(name, arrays, options))
    return lossless, {name: points for name, points in curves.items() if points}


def compare_with_codecs(
    rows: dict[str, dict[str, float]], curves: dict[str, list], num_dims: int
) -> dict[str, dict[str, dict[str, float]]]:
    """For each row of `rate_distortion` the bytes of an image of `num_dims` values and its PSNR in
    dB: of `codes` and what they preview, and of each format's best files that are no larger, or of
    its smallest ones where none are.

    Args:
        curves: those of `image_files`.
    """
    found = {}
    for name, row in rows.items():
        points = {"codes": (row["bits_per_dim"], row["mse_of_preview"])}
        for kind, files in curves.items():
            no_larger = [file for file in files if file[0] <= row["bits_per_dim"]]
            points[kind] = min(no_larger, key=lambda file: file[1]) if no_larger else min(files)
        found[name] = {
            kind: {"bytes": bits * num_dims / 8, "psnr": psnr_of(error)}
            for kind, (bits, error) in points.items()
        }
    return found


def file_figures(name: str, arrays: list[np.ndarray], options: dict) -> tuple[float, float]:
    """Bits/dim, and the mean squared error of the pixels that are read again."""
    bits = squares = 0.0
    for array in arrays:
        file, seen = codec_roundtrip(name, array, options)
        bits += 8 * len(file)
        squares += float(((seen.astype(float) - array) ** 2).sum())
    count = sum(array.size for array in arrays)
    return bits / count, squares / count


def codec_roundtrip(name: str, array: np.ndarray, options: dict) -> tuple[bytes, np.ndarray]:
    """A picture's file, and the pixels that are read again, uint8 of the same shape."""
    if name == "JPEG-XL":
        import imagecodecs

        file = imagecodecs.jpegxl_encode(array, **{"effort": 7, **options})
        return bytes(file), imagecodecs.jpegxl_decode(file).reshape(array.shape)
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, name, **options)
    seen = np.asarray(PIL.Image.open(buffer).convert("L" if array.ndim == 2 else "RGB"))
    return buffer.getvalue(), seen.reshape(array.shape)
