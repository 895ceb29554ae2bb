"""What may happen to files: images that are damaged, saved pipelines that are tampered with."""

import io
import json
import random
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file, save_file

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")


def picture(kind: str, draws: random.Random) -> bytearray:
    modes = {"JPEG": ["L", "RGB", "CMYK"], "AVIF": ["RGB"], "WEBP": ["RGB", "RGBA"]}
    mode = draws.choice(modes.get(kind, ["L", "RGB", "P", "1"]))
    mode = "RGB" if kind == "PPM" and mode == "P" else mode
    width, height = draws.randint(1, 80), draws.randint(1, 80)
    rng = np.random.default_rng(draws.getrandbits(32))
    small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    image = PIL.Image.fromarray(small).resize((width, height)).convert(mode)
    file, options = io.BytesIO(), {}
    if kind == "TIFF" and mode != "1":
        options["compression"] = draws.choice(["raw", "tiff_lzw", "tiff_deflate"])
    if kind in ("JPEG", "PNG") and draws.random() < 0.3:
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = draws.randint(1, 8)
        options["exif"] = exif
    image.save(file, kind, **options)
    return bytearray(file.getvalue())


def damage(file: bytearray, draws: random.Random) -> bytes:
    for _ in range(draws.choice([1, 1, 2, 4])):
        if not file:
            break
        place = min(int(draws.expovariate(1 / 60)), len(file) - 1)  # headers hold the most
        place = draws.choice([place, draws.randrange(len(file))])
        match draws.randrange(7):
            case 0:
                file[place] ^= 1 << draws.randrange(8)
            case 1:
                file[place : place + 4] = draws.choice([b"\xff" * 4, b"\0" * 4])
            case 2:
                del file[place:]
            case 3:
                file[place:place] = draws.randbytes(draws.randint(1, 40))
            case 4:
                end = place + draws.randint(1, 60)
                file[place:end] = draws.randbytes(len(file[place:end]))
            case 5:
                del file[place : place + draws.randint(1, 20)]
            case 6:
                other = draws.randrange(len(file))
                file[place : place + 8] = file[other : other + 8]
    return bytes(file)


VALUES = [0, -1, 1, 2, 3, 7, 10**6, 2**31, 10**18, 1e308, -0.5, float("nan"), "x", "", None, [], {},
          [1, 2, 3], {"a": 1}, True, [10**9, 10**9], "lattice", "fsq"]  # fmt: skip


def tamper(folder: Path, draws: random.Random) -> str:
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
    part = folder / draws.choice(parts)
    sealed, config = part / "model.safetensors", part / "config.json"
    files = [*folder.glob("*/*.json"), *folder.glob("*/*.safetensors"), folder / "model_index.json"]
    match draws.randrange(11):
        case 0 | 1:
            contents = bytearray(sealed.read_bytes())
            place = draws.randrange(len(contents))
            contents[place] ^= 1 << draws.randrange(8)
            sealed.write_bytes(contents)
            return f"a flipped bit in {sealed.name} of {part.name}"
        case 2:
            file = draws.choice(files)
            contents = file.read_bytes()
            file.write_bytes(contents[: draws.randrange(len(contents))])
            return f"{file.parent.name}/{file.name} cut"
        case 3:
            file = draws.choice(files)
            file.unlink()
            return f"{file.parent.name}/{file.name} gone"
        case 4:
            file = draws.choice([f for f in files if f.suffix == ".json"])
            contents = bytearray(file.read_bytes())
            for _ in range(draws.choice([1, 3])):
                contents[draws.randrange(len(contents))] = draws.randrange(256)
            file.write_bytes(contents)
            return f"bytes of {file.parent.name}/{file.name} changed"
        case 5 | 6 | 7:
            file = draws.choice([config, config, folder / "model_index.json"])
            fields = json.loads(file.read_text())
            inner = fields
            if isinstance(fields.get("backbone_config"), dict) and draws.random() < 0.6:
                inner = fields["backbone_config"]
            name, value = draws.choice(sorted(inner)), draws.choice(VALUES)
            is_dropped = draws.random() < 0.2
            if is_dropped:
                del inner[name]
            else:
                inner[name] = value
            file.write_text(json.dumps(fields))
            return f"{file.parent.name}/{file.name}: {name} {'dropped' if is_dropped else value!r}"
        case 8:
            loaded = load_file(sealed)  # what is written again has no seal
            name = draws.choice(sorted(loaded))
            what = draws.choice(["drop", "rename", "shape", "nan"])
            if what == "nan" and loaded[name].is_floating_point() and loaded[name].numel():
                loaded[name].view(-1)[0] = float("nan")
            elif what == "shape":
                loaded[name] = torch.zeros(3, 1)
            else:
                value = loaded.pop(name)
                loaded |= {"other." + name: value} if what == "rename" else {}
            save_file(loaded, sealed, {"format": "pt"})
            return f"{part.name}: {what} {name}"
        case 9:
            other = folder / draws.choice(parts) / draws.choice([sealed.name, config.name])
            (part / other.name).write_bytes(other.read_bytes())
            return f"{other.parent.name}/{other.name} in {part.name}"
        case _:
            file = draws.choice([f for f in files if f.suffix == ".json"])
            file.write_text(json.dumps(draws.choice(VALUES)))
            return f"{file.parent.name}/{file.name} of another kind"
