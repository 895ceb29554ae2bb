"""A folder of files as people have them: images of many kinds, and what is no image."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin


def png_of_depth(depth: int, color_type: int, row: bytes) -> bytes:
    """One pixel of a PNG file that Pillow does not write."""
    header = struct.pack(">IIBBBBB", 1, 1, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def image(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def write_images(folder: Path, rng: np.random.Generator):
    """Images that come back from their pixels."""
    for i, (width, height) in enumerate([(7, 5), (1, 1), (20, 11), (6, 17)]):
        image(rng, width, height).save(folder / f"{i}.png")
    image(rng, 9, 8, "L").save(folder / "gray.png")
    for name in ("windows.bmp", "unix.ppm", "scan.tif"):
        image(rng, 40, 24).save(folder / name)
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Title", "turned")
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    options = {"exif": exif, "pnginfo": text, "icc_profile": profile, "dpi": (72, 72)}
    image(rng, 30, 20).save(folder / "turned.png", **options)


def write_other_files(folder: Path, rng: np.random.Generator):
    """Files that are stored as they are."""
    deep = rng.integers(0, 2**16, (6, 6)).astype(np.uint16)
    PIL.Image.fromarray(deep).save(folder / "deep.png")
    PIL.Image.fromarray(deep).save(folder / "deep.tif")
    (folder / "deep_colors.png").write_bytes(png_of_depth(16, 2, b"\x12\x34" * 3))
    (folder / "deep.ppm").write_bytes(b"P6 1 1 65535\n\1\2\3\4\5\6")
    image(rng, 16, 16).quantize(4).save(folder / "palette.png")
    PIL.Image.new("P", (7, 5)).save(folder / "clear.png", transparency=0)
    image(rng, 8, 8, "RGBA").save(folder / "alpha.png")
    image(rng, 8, 8, "LA").save(folder / "gray_alpha.png")
    image(rng, 8, 8, "1").save(folder / "fax.png")
    frames = [image(rng, 8, 8) for _ in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    frames[0].save(folder / "animation.gif", **more)
    frames[0].save(folder / "animation.png", **more)
    frames[0].save(folder / "pages.tif", **more)
    frames[0].copy().save(folder / "phone.jpg", "MPO", **more)
    (folder / "cut.tif").write_bytes((folder / "pages.tif").read_bytes()[:300])
    image(rng, 8, 8).save(folder / "longer.png")
    complete = (folder / "longer.png").read_bytes()
    (folder / "cut.png").write_bytes(complete[:60])
    (folder / "longer.png").write_bytes(complete + b"hidden")
    image(rng, 16, 16, "CMYK").save(folder / "print.jpg")
    image(rng, 16, 16).save(folder / "icon.ico", sizes=[(8, 8), (16, 16)])
    (folder / "notes.txt").write_text("no image " * 99)
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(rng.bytes(3000))
    (folder / "notes.txt").chmod(0o755)


def write_odd_folder(folder: Path):
    rng = np.random.default_rng(0)
    for name in ("images", "others", "names/a.bmp.png", "empty_folder/inside"):
        (folder / name).mkdir(parents=True)
    write_images(folder / "images", rng)
    write_other_files(folder / "others", rng)
    names = folder / "names"
    for name in ("a.bmp", "a", "a.bmp.png/b.png"):  # the first would come back as the folder
        image(rng, 16, 12).save(names / name, "PNG" if name != "a.bmp" else "BMP")
    image(rng, 16, 12).save(names / ("n" * 250 + ".bmp"))
    image(rng, 16, 12).save(names / ("m" * 251 + ".png"))
    (names / 'COM1: "x|y"?\n.txt').write_text("not for Windows")
    (names / ".hidden").write_text("hidden")
    with open(os.fsencode(names) + b"/caf\xe9.png", "wb") as file:
        file.write((folder / "images" / "0.png").read_bytes())
    (names / "link.png").symlink_to(folder / "images" / "0.png")
    (names / "linked_folder").symlink_to(folder / "images")
    (names / "circle").symlink_to(folder)
    (names / "nowhere").symlink_to("/no/such/file")
    os.mkfifo(names / "pipe")
