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
        a folder or a repository of a `VQModel`, or of a pipeline that has one (`vqvae`, `movq`).

    python conversion/convert_diffusers_vqmodel.py --reverse \
            --checkpoint_path runs/amused --output_path runs/vqmodel
        a folder that `VQModel.from_pretrained` loads, with the same weights.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    ADVICE,
    VQ_SLOTS,
    Arguments,
    check_table,
    choose_dtype,
    convert,
    fill,
    find,
    find_config,
    make_table,
    parse,
    read_checkpoint,
    replace_prefix,
    shorten,
    show,
    write,
)
from diffusers import VQModel

from progressive_vae import ProgressiveVAELevel
from progressive_vae.serialization import read_json

# What diffusers called the layers of an attention before 0.15.
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
INDEX = "model_index.json"


@dataclass
class VQModelArguments(Arguments):
    do_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "whether it sees images in [-1, 1] (true) or in [0, 1] (false); if not given, "
            "what its pipeline does, and true without one"
        },
    )
    reverse: bool = field(default=False, metadata={"help": "from a level to a VQModel"})


def slot(key: str) -> str | None:
    """The name in a level of a weight of a `VQModel`."""
    if ".attentions." in key:
        for old, new in OLD_NAMES.items():
            key = key.replace(old, new)
    return replace_prefix(key, VQ_SLOTS)


def locate(source: str) -> tuple[str, str | None]:
    """The subfolder of the `VQModel`, and the class of the pipeline that it is a part of."""
    if (path := find(source, INDEX)) is not None:
        index = read_json(path, ADVICE)
        parts = {name: part for name, part in index.items() if isinstance(part, list)}
        ours = [name for name, part in parts.items() if part[1:] == ["VQModel"]]
        if len(ours) != 1:
            raise ValueError(
                f"expected a pipeline with a VQModel in {source}, got one with the parts {parts}"
            )
        return ours[0], str(index.get("_class_name"))
    beside = Path(source).resolve().parent / INDEX
    if Path(source).is_dir() and beside.is_file():
        index = read_json(beside, ADVICE)
        part = index.get(Path(source).resolve().name)
        if isinstance(part, list) and part[1:] == ["VQModel"]:
            return "", str(index.get("_class_name"))
    return "", None


def read_config(arguments: VQModelArguments, subfolder: str) -> dict[str, Any]:
    """The arguments of `VQModel.__init__`, from the config that it has saved."""
    path = find_config(arguments, subfolder)
    fields = read_json(path, ADVICE)
    if fields.get("_class_name") != "VQModel":
        raise ValueError(
            f"expected the config of a VQModel (_class_name) in {path}, got "
            f"{fields.get('_class_name')!r}"
        )
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def to_level(arguments: VQModelArguments):
    subfolder, pipeline = locate(arguments.checkpoint_path)
    do_normalize = arguments.do_normalize
    if do_normalize is None:
        do_normalize = pipeline is None or not pipeline.startswith("Amused")
        why = "no pipeline says otherwise" if pipeline is None else f"it is of {pipeline}"
        print(f"do_normalize: {do_normalize}, as {why}")
    config = {"model_type": "vq_model", **read_config(arguments, subfolder)}
    weights = read_checkpoint(arguments.checkpoint_path, FILES, subfolder)
    convert(arguments, {**config, "do_normalize": do_normalize}, make_table(weights, slot))


def to_vqmodel(arguments: VQModelArguments):
    if arguments.config_file is not None or arguments.do_normalize is not None:
        raise ValueError("expected no config_file and no do_normalize with reverse, got some")
    level = ProgressiveVAELevel.from_pretrained(arguments.checkpoint_path)
    fields = dict(level.config.tokenizer_config or {})
    if fields.pop("model_type", None) != "vq_model":
        raise ValueError(
            f"expected a level with a 'vq_model' in tokenizer_config in "
            f"{arguments.checkpoint_path}, got {level.config.tokenizer_config}"
        )
    if not fields.pop("do_normalize", True):
        print("its images are in [0, 1], which a VQModel's config cannot say")
    ours = {new: old for old, new in VQ_SLOTS.items()}
    state = level.state_dict()
    kept = {key: state[key] for key in state if replace_prefix(key, ours) is not None}
    if left := [key for key in state if key not in kept]:
        print(f"left out: {len(left)} weights that are not the tokenizer's: {shorten(left)}")
    table = make_table(kept, lambda key: replace_prefix(key, ours))
    model = VQModel(**fields).to(choose_dtype(arguments, table)).eval()
    check_table(table, model.state_dict())
    if arguments.dry_run:
        show(table)
        return
    fill(model, table)
    write(arguments, model)


def main(words: list[str]):
    arguments = parse(words, __doc__, VQModelArguments)
    with torch.no_grad():
        to_vqmodel(arguments) if arguments.reverse else to_level(arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:  # of flags, files or the Hub
        sys.exit(f"error: {error}")
