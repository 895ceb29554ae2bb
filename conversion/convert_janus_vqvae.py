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
        a folder or a repository of a `JanusVQVAE`, or of a Janus, which contains one.
"""

from typing import Any

from common import (
    ADVICE,
    VQ_PREFIXES,
    Arguments,
    convert,
    find_config,
    make_table,
    parse,
    read_checkpoint,
    replace_prefix,
)
from transformers import JanusVQVAEConfig, PreTrainedConfig

from progressive_vae.scripts import run_script
from progressive_vae.serialization import read_json

FILES = ("model.safetensors", "pytorch_model.bin")
JANUS_PREFIX = "model.vqmodel."  # of the tokenizer's weights in a Janus

# Fields that do not affect the network: β of its loss, and those that every config has.
IGNORED = {"beta", "model_type", "torch_dtype", "_name_or_path", *PreTrainedConfig().to_dict()}


def read_config(arguments: Arguments) -> tuple[dict[str, Any], bool]:
    """Return the fields of a `JanusVQVAEConfig`, and whether it is a part of a Janus."""
    path = find_config(arguments)
    config = read_json(path, ADVICE)
    model_type = config.get("model_type")
    if model_type not in ("janus", "janus_vqgan"):
        raise ValueError(
            f"expected model_type 'janus_vqgan' or 'janus' in {path}, got {model_type!r}"
        )
    fields = config.get("vq_config") if model_type == "janus" else config
    if not isinstance(fields, dict):
        raise ValueError(f"expected vq_config in {path}, got {fields!r}")
    names = {name for name in JanusVQVAEConfig.__annotations__ if name != "model_type"}
    if unknown := sorted(set(fields) - names - IGNORED):
        raise ValueError(f"expected fields of a JanusVQVAEConfig in {path}, got {unknown}")
    config = {name: value for name, value in fields.items() if name in names}
    return config, model_type == "janus"


def main(words: list[str]):
    arguments = parse(words, __doc__)
    fields, is_part = read_config(arguments)
    prefix = JANUS_PREFIX if is_part else ""
    weights = read_checkpoint(arguments.checkpoint_path, FILES, prefix=prefix)
    table = make_table(weights, lambda key: replace_prefix(key.removeprefix(prefix), VQ_PREFIXES))
    ignored = [f"weights of Janus that are not {JANUS_PREFIX}*"] if is_part else []
    convert(arguments, {"model_type": "janus_vqgan", **fields}, table, ignored)


if __name__ == "__main__":
    run_script(main)
