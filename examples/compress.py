# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train,codec]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Lossless compression of a folder, or of a dataset of images, into one archive.

    python examples/compress.py pack photos photos.pvae --model you/photos
    python examples/compress.py contents photos.pvae
    python examples/compress.py unpack photos.pvae restored --model you/photos
    python examples/compress.py grow photo.png progressive.png --model you/photos

Every file of the folder is in the archive: images as streams of the model where these lose nothing
and are shorter than the file, all else as it is. The same command continues after an interruption.
"""

import logging
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
from jsonargparse import auto_cli
from torch import Tensor
from tqdm.auto import tqdm

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.arguments import as_integer
from progressive_vae.codec import archive
from progressive_vae.codec.container import ArchiveReader
from progressive_vae.codec.exact_image import read_exact_image
from progressive_vae.codec.folder import Source, printable, source_of_file, sources_of_folder
from progressive_vae.codec.progressive import progressive_previews
from progressive_vae.evaluation.image_codecs import LOSSLESS, LOSSY, codec_roundtrip
from progressive_vae.evaluation.likelihood import psnr_of
from progressive_vae.image_files import MODES, convert_image, image_array, open_image
from progressive_vae.paths import expand_home
from progressive_vae.scripts import default_device, run_script

MODEL = str(Path(__file__).parent / "fashion_mnist")
PRICE = {
    "integer": "any CPU reads it; packing and unpacking take four to five times as long as with "
    "--arithmetic float",
    "float": "only machines of the same kind read it, with the same version of torch",
}


def pack(
    source: str,
    file: str,
    model: str = MODEL,
    split: str | None = None,
    max_files: int | None = None,
    arithmetic: str = "integer",
    verify: bool = True,
    beside_files: bool = True,
):
    """Compress a folder into one archive, and print its size beside those of PNG, WebP and JPEG-XL.

    Args:
        source: a folder or a file; with `split`, a dataset: its name or its folder.
        file: archive to write.
        model: a pipeline's folder, or its repository on the Hub.
        split: of a dataset.
        max_files: pack at most so many files.
        arithmetic: "integer", which any CPU reads, or "float", faster and for the same kind of
            machine.
        verify: decode all streams before the archive is complete.
        beside_files: also encode all images in the other formats.
    """
    path = Path(expand_home(file, "file"))
    if max_files is not None:
        max_files = as_integer("max_files", max_files, 1)
    sources = sources_of(source, split, path)[:max_files]
    if not sources:
        raise ValueError(f"expected files in {source}, got none")
    pipe = loaded(model)
    begun = time.perf_counter()
    print(f"arithmetic {arithmetic}: {PRICE.get(arithmetic, '')}")
    with progress_bar("pack", sum(item.size for item in sources)) as bar:
        result = archive.pack(pipe.stack, sources, path, model, arithmetic, verify, bar.update)
    seconds = time.perf_counter() - begun
    for (method, reason), count in result.counts.most_common():
        print(f"{count} as {method}: {reason}")
    if result.num_wrong:
        print(f"{result.num_wrong} tiles were not decoded to their pixels and are stored as pixels")
    for name in result.changed:
        print(f"changed after it was packed: {printable(name)}")
    for name, reason in result.absent:
        print(f"not in the archive: {printable(name)}: {reason}")
    print(sizes(sources, path, seconds, beside_files))


def unpack(
    file: str,
    output_dir: str,
    model: str = MODEL,
    only: str | None = None,
    preview: int | None = None,
):
    """Restore the files of an archive; files that exist are not overwritten.

    Args:
        file: of `pack`.
        output_dir: folder to write to.
        model: the pipeline that compressed the images.
        only: a name, a folder, or a pattern with * and ?.
        preview: k: only previews of images, from the codes z_1 … z_k.
    """
    path = Path(expand_home(file, "file"))
    folder = Path(expand_home(output_dir, "output_dir"))
    result = restored(path, folder, model, only, preview)
    report(result, f"wrote {result.written} files to {output_dir}")


def verify(file: str, model: str = MODEL):
    """Decode all files of an archive, and compare them with their checksums.

    Args:
        file: of `pack`.
        model: the pipeline that compressed the images.
    """
    result = restored(Path(expand_home(file, "file")), None, model)
    report(result, f"decoded {result.written} files")


def contents(file: str):
    """Print how an archive was made, and how and why each file is stored.

    Args:
        file: of `pack`.
    """
    with ArchiveReader(Path(expand_home(file, "file"))) as reader:
        print(", ".join(f"{name} {value}" for name, value in reader.header.items()))
        if reader.problem:
            print(reader.problem)
        for files in archive.stored_files(reader):
            for row, _ in files:
                name = printable(row.name)
                print(f"{row.length} of {row.size} bytes, {row.method}: {name}: {row.reason}")


def grow(image: str, file: str, model: str = MODEL):
    """Decode prefixes of an image's stream progressively, beside the smallest lossy files.

    Args:
        image: file of an image of the model's size.
        file: the image to write.
        model: a pipeline's folder, or its repository on the Hub.
    """
    pipe = loaded(model)
    path = expand_home(image, "image")
    mode = MODES[pipe.image_shape[0]]
    try:
        conversion = convert_image(open_image(Path(path).read_bytes()).image, mode)
    except ValueError as error:
        raise ValueError(f"expected image of mode {mode}, got {path}: {error}") from error
    array = image_array(conversion.image).transpose(1, 2, 0)
    stream = pipe.compress(array[None])[0]
    decoded = dict[str, np.ndarray]()
    for k, (length, preview) in enumerate(progressive_previews(pipe.stack, array[None], stream), 1):
        codes = "z_1" if k == 1 else f"z_1 … z_{k}"
        decoded[f"{codes}: {length} bytes"] = as_array(preview)
    half = (length + len(stream)) // 2
    pixels = pipe.decompress(stream[:half], allow_truncated=True)[0]
    decoded[f"half of s: {half} bytes"] = as_array(pixels)
    decoded[f"all: {len(stream)} bytes"] = as_array(pipe.decompress(stream)[0])
    for name, qualities in LOSSY.items():
        with suppress(ImportError):  # imagecodecs is not installed
            options = ({"distance" if name == "JPEG-XL" else "quality": q} for q in qualities)
            files = [codec_roundtrip(name, array.squeeze(), option) for option in options]
            data, pixels = min(files, key=lambda pair: len(pair[0]))
            decoded[f"{name}: {len(data)} bytes"] = pixels.reshape(array.shape)
    captioned = {}
    for name, pixels in decoded.items():
        error = np.square(pixels - array.astype(float)).mean()
        captioned[f"{name}, {f'{psnr_of(error):.1f} dB' if error else 'no loss'}"] = pixels
    side_by_side(captioned).save(file, "PNG")
    print("\n".join(captioned))


# ---- files ---------------------------------------------------------------------------------------


def sources_of(source: str, split: str | None, file: Path) -> list[Source]:
    """Return the files of a folder or of a dataset, without the archive's own ones."""
    path = Path(expand_home(source, "source"))
    if split is not None:
        return dataset_sources(str(path) if path.exists() else source, split)
    if path.is_dir():
        suffixes = ("", ".partial", ".partial.lock", ".journal")
        own_files = {file.resolve().with_name(file.name + suffix) for suffix in suffixes}
        return [*sources_of_folder(path.absolute(), own_files)]
    if path.exists():
        return [source_of_file(path, path.name)]
    raise ValueError(
        f"expected source to be a folder or a file, got {source!r}, which does not exist; "
        "--split is for datasets"
    )


def dataset_sources(name: str, split: str) -> list[Source]:
    """Return the image files of a dataset."""
    table = datasets.load_dataset(name, split=split)
    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise ValueError(f"expected a dataset of images, got columns {table.column_names}")
    images = table.cast_column(columns[0], datasets.Image(decode=False))[columns[0]]
    sources = []
    for i, image in enumerate(images):
        name = f"{i:08d}{Path(image['path'] or '').suffix}"
        if image["bytes"] is None:
            sources.append(source_of_file(Path(image["path"]), name))
        else:
            load = partial(bytes_of, images, i)  # read again when it is packed
            sources.append(Source(name, load, len(image["bytes"])))
    return sources


def bytes_of(images: datasets.Dataset, i: int) -> bytes:
    return images[i]["bytes"]


def loaded(model: str) -> ProgressiveVAEPipeline:
    pipe = ProgressiveVAEPipeline.from_pretrained(model)
    pipe.to(default_device()).set_progress_bar_config(disable=True)
    return pipe


def progress_bar(name: str, size: int) -> tqdm:
    return tqdm(total=size, desc=name, unit="B", unit_scale=True)


def restored(
    path: Path,
    folder: Path | None,
    model: str,
    only: str | None = None,
    preview: int | None = None,
) -> archive.Unpacking:
    with ArchiveReader(path):  # the error of another file, before a model is loaded
        pass
    pipe = loaded(model)
    with progress_bar("unpack", path.stat().st_size) as bar:
        return archive.unpack(pipe.stack, path, folder, only, preview, bar.update)


def report(result: archive.Unpacking, summary: str):
    """Print what happened to the files.

    Args:
        summary: the first words.

    Raises:
        ValueError: some were not restored.
    """
    print(f"{summary}, {result.unchanged} were there already")
    if result.skipped:
        print(f"{result.skipped} files have no preview")
    for name in result.differing:
        print(f"another file of this name exists: {printable(name)}")
    for name, reason in result.absent:
        print(f"not in the archive: {printable(name)}: {reason}")
    for name, reason in result.failed:
        print(f"not restored: {printable(name)}: {reason}")
    if result.failed:
        names = ", ".join(printable(name) for name, _ in result.failed[:5])
        raise ValueError(
            f"expected to restore all files, got {len(result.failed)} that failed: {names}"
        )


def sizes(sources: list[Source], path: Path, seconds: float, beside_files: bool) -> str:
    """Return a table of bytes and seconds of the folder, of other formats, and of the archive.

    In the other formats, an image that is not smaller remains the file that it is.
    """
    num_bytes = Counter({"the folder": sum(source.size for source in sources)})
    times = Counter[str]()
    for source in sources if beside_files else []:
        array = pixels_of(source)
        for name, options in LOSSLESS.items():
            with suppress(ImportError):  # imagecodecs is not installed
                length = source.size
                if array is not None:
                    begun = time.perf_counter()
                    length = min(length, len(codec_roundtrip(name, array, options)[0]))
                    times[name] += time.perf_counter() - begun
                num_bytes[name] += length
    num_bytes[path.name] = path.stat().st_size
    times[path.name] = seconds
    folder_size = max(1, num_bytes["the folder"])
    lines = [
        f"| {name} | {size} | {size / folder_size:.3f} | {times[name]:.1f} |"
        for name, size in num_bytes.items()
    ]
    title = f"| {len(sources)} files | bytes | share | seconds |"
    return "\n".join([title, "|---|---|---|---|", *lines])


def pixels_of(source: Source) -> np.ndarray | None:
    """Return the pixels of an image that the archive may hold as streams."""
    if source.problem or source.is_folder or source.size > archive.MAX_IMAGE_FILE:
        return None
    try:
        with source.open() as file:
            pixels = read_exact_image(file.read()).pixels
    except (ValueError, OSError):
        return None
    return pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels


# ---- images --------------------------------------------------------------------------------------


def as_array(image: Tensor) -> np.ndarray:
    return image.movedim(0, -1).numpy()


def as_pil(array: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def side_by_side(images: dict[str, np.ndarray], scale: int = 3) -> PIL.Image.Image:
    """Return a row of enlarged images with their names as captions."""
    height, width = (scale * n for n in next(iter(images.values())).shape[:2])
    step = max(width, 190) + 8  # room for a caption
    row = PIL.Image.new("RGB", (len(images) * step, height + 22), "white")
    for i, (name, image) in enumerate(images.items()):
        cell = as_pil(image)
        cell = cell.resize((scale * cell.width, scale * cell.height), PIL.Image.Resampling.NEAREST)
        row.paste(cell, (i * step, 0))
        PIL.ImageDraw.Draw(row).text((i * step, height + 4), name, "black")
    return row


def main(words: list[str]):
    # `contents` has the reason for each image that is stored as a file.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    auto_cli([pack, contents, unpack, verify, grow], args=words)


if __name__ == "__main__":
    run_script(main)
