# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A `VQModel` of diffusers as the finest level of a progressive VAE, and back.

    python conversion/convert_diffusers_vqmodel.py \
            --checkpoint_path amused/amused-256 --output_path runs/amused
        a folder or a repository of a `VQModel`, or of a pipeline with one (`vqvae`, `movq`).

    python conversion/convert_diffusers_vqmodel.py --reverse \
            --checkpoint_path runs/amused --output_path runs/vqmodel
        a folder for `VQModel.from_pretrained`, with the same weights.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    ADVICE,
    VQ_PREFIXES,
    ReversibleArguments,
    check_table,
    choose_dtype,
    convert,
    find,
    find_config,
    load_table,
    make_table,
    parse,
    print_table,
    read_checkpoint,
    read_level,
    replace_prefix,
    write,
)
from diffusers import VQModel

from progressive_vae.scripts import run_script
from progressive_vae.serialization import read_json

# Names of attention layers in diffusers before 0.15, and since then.
ATTENTION_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
INDEX = "model_index.json"


@dataclass
class VQModelArguments(ReversibleArguments):
    do_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "whether its images are in [-1, 1] (true) or in [0, 1] (false); default: as "
            "its pipeline does, and true without one"
        },
    )


def convert_key(key: str) -> str | None:
    """Return the key in a level of a weight of a `VQModel`."""
    if ".attentions." in key:
        for old, new in ATTENTION_NAMES.items():
            key = key.replace(old, new)
    return replace_prefix(key, VQ_PREFIXES)


def locate(source: str) -> tuple[str, str | None]:
    """Return the subfolder of the `VQModel`, and the class of its pipeline, if it has one."""
    if (path := find(source, INDEX)) is not None:
        index = read_json(path, ADVICE)
        parts = {name: part for name, part in index.items() if isinstance(part, list)}
        names = [name for name, part in parts.items() if part[1:] == ["VQModel"]]
        if len(names) != 1:
            raise ValueError(
                f"expected a pipeline with a VQModel in {source}, got one with the parts {parts}"
            )
        return names[0], str(index.get("_class_name"))
    parent_index = Path(source).resolve().parent / INDEX
    if Path(source).is_dir() and parent_index.is_file():
        index = read_json(parent_index, ADVICE)
        part = index.get(Path(source).resolve().name)
        if isinstance(part, list) and part[1:] == ["VQModel"]:
            return "", str(index.get("_class_name"))
    return "", None


def read_config(arguments: VQModelArguments, subfolder: str) -> dict[str, Any]:
    """Return the arguments of `VQModel.__init__` from its saved config."""
    path = find_config(arguments, subfolder)
    fields = read_json(path, ADVICE)
    if fields.get("_class_name") != "VQModel":
        raise ValueError(
            f"expected the config of a VQModel (_class_name) in {path}, got "
            f"{fields.get('_class_name')!r}"
        )
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def to_level(arguments: VQModelArguments):
    subfolder, pipeline_class = locate(arguments.checkpoint_path)
    do_normalize = arguments.do_normalize
    if do_normalize is None:
        do_normalize = pipeline_class is None or not pipeline_class.startswith("Amused")
        print(f"do_normalize: {do_normalize}, the default of {pipeline_class or 'VQModel'}")
    config = {"model_type": "vq_model", **read_config(arguments, subfolder)}
    weights = read_checkpoint(arguments.checkpoint_path, FILES, subfolder)
    convert(arguments, {**config, "do_normalize": do_normalize}, make_table(weights, convert_key))


def to_vqmodel(arguments: VQModelArguments):
    if arguments.do_normalize is not None:
        raise ValueError("expected no do_normalize with reverse, got one")
    fields, weights = read_level(arguments, {"model_type": "vq_model", "similarity": "euclidean"})
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "similarity")}
    if not fields.pop("do_normalize", True):
        print("its images are in [0, 1], which a VQModel's config has no field for")
    prefixes = {target: source for source, target in VQ_PREFIXES.items()}
    table = make_table(weights, lambda key: replace_prefix(key, prefixes))
    model = VQModel(**fields).to(choose_dtype(arguments, table)).eval()
    check_table(table, model.state_dict())
    if arguments.dry_run:
        print_table(table)
        return
    load_table(model, table)
    write(arguments, model)


def main(words: list[str]):
    arguments = parse(words, __doc__, VQModelArguments)
    with torch.no_grad():
        if arguments.reverse:
            to_vqmodel(arguments)
        else:
            to_level(arguments)


if __name__ == "__main__":
    run_script(main)
