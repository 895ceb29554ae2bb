# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A TiTok tokenizer as the finest level of a progressive VAE, and back.

    python conversion/convert_titok.py \
            --checkpoint_path yucornetto/tokenizer_titok_l32_imagenet --output_path runs/titok
        a folder or a repository of a TiTok with discrete tokens.

    python conversion/convert_titok.py --reverse \
            --checkpoint_path runs/titok --output_path runs/back
        a folder with `pytorch_model.bin`, which TiTok loads beside its config.

The level has a row of tokens (1, T), and images of the size that TiTok was trained on.
"""

from functools import partial
from pathlib import Path
from typing import Any

from common import (
    ADVICE,
    ReversibleArguments,
    convert,
    count,
    count_from_finest,
    find_config,
    inverse,
    make_table,
    parse,
    read_checkpoint,
    read_level,
    rename,
    section_of,
    shape_of,
    write_checkpoint,
)
from torch import Tensor

from progressive_vae.scripts import run_script
from progressive_vae.serialization import read_json

# Parts of keys, level → source, replaced in this order.
REPLACEMENTS = [
    (r"^(quantizer|encoder|auxiliary)\.", ""),
    (r"^decoder\.(pixel_\w+)\.", r"\1."),
    (r"^encoder\.latent_tokens$", "latent_tokens"),
    (r"(\.transformer\.\d+)\.self_attn\.", r"\1.attn."),
    (r"(\.transformer\.\d+)\.norm([12])\.", r"\1.ln_\2."),
    (r"(\.transformer\.\d+)\.linear1\.", r"\1.mlp.c_fc."),
    (r"(\.transformer\.\d+)\.linear2\.", r"\1.mlp.c_proj."),
    (r"\.upsample\.conv\.", ".upsample_conv."),
]
FILES = ("model.safetensors", "pytorch_model.bin")


def convert_key(key: str, num_resolutions: int) -> str:
    """Return the key in TiTok of a weight of a level.

    Args:
        num_resolutions: of the VQGAN's decoder, if there is one.
    """
    return count_from_finest(rename(key, REPLACEMENTS), num_resolutions)


def read_config(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the tokenizer config of a level, from a TiTok's config and the shapes of weights.

    Raises:
        ValueError: missing names, or a TiTok without discrete tokens or without pixels.
    """
    config = read_json(path, ADVICE)
    fields = section_of(section_of(config, "model", path), "vq_model", path)
    dataset = section_of(config, "dataset", path)
    has_codes = fields.get("finetune_decoder", True)
    if fields.get("quantize_mode", "vq") != "vq" or fields.get("is_legacy", True) != has_codes:
        raise ValueError(
            "expected quantize_mode 'vq', and equal is_legacy and finetune_decoder, in vq_model of "
            f"{path}, got {fields}: other models have no discrete tokens, or return no pixels"
        )
    size, dim = shape_of(weights, "quantize.embedding.weight", 2)
    result = {
        "model_type": "titok",
        "image_size": section_of(dataset, "preprocessing", path).get("crop_size"),
        "num_tokens": shape_of(weights, "latent_tokens", 2)[0],
        "codebook_size": size,
        "codebook_dim": dim,
        "similarity": "cosine" if fields.get("use_l2_norm") else "euclidean",
        "encoder_patch_size": fields.get("vit_enc_patch_size"),
        "decoder_patch_size": fields.get("vit_dec_patch_size"),
        "pixel_codebook_size": None,
    }
    for part in ("encoder", "decoder"):
        result[f"{part}_width"] = shape_of(weights, f"{part}.class_embedding", 2)[1]
        result[f"{part}_num_layers"] = count(weights, f"{part}.transformer.")
    if has_codes:
        size, dim = shape_of(weights, "pixel_quantize.embedding.weight", 2)
        stages = "pixel_decoder.up."
        blocks = [f"{stages}{i}.block.0." for i in range(count(weights, stages))]
        widths = [shape_of(weights, f"{block}conv2.weight", 4)[0] for block in blocks]
        width = shape_of(weights, "pixel_decoder.conv_out.weight", 4)[1]
        result |= {
            "pixel_codebook_size": size,
            "latent_channels": dim,
            "base_channels": width,
            "channel_multiplier": [n // width for n in widths],
            "num_res_blocks": count(weights, f"{stages}0.block."),
        }
    return result


def make_convert_key(config: dict[str, Any]):
    """Return the function level key → source key of a tokenizer."""
    return partial(convert_key, num_resolutions=len(config.get("channel_multiplier", [])))


def to_level(arguments: ReversibleArguments):
    path = find_config(arguments)
    weights = read_checkpoint(arguments.checkpoint_path, FILES)
    config = read_config(path, weights)
    convert(arguments, config, make_table(weights, inverse(make_convert_key(config), config)))


def to_titok(arguments: ReversibleArguments):
    config, weights = read_level(arguments, {"model_type": "titok"})
    write_checkpoint(arguments, make_table(weights, make_convert_key(config)), FILES[1])


def main(words: list[str]):
    arguments = parse(words, __doc__, ReversibleArguments)
    if arguments.reverse:
        to_titok(arguments)
    else:
        to_level(arguments)


if __name__ == "__main__":
    run_script(main)
