# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""An image tokenizer of SEED-Voken, Open-MAGVIT2 or IBQ, as the finest level, and back.

    python conversion/convert_seed_voken.py --checkpoint_path pretrain256_262144.ckpt \
            --config_file pretrain_lfqgan_256_262144.yaml --output_path runs/magvit2
        a checkpoint and the config of its training.

    python conversion/convert_seed_voken.py --reverse \
            --checkpoint_path runs/magvit2 --output_path runs/back
        a folder with `model.ckpt`, which SEED-Voken loads.

Where a checkpoint has moving averages of the weights, these are converted, as SEED-Voken encodes
with them. If it contains objects beside the weights, see `convert_taming_vqgan.py`. A code of
Open-MAGVIT2 is one integer; its transformers see the low and the high bits as two.
"""

from functools import partial
from typing import Any

from common import (
    ReversibleArguments,
    convert,
    count_from_finest,
    infer_sizes,
    inverse,
    make_table,
    parse,
    read_level,
    read_weights,
    rename,
    section_of,
    write_checkpoint,
)
from convert_taming_vqgan import (
    as_vqmodel,
    read_ddconfig,
    read_yaml,
    to_convolution,
    to_linear,
)
from convert_taming_vqgan import convert_key as convert_vqgan_key
from torch import Tensor

from progressive_vae.scripts import run_script

# Parts of keys of Open-MAGVIT2, level → source, replaced in this order.
REPLACEMENTS = [
    (r"^(encoder|auxiliary)\.", ""),
    (r"\.mid\.", r".mid_block."),
    (r"\.up\.(\d+)\.adaptive\.", r".adaptive.\1."),
    (r"\.upsample\.conv\.", r".upsample.conv1."),
]
AVERAGES = "model_ema."  # prefix of moving averages, whose names have no further dots
IGNORED = ("loss.", "colorize", *(AVERAGES + name for name in ("decay", "num_updates", "loss")))
LFQ_CLASSES = ("lfqgan.VQModel", "lfqgan_pretrain.VQModel")
IBQ_CLASSES = ("ibqgan.IBQ", "ibqgan_pretrain.IBQ")


def convert_key(key: str, num_resolutions: int) -> str:
    """Return the key in Open-MAGVIT2 of a weight of a level."""
    return count_from_finest(rename(key, REPLACEMENTS), num_resolutions)


def use_averages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace weights by their moving averages."""
    names = {key.replace(".", ""): key for key in weights if not key.startswith(AVERAGES)}
    averages = {key: weight for key, weight in weights.items() if key.startswith(AVERAGES)}
    current = {key: weight for key, weight in weights.items() if key not in averages}
    return current | {
        names.get(key.removeprefix(AVERAGES), key): weight for key, weight in averages.items()
    }


def read_config(path: str | None, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the tokenizer config of a level, from a YAML file and the shapes of weights.

    Raises:
        ValueError: another model, or missing names.
    """
    config = read_yaml(path)
    model = section_of(config, "model", str(path))
    class_name = ".".join(str(model.get("class_path")).split(".")[-2:])
    if class_name in LFQ_CLASSES:
        sizes = infer_sizes(weights, "down", "block")
        num_bits = sizes.pop("latent_channels")
        return {"model_type": "lfq_vqgan", "network": "open_magvit2", **sizes, "num_bits": num_bits}
    if class_name not in IBQ_CLASSES:
        raise ValueError(
            f"expected a class_path of an image tokenizer, {[*LFQ_CLASSES, *IBQ_CLASSES]}, in "
            f"{path}, got {model.get('class_path')}"
        )
    params = section_of(model, "init_args", str(path))
    if params.get("remap") is not None:
        raise ValueError(f"expected no remap in {path}, got {params['remap']}")
    sizes = {name: params.get(name) for name in ("embed_dim", "n_embed")}
    ddconfig = read_ddconfig(section_of(params, "ddconfig", str(path)), str(path))
    return {**as_vqmodel({**ddconfig, **sizes}, str(path)), "similarity": "dot"}


def make_convert_key(config: dict[str, Any]):
    """Return the function level key → source key of a tokenizer."""
    if config["model_type"] == "lfq_vqgan":
        return partial(convert_key, num_resolutions=len(config["channel_multiplier"]))
    return partial(convert_vqgan_key, num_resolutions=len(config["block_out_channels"]))


def to_level(arguments: ReversibleArguments):
    weights = use_averages(read_weights(arguments.checkpoint_path, ignored=IGNORED))
    config = read_config(arguments.config_file, weights)
    weights = {key: to_linear(key, weight) for key, weight in weights.items()}
    table = make_table(weights, inverse(make_convert_key(config), config))
    convert(arguments, config, table, [f"weights of {', '.join(IGNORED)}, if there are any"])


def to_seed_voken(arguments: ReversibleArguments):
    config, weights = read_level(
        arguments,
        {"model_type": "lfq_vqgan", "network": "open_magvit2"},
        {"model_type": "vq_model", "similarity": "dot"},
    )
    table = make_table(weights, make_convert_key(config))
    table = [row._replace(weight=to_convolution(row.target_key, row.weight)) for row in table]

    def wrap(weights: dict[str, Tensor]) -> dict:
        averages = {AVERAGES + key.replace(".", ""): weights[key] for key in weights}
        return {"state_dict": {**weights, **averages}}

    write_checkpoint(arguments, table, "model.ckpt", wrap)


def main(words: list[str]):
    arguments = parse(words, __doc__, ReversibleArguments)
    if arguments.reverse:
        to_seed_voken(arguments)
    else:
        to_level(arguments)


if __name__ == "__main__":
    run_script(main)
