# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A `JanusVQVAE` of transformers (LlamaGen's tokenizer) as the finest level of a progressive VAE.

    python conversion/convert_janus_vqvae.py \
            --checkpoint_path deepseek-community/Janus-Pro-1B --output_path runs/janus
        a folder or a repository of a `JanusVQVAE`, or of a whole Janus, of which it is a part.
"""

import sys
from typing import Any

from common import (
    ADVICE,
    VQ_SLOTS,
    Arguments,
    convert,
    find_config,
    make_table,
    parse,
    read_checkpoint,
    replace_prefix,
)
from transformers import JanusVQVAEConfig, PreTrainedConfig

from progressive_vae.serialization import read_json

FILES = ("model.safetensors", "pytorch_model.bin")
WHOLE = "model.vqmodel."  # where a whole Janus has it

# What configs say that the network does not read: β of its loss, and what every config has.
UNREAD = {"beta", "model_type", "torch_dtype", "_name_or_path", *PreTrainedConfig().to_dict()}


def read_config(arguments: Arguments) -> tuple[dict[str, Any], bool]:
    """The fields of a `JanusVQVAEConfig`, and whether they are those of a part of a Janus."""
    path = find_config(arguments)
    config = read_json(path, ADVICE)
    kind = config.get("model_type")
    if kind not in ("janus", "janus_vqgan"):
        raise ValueError(
            f"expected the config of a 'janus_vqgan' or of a 'janus' (model_type) in {path}, got "
            f"{kind!r}"
        )
    fields = config.get("vq_config") if kind == "janus" else config
    if not isinstance(fields, dict):
        raise ValueError(f"expected vq_config in {path}, got {fields!r}")
    known = {name for name in JanusVQVAEConfig.__annotations__ if name != "model_type"}
    if unknown := sorted(set(fields) - known - UNREAD):
        raise ValueError(f"expected fields of a JanusVQVAEConfig in {path}, got {unknown}")
    return {name: value for name, value in fields.items() if name in known}, kind == "janus"


def main(words: list[str]):
    arguments = parse(words, __doc__)
    fields, is_part = read_config(arguments)
    prefix = WHOLE if is_part else ""
    weights = read_checkpoint(arguments.checkpoint_path, FILES, prefix=prefix)
    table = make_table(weights, lambda key: replace_prefix(key.removeprefix(prefix), VQ_SLOTS))
    left_out = [f"all of Janus that is not in {WHOLE}*"] if is_part else []
    convert(arguments, {"model_type": "janus_vqgan", **fields}, table, left_out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:  # of flags, files or the Hub
        sys.exit(f"error: {error}")
