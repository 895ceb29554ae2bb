"""Random damage to image files, and random changes to the files of saved pipelines."""

import io
import json
import random
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file, save_file

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")


def make_image_file(kind: str, rng: random.Random) -> bytearray:
    modes = {"JPEG": ["L", "RGB", "CMYK"], "AVIF": ["RGB"], "WEBP": ["RGB", "RGBA"]}
    mode = rng.choice(modes.get(kind, ["L", "RGB", "P", "1"]))
    mode = "RGB" if kind == "PPM" and mode == "P" else mode
    width, height = rng.randint(1, 80), rng.randint(1, 80)
    pixels = np.random.default_rng(rng.getrandbits(32))
    small = pixels.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    image = PIL.Image.fromarray(small).resize((width, height)).convert(mode)
    file = io.BytesIO()
    options = {}
    if kind == "TIFF" and mode != "1":
        options["compression"] = rng.choice(["raw", "tiff_lzw", "tiff_deflate"])
    if kind in ("JPEG", "PNG") and rng.random() < 0.3:
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = rng.randint(1, 8)
        options["exif"] = exif
    image.save(file, kind, **options)
    return bytearray(file.getvalue())


def damage(file: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not file:
            break
        near_start = min(int(rng.expovariate(1 / 60)), len(file) - 1)  # most likely in the header
        start = rng.choice([near_start, rng.randrange(len(file))])
        match rng.randrange(7):
            case 0:
                file[start] ^= 1 << rng.randrange(8)
            case 1:
                file[start : start + 4] = rng.choice([b"\xff" * 4, b"\0" * 4])
            case 2:
                del file[start:]
            case 3:
                file[start:start] = rng.randbytes(rng.randint(1, 40))
            case 4:
                end = start + rng.randint(1, 60)
                file[start:end] = rng.randbytes(len(file[start:end]))
            case 5:
                del file[start : start + rng.randint(1, 20)]
            case 6:
                other = rng.randrange(len(file))
                file[start : start + 8] = file[other : other + 8]
    return bytes(file)


INTEGERS = [0, -1, 1, 2, 3, 7, 10**6, 2**31, 10**18]
FLOATS = [1e308, -0.5, float("nan")]
VALUES = [
    *INTEGERS,
    *FLOATS,
    *["x", "", "lattice", "fsq", None, True],
    *[[], {}, [1, 2, 3], {"a": 1}, [10**9, 10**9]],
]


def tamper(folder: Path, rng: random.Random) -> str:
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
    part = folder / rng.choice(parts)
    weights = part / "model.safetensors"
    config = part / "config.json"
    files = [*folder.glob("*/*.json"), *folder.glob("*/*.safetensors"), folder / "model_index.json"]
    match rng.randrange(11):  # most often a flipped bit or a changed field
        case 0 | 1:
            contents = bytearray(weights.read_bytes())
            header_size = 8 + int.from_bytes(contents[:8], "little")
            contents[rng.randrange(header_size)] ^= 1 << rng.randrange(8)
            weights.write_bytes(contents)
            return f"a flipped bit in the header of {part.name}/{weights.name}"
        case 2:
            file = rng.choice(files)
            contents = file.read_bytes()
            file.write_bytes(contents[: rng.randrange(len(contents))])
            return f"{file.parent.name}/{file.name} cut"
        case 3:
            file = rng.choice(files)
            file.unlink()
            return f"{file.parent.name}/{file.name} gone"
        case 4:
            file = rng.choice([f for f in files if f.suffix == ".json"])
            contents = bytearray(file.read_bytes())
            for _ in range(rng.choice([1, 3])):
                contents[rng.randrange(len(contents))] = rng.randrange(256)
            file.write_bytes(contents)
            return f"bytes of {file.parent.name}/{file.name} changed"
        case 5 | 6 | 7:
            file = rng.choice([config, config, folder / "model_index.json"])
            fields = json.loads(file.read_text())
            inner = fields
            if isinstance(fields.get("backbone_config"), dict) and rng.random() < 0.6:
                inner = fields["backbone_config"]
            name = rng.choice(sorted({*inner} - {"dtype"}))  # torch's AttributeError
            value = rng.choice(VALUES)
            is_deleted = rng.random() < 0.2
            if is_deleted:
                del inner[name]
            else:
                inner[name] = value
            file.write_text(json.dumps(fields))
            return f"{file.parent.name}/{file.name}: {name} {'deleted' if is_deleted else value!r}"
        case 8:
            loaded = load_file(weights)
            name = rng.choice(sorted(loaded))
            change = rng.choice(["drop", "rename", "shape", "nan"])
            if change == "nan" and loaded[name].is_floating_point() and loaded[name].numel():
                loaded[name].view(-1)[0] = float("nan")
            elif change == "shape":
                loaded[name] = torch.zeros(3, 1)
            else:
                value = loaded.pop(name)
                loaded |= {"other." + name: value} if change == "rename" else {}
            save_file(loaded, weights, {"format": "pt"})
            return f"{part.name}: {change} {name}"
        case 9:
            other = folder / rng.choice(parts) / rng.choice([weights.name, config.name])
            (part / other.name).write_bytes(other.read_bytes())
            return f"{other.parent.name}/{other.name} in {part.name}"
        case _:
            file = rng.choice([f for f in files if f.suffix == ".json"])
            file.write_text(json.dumps(rng.choice(VALUES)))
            return f"{file.parent.name}/{file.name} of another kind"
