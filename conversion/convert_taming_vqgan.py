# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""A VQGAN of taming-transformers, or a VQ first stage of latent diffusion, as the finest level.

    python conversion/convert_taming_vqgan.py \
            --checkpoint_path last.ckpt --config_file model.yaml --output_path runs/vqgan
        a checkpoint and the config of a `VQModel` of taming-transformers, of a `VQModel` or a
        `VQModelInterface` of latent-diffusion, or of a model that has one as its first stage.

The level contains a `VQModel` of diffusers, which computes the same. Checkpoints of Lightning often
contain objects beside the weights, and are then not loaded. If you trust one, and its libraries are
installed, `torch.save(torch.load("last.ckpt", weights_only=False)["state_dict"], "clean.pt")`
writes only the weights.
"""

import re
from typing import Any

import yaml
from common import (
    convert,
    count_from_finest,
    inverse,
    make_table,
    parse,
    read_weights,
    rename,
    section_of,
)
from torch import Tensor

from progressive_vae.scripts import run_script

# Parts of keys, level → source, replaced in this order.
REPLACEMENTS = [
    (r"^(encoder|quantizer|auxiliary)\.", ""),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.up_blocks\.(\d+)\.", r".up.\1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"(\.attn\w*(?:\.\d+)?)\.group_norm\.", r"\1.norm."),
    (r"(\.attn\w*(?:\.\d+)?)\.to_([qkv])\.", r"\1.\2."),
    (r"(\.attn\w*(?:\.\d+)?)\.to_out\.0\.", r"\1.proj_out."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.downsamplers\.0\.", r".downsample."),
    (r"\.upsamplers\.0\.", r".upsample."),
    (r"\.conv_norm_out\.", r".norm_out."),
]
ATTENTION_MAP = r"\.attn(?:_1|\.\d+)\.(?:[qkv]|proj_out)\.weight$"
FIRST_STAGE = "first_stage_model."
IGNORED_PREFIXES = ("loss.", "model_ema.", "colorize")  # of training, and of visualization
TARGETS = ("VQModel", "VQModelInterface", "VQNoDiscModel")

# Entries of `params` that do not affect the network.
IGNORED_PARAMS = {
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "batch_resize_range",
    "scheduler_config",
    "lr_g_factor",
    "use_ema",
    "sane_index_shape",
    "learning_rate",
}

# `ddconfig` with the defaults of the source; `None` for required entries.
DDCONFIG: dict[str, Any] = {
    "double_z": True,
    "z_channels": None,
    "resolution": None,
    "in_channels": None,
    "out_ch": None,
    "ch": None,
    "ch_mult": [1, 2, 4, 8],
    "num_res_blocks": None,
    "attn_resolutions": None,
    "dropout": 0.0,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}

# Entries without a counterpart in a `VQModel`, and the only value that it can represent.
REQUIRED_VALUES = {
    "double_z": False,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
}


def read_config(path: str | None) -> dict[str, Any]:
    """Return the tokenizer config of a level, from a model's YAML file.

    Raises:
        ValueError: another model, missing or unknown names, or values that a `VQModel` cannot
            represent.
    """
    config = read_yaml(path)
    model = section_of(config, "model", path)
    if "first_stage_config" in section_of(model, "params", path):
        model = section_of(model["params"], "first_stage_config", path)
    target = str(model.get("target"))
    params = section_of(model, "params", path)
    if target.rpartition(".")[2] not in TARGETS:
        raise ValueError(
            f"expected a target among {TARGETS} in {path}, got {target}: its codes are not the "
            "nearest ones in a codebook, or it has none"
        )
    names = {"embed_dim", "n_embed", "ddconfig", "remap"}
    if unknown := sorted(set(params) - IGNORED_PARAMS - names):
        raise ValueError(f"expected params of a VQGAN in {path}, got {unknown}")
    if params.get("remap") is not None:
        raise ValueError(f"expected no remap in {path}, got {params['remap']}")
    sizes = {name: params.get(name) for name in ("embed_dim", "n_embed")}
    return as_vqmodel({**read_ddconfig(section_of(params, "ddconfig", path), path), **sizes}, path)


def read_yaml(path: str | None) -> Any:
    """Return the contents of a YAML file.

    Raises:
        ValueError: there is none, or it is no YAML.
    """
    if path is None:
        raise ValueError("expected config_file, the YAML file of the checkpoint, got none")
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"expected YAML in config_file {path}, got {message}") from error
    return config


def read_ddconfig(section: dict[str, Any], path: str) -> dict[str, Any]:
    if unknown := sorted(set(section) - set(DDCONFIG)):
        raise ValueError(f"expected {[*DDCONFIG]} in ddconfig of {path}, got {unknown}")
    fields = {**DDCONFIG, **section}
    for name, value in REQUIRED_VALUES.items():
        if fields[name] != value:
            raise ValueError(
                f"expected {name}={value} in ddconfig of {path}, got {fields[name]!r}: a VQModel "
                "has no other"
            )
    if fields["attn_type"] not in ("vanilla", "none"):
        raise ValueError(
            f"expected attn_type 'vanilla' or 'none' in ddconfig of {path}, got "
            f"{fields['attn_type']!r}"
        )
    return fields


def as_vqmodel(fields: dict[str, Any], path: str) -> dict[str, Any]:
    for name in ("ch_mult", "attn_resolutions"):
        value = fields[name]
        if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
            raise ValueError(f"expected {name} to be a list of numbers in {path}, got {value!r}")
    dimensions = ("z_channels", "resolution", "in_channels", "out_ch", "ch", "num_res_blocks")
    for name in (*dimensions, "embed_dim", "n_embed"):
        value = fields[name]
        if type(value) is not int or value < 1:
            raise ValueError(f"expected {name} to be a number in {path}, got {value!r}")
    if fields["ch_mult"][:1] != [1]:
        raise ValueError(
            f"expected ch_mult to begin with 1 in ddconfig of {path}, as in a VQModel, got "
            f"{fields['ch_mult']}"
        )

    # The source names the resolutions with attention, a VQModel the type of each block. The two
    # lists of resolutions differ if the size of the image is not divisible.
    has_attention = fields["attn_type"] == "vanilla"
    num_resolutions = len(fields["ch_mult"])
    down_resolutions = [fields["resolution"] // 2**i for i in range(num_resolutions)]
    up_resolutions = [down_resolutions[-1] * 2**i for i in range(num_resolutions)]

    def block_types(resolutions: list[int], plain: str, with_attention: str) -> list[str]:
        attention_at = fields["attn_resolutions"] if has_attention else []
        return [with_attention if size in attention_at else plain for size in resolutions]

    return {
        "model_type": "vq_model",
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_ch"],
        "down_block_types": block_types(
            down_resolutions, "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
        ),
        "up_block_types": block_types(up_resolutions, "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        "block_out_channels": [fields["ch"] * factor for factor in fields["ch_mult"]],
        "layers_per_block": fields["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": fields["z_channels"],
        "sample_size": fields["resolution"],
        "num_vq_embeddings": fields["n_embed"],
        "norm_num_groups": 32,
        "vq_embed_dim": fields["embed_dim"],
        "mid_block_add_attention": has_attention,
        "do_normalize": True,
    }


def convert_key(key: str, num_resolutions: int) -> str:
    """Return the key in a VQGAN of a weight of a level.

    Args:
        num_resolutions: of its encoder and its decoder, including the finest and the coarsest.
    """
    return count_from_finest(rename(key, REPLACEMENTS), num_resolutions)


def to_convolution(key: str, weight: Tensor) -> Tensor:
    """The inverse of `to_linear`."""
    return weight[..., None, None] if re.search(ATTENTION_MAP, key) else weight


def to_linear(key: str, weight: Tensor) -> Tensor:
    """Return the weight of a 1×1 convolution of attention as that of a linear layer."""
    is_1x1 = weight.ndim == 4 and weight.shape[2:] == (1, 1)
    return weight.flatten(1) if re.search(ATTENTION_MAP, key) and is_1x1 else weight


def main(words: list[str]):
    arguments = parse(words, __doc__)
    config = read_config(arguments.config_file)
    prefixes = tuple(stage + name for stage in ("", FIRST_STAGE) for name in IGNORED_PREFIXES)
    weights = read_weights(arguments.checkpoint_path, ignored=prefixes)
    ignored = [f"weights of {', '.join(IGNORED_PREFIXES)}, for training, if there are any"]
    if any(key.startswith(FIRST_STAGE) for key in weights):
        num_weights = len(weights)
        weights = {
            key.removeprefix(FIRST_STAGE): weight
            for key, weight in weights.items()
            if key.startswith(FIRST_STAGE)
        }
        ignored.append(f"{num_weights - len(weights)} weights that are not {FIRST_STAGE}*")
    network = {key: to_linear(key, weight) for key, weight in weights.items()}
    num_resolutions = len(config["block_out_channels"])
    table = make_table(network, inverse(lambda key: convert_key(key, num_resolutions), config))
    convert(arguments, config, table, ignored)


if __name__ == "__main__":
    run_script(main)
