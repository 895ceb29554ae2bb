# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae[train]"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Make a data set of 32×32 pixel art from the tiles of Dungeon Crawl Stone Soup.

    python examples/prepare_sprites.py sprites
    accelerate launch examples/train.py --config examples/configs/sprites.yaml

The folder `sprites` gets train and test as parquet files, with the columns image, label and name,
and a card. The tiles are those of Debian's source package crawl 0.28, which the script downloads
(13 MB) unless `--tiles` is its folder `rltiles`. The majority of them are CC0 or in the public
domain: https://github.com/crawl/tiles.

Sprites stand on white. All variants of a name are in one split; the names of the test split are in
`examples/sprites/test_names.txt`. With `--validation` a twelfth of the other names is held out, for
`examples/compare_decoders.py --config examples/compare_sprites.yaml`. Left out are duplicates,
tiles of another size, tentacles, of which a tile is a piece, and nearly empty tiles.
"""

import argparse
import re
import tarfile
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import PIL.Image

from progressive_vae.scripts import run_script

SOURCE = "http://deb.debian.org/debian/pool/main/c/crawl/crawl_0.28.0.orig.tar.xz"
VALIDATION_STEP = 12  # every twelfth name of the training split
TEST_NAMES = Path(__file__).parent / "sprites" / "test_names.txt"
SIZE = (32, 32)
MIN_PIXELS = 64
# The class of the tiles below a folder; the first folder that contains a tile decides.
CLASSES = {
    "mon/tentacles": None,
    "mon/statues": "feature",
    "mon/demihumanoids": "character",
    "mon/humanoids": "character",
    "mon/player": "character",
    "mon/unique": "character",
    "mon": "monster",
    "player/base": "character",
    "player/transform": "character",
    "dngn/floor": "floor",
    "dngn/water": "floor",
    "dngn/wall": "wall",
    "dngn": "feature",
    "item/armour": "armor",
    "item/weapon": "weapon",
    "item": "item",
    "gui/abilities": "spell",
    "gui/invocations": "spell",
    "gui/skills": "spell",
    "gui/spells": "spell",
}
NAMES = sorted({name for name in CLASSES.values() if name})
CARD = """---
license: cc0-1.0
task_categories: [unconditional-image-generation, image-classification]
size_categories: [1K<n<10K]
---

# Sprites

32×32 RGB pixel art on white in nine classes ({classes}), with a `name` for each sprite:
{counts}. All variants of a name are in one split.

Made by `examples/prepare_sprites.py` of progressive_vae from the tiles of
Dungeon Crawl Stone Soup 0.28 (`rltiles/` of Debian's source package crawl).
Credit: Dungeon Crawl Stone Soup tiles, CC0 / public domain for the most part;
see <https://github.com/crawl/tiles>.
"""


def download(folder: Path) -> Path:
    """Download and unpack the tiles; return their folder."""
    archive, _ = urllib.request.urlretrieve(SOURCE, folder / "crawl.tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, (x for x in tar if "/rltiles/" in x.name), filter="data")
    return next(folder.rglob("rltiles"))


def class_of(path: PurePosixPath) -> str | None:
    """The class of a tile, by its path below `rltiles`."""
    folders = [str(folder) for folder in path.parents]
    return next((name for folder, name in CLASSES.items() if folder in folders), None)


def name_of(path: PurePosixPath) -> str:
    """The words of a file's name: `brick_dark_2_11.png` is "brick dark"."""
    return " ".join(re.sub(r"[\d_]+", " ", path.stem).split())


def read_sprite(path: Path) -> PIL.Image.Image | None:
    """The tile on white, or `None` if it is of another size or nearly empty."""
    with PIL.Image.open(path) as image:
        if image.size != SIZE:
            return None
        sprite = PIL.Image.new("RGBA", SIZE, "white")
        sprite.alpha_composite(image.convert("RGBA"))
    sprite = sprite.convert("RGB")
    num_pixels = (np.asarray(sprite) < 255).any(-1).sum()  # that are not white
    return sprite if num_pixels >= MIN_PIXELS else None


def sprites(tiles: Path) -> Iterator[dict]:
    """The examples of both splits, in the order of their files."""
    previous = set()
    for path in sorted(tiles.rglob("*.png")):
        relative = PurePosixPath(path.relative_to(tiles).as_posix())
        label = class_of(relative)
        if label is None or path.name.startswith("."):
            continue
        sprite = read_sprite(path)
        if sprite is None or sprite.tobytes() in previous:
            continue
        previous.add(sprite.tobytes())
        yield {"image": sprite, "label": label, "name": name_of(relative)}


def split_names(examples: list[dict], with_validation: bool) -> dict[str, list[dict]]:
    """The examples of each split; all of one name and class are in the same."""
    names = [f"{example['label']}: {example['name']}" for example in examples]
    test_names = {*TEST_NAMES.read_text().splitlines()}
    train_names = sorted({*names} - test_names)
    validation_names = {*train_names[::VALIDATION_STEP]} if with_validation else {*()}
    parts: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for example, name in zip(examples, names, strict=True):
        is_validation = name in validation_names
        split = "test" if name in test_names else "validation" if is_validation else "train"
        parts[split].append(example)
    return {split: part for split, part in parts.items() if part}


def write_splits(parts: dict[str, list[dict]], output_dir: Path):
    """Write the data set, and print how many sprites each class has."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=NAMES),
        name=datasets.Value("string"),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, part in parts.items():
        dataset = datasets.Dataset.from_list(part, features=features)
        dataset.to_parquet(output_dir / f"{split}.parquet")
        counts = Counter(example["label"] for example in part)
        print(f"{split}: {len(part)} ({', '.join(f'{x} {counts[x]}' for x in NAMES)})")
    counts = ", ".join(f"{len(part):,} {split}" for split, part in parts.items())
    card = CARD.format(classes=", ".join(NAMES), counts=counts)
    (output_dir / "README.md").write_text(card)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--validation", action="store_true", help="hold out a twelfth of the names to train on"
    )
    parser.add_argument("--tiles", type=Path, help="folder rltiles; by default it is downloaded")
    return parser.parse_args(words)


def main(words: list[str]):
    arguments = parse(words)
    if arguments.tiles is not None:
        examples = [*sprites(arguments.tiles)]
    else:
        with tempfile.TemporaryDirectory() as folder:
            examples = [*sprites(download(Path(folder)))]
    write_splits(split_names(examples, arguments.validation), arguments.output_dir)


if __name__ == "__main__":
    run_script(main)
