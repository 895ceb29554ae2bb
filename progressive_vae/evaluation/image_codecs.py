"""Image codecs as baselines: bits/dim of lossless formats, rate–distortion of lossy ones."""

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
    """Return the size of image files, one file an image, headers included.

    Args:
        images: uint8 (B, C, H, W).

    Returns:
        Bits/dim of each lossless format, and for each lossy format its rate–distortion curve at
        low qualities: (bits/dim, mean squared error).
    """
    arrays = as_arrays(images)
    lossless: dict[str, float] = {}
    for name, options in LOSSLESS.items():
        with suppress(ImportError):  # imagecodecs is not installed
            bits, squared_error = rate_and_distortion(name, arrays, options)
            assert squared_error == 0
            lossless[f"{name} files of {len(images)} images"] = bits
    return lossless, lossy_curves(arrays)


def as_arrays(images: torch.Tensor) -> list[np.ndarray]:
    """Return images (B, C, H, W) as arrays, (H, W) or (H, W, 3)."""
    return [image.movedim(0, -1).squeeze(-1).numpy() for image in images]


def lossy_curves(arrays: list[np.ndarray]) -> dict[str, list[tuple[float, float]]]:
    """Return for each lossy format its (bits/dim, mean squared error) at low qualities."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, qualities in LOSSY.items():
        for quality in qualities:
            with suppress(ImportError):
                options = {"distance": quality} if name == "JPEG-XL" else {"quality": quality}
                curves.setdefault(name, []).append(rate_and_distortion(name, arrays, options))
    return {name: points for name, points in curves.items() if points}


def compare_with_codecs(
    rows: dict[str, dict[str, float]], curves: dict[str, list], num_dims: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare previews from codes with lossy image files at the same rate.

    Args:
        rows: of `rate_distortion`.
        curves: of `image_files`.
        num_dims: C·H·W of an image.

    Returns:
        For each row the bytes of an image and its PSNR in dB: of the "codes" and their preview,
        and of each format's best files that are no larger (else of its smallest files).
    """
    comparison = {}
    for name, row in rows.items():
        points = {"codes": (row["bits_per_dim"], row["mse_of_preview"])}
        for kind, files in curves.items():
            no_larger = [file for file in files if file[0] <= row["bits_per_dim"]]
            points[kind] = min(no_larger, key=lambda file: file[1]) if no_larger else min(files)
        comparison[name] = {
            kind: {"bytes": bits * num_dims / 8, "psnr": psnr_of(error)}
            for kind, (bits, error) in points.items()
        }
    return comparison


def rate_and_distortion(name: str, arrays: list[np.ndarray], options: dict) -> tuple[float, float]:
    """Return bits/dim and the mean squared error of a format's files."""
    bits = squared_error = 0.0
    for array in arrays:
        file, decoded = codec_roundtrip(name, array, options)
        bits += 8 * len(file)
        squared_error += float(((decoded.astype(float) - array) ** 2).sum())
    num_dims = sum(array.size for array in arrays)
    return bits / num_dims, squared_error / num_dims


def codec_roundtrip(name: str, array: np.ndarray, options: dict) -> tuple[bytes, np.ndarray]:
    """Encode an image and decode it.

    Args:
        array: uint8 (H, W) or (H, W, 3).
        options: of the encoder.

    Returns:
        The bytes of the file, and the decoded pixels, uint8 of the same shape.

    Raises:
        ImportError: JPEG-XL without the package imagecodecs.
    """
    if name == "JPEG-XL":
        import imagecodecs

        file = imagecodecs.jpegxl_encode(array, **{"effort": 7, **options})
        return bytes(file), imagecodecs.jpegxl_decode(file).reshape(array.shape)
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, name, **options)
    decoded = np.asarray(PIL.Image.open(buffer).convert("L" if array.ndim == 2 else "RGB"))
    return buffer.getvalue(), decoded.reshape(array.shape)
