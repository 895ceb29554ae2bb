# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A VQ tokenizer of LlamaGen as the finest level of a progressive VAE, and back.

    python conversion/convert_llamagen.py \
            --checkpoint_path vq_ds16_c2i.pt --output_path runs/llamagen
        a checkpoint of LlamaGen, as `vq_ds16_c2i.pt` or `vq_ds8_c2i.pt`.

    python conversion/convert_llamagen.py --reverse \
            --checkpoint_path runs/llamagen --output_path runs/back
        a folder with `vq.pt`, which LlamaGen loads.

The level contains the networks of a `JanusVQVAE` of transformers, which are the same. Its codes are
by cosine, as LlamaGen's, where a `JanusVQVAE` of transformers takes the nearest vectors.
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
    shape_of,
    write_checkpoint,
)
from torch import Tensor

from progressive_vae.scripts import run_script

# Parts of keys, level → source, replaced in this order.
REPLACEMENTS = [
    (r"^(encoder|quantizer|auxiliary)\.", ""),
    (r"^encoder\.down\.", "encoder.conv_blocks."),
    (r"^decoder\.up\.", "decoder.conv_blocks."),
    (r"\.block\.(\d+)\.", r".res.\1."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
]
USAGE = "quantize.codebook_used"  # the latest codes of training
USAGE_LENGTH = 65_536


def convert_key(key: str) -> str:
    """Return the key in LlamaGen of a weight of a level."""
    return rename(key, REPLACEMENTS)


def infer_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Infer the config of a tokenizer from the shapes of its weights."""
    sizes = infer_sizes(weights, "conv_blocks", "res")
    channels = sizes.pop("num_channels")
    size, dim = shape_of(weights, "quantize.embedding.weight", 2)
    return {
        "model_type": "janus_vqgan",
        "similarity": "cosine",
        **sizes,
        "in_channels": channels,
        "out_channels": channels,
        "embed_dim": dim,
        "num_embeddings": size,
    }


def to_level(arguments: ReversibleArguments):
    if arguments.config_file is not None:
        raise ValueError("expected no config_file, as the sizes are inferred, got one")
    weights = read_weights(arguments.checkpoint_path, ignored=(USAGE,))
    config = infer_config(weights)
    table = make_table(weights, inverse(convert_key, config))
    convert(arguments, config, table, [f"{USAGE}, of training, if there is any"])


def to_llamagen(arguments: ReversibleArguments):
    _, weights = read_level(arguments, {"model_type": "janus_vqgan", "similarity": "cosine"})
    table = make_table(weights, convert_key)
    usage = {USAGE: torch.zeros(USAGE_LENGTH)}
    write_checkpoint(arguments, table, "vq.pt", lambda weights: {"model": {**weights, **usage}})


def main(words: list[str]):
    arguments = parse(words, __doc__, ReversibleArguments)
    if arguments.reverse:
        to_llamagen(arguments)
    else:
        to_level(arguments)


if __name__ == "__main__":
    run_script(main)
