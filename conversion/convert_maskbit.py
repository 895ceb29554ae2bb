# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A bit tokenizer of MaskBit (10 to 18 bits) as the finest level of a progressive VAE, and back.

    python conversion/convert_maskbit.py \
            --checkpoint_path maskbit_tokenizer_14bit.bin --output_path runs/maskbit
        a checkpoint of a tokenizer with lookup-free quantization; VQGAN+ has a codebook.

    python conversion/convert_maskbit.py --reverse \
            --checkpoint_path runs/maskbit --output_path runs/back
        a folder with `pytorch_model.bin`, which MaskBit loads.
"""

from typing import Any

import torch
from common import (
    ReversibleArguments,
    convert,
    infer_sizes,
    inverse,
    make_table,
    parse,
    read_level,
    read_weights,
    rename,
    write_checkpoint,
)
from torch import Tensor

from progressive_vae.models.binary_quantizers import LookupFreeQuantizer
from progressive_vae.scripts import run_script

# Parts of keys, level → source, replaced in this order.
REPLACEMENTS = [
    (r"^(encoder|auxiliary)\.", ""),
    (r"\.block\.(\d+)\.", r".res_blocks.\1."),
    (r"\.mid\.(\d+)\.", r".mid.res_blocks.\1."),
    (r"\.downsample\.", ".down_conv."),
    (r"\.upsample\.conv\.", ".upsample_conv."),
]
CONSTANTS = ("quantize.bits_to_indices", "quantize.codebook")  # they follow from the number of bits


def convert_key(key: str) -> str:
    """Return the key in MaskBit of a weight of a level."""
    return rename(key, REPLACEMENTS)


def infer_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Infer the config of a tokenizer from the shapes of its weights."""
    sizes = infer_sizes(weights, "down", "res_blocks")
    num_bits = sizes.pop("latent_channels")
    return {"model_type": "lfq_vqgan", "network": "maskgit", **sizes, "num_bits": num_bits}


def to_level(arguments: ReversibleArguments):
    if arguments.config_file is not None:
        raise ValueError("expected no config_file, as the sizes are inferred, got one")
    weights = read_weights(arguments.checkpoint_path, ignored=CONSTANTS)
    config = infer_config(weights)
    table = make_table(weights, inverse(convert_key, config))
    convert(arguments, config, table, [f"{' and '.join(CONSTANTS)}, if there are any"])


def to_maskbit(arguments: ReversibleArguments):
    config, weights = read_level(arguments, {"model_type": "lfq_vqgan", "network": "maskgit"})
    table = make_table(weights, convert_key)
    bits = 2 ** torch.arange(config["num_bits"], dtype=torch.int32)
    codebook = LookupFreeQuantizer(config["num_bits"]).codebook.flip(-1)
    constants = dict(zip(CONSTANTS, (bits, codebook), strict=True))
    write_checkpoint(
        arguments, table, "pytorch_model.bin", lambda weights: {**weights, **constants}
    )


def main(words: list[str]):
    arguments = parse(words, __doc__, ReversibleArguments)
    if arguments.reverse:
        to_maskbit(arguments)
    else:
        to_level(arguments)


if __name__ == "__main__":
    run_script(main)
