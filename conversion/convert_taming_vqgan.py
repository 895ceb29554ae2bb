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

The level holds a `VQModel` of diffusers, which computes the same. Checkpoints of Lightning often
hold objects beside the weights, and are then not loaded. Where you trust one, and its libraries are
installed, `torch.save(torch.load("last.ckpt", weights_only=False)["state_dict"], "clean.pt")` makes
a file of the weights alone.
"""

import re
import sys
from typing import Any

import yaml
from common import VQ_SLOTS, convert, make_table, parse, read_weights, replace_prefix
from torch import Tensor

# In the encoder and in the decoder, in the order in which it is replaced.
NAMES = [
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.up\.(\d+)\.", r".up_blocks.\1."),  # counted from the other end
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.downsample\.", r".downsamplers.0."),
    (r"\.upsample\.", r".upsamplers.0."),
    (r"\.norm_out\.", r".conv_norm_out."),
]
FIRST_STAGE = "first_stage_model."
LEFT_OUT = ("loss.", "model_ema.", "colorize")  # of training, and a picture's colors
TARGETS = ("VQModel", "VQModelInterface", "VQNoDiscModel")

# What says nothing of the network: `params` has these beside what is read.
UNREAD = {"lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor",
          "batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema", "sane_index_shape",
          "learning_rate"}  # fmt: skip

# `ddconfig` with the defaults of the source; `None` for what it has to name.
DDCONFIG: dict[str, Any] = {
    "double_z": True, "z_channels": None, "resolution": None, "in_channels": None, "out_ch": None,
    "ch": None, "ch_mult": [1, 2, 4, 8], "num_res_blocks": None, "attn_resolutions": None,
    "dropout": 0.0, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False,
    "use_linear_attn": False, "attn_type": "vanilla",
}  # fmt: skip

# Of what has no counterpart in a `VQModel`, the one value that it has.
REPRESENTED = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False,
               "tanh_out": False, "use_linear_attn": False}  # fmt: skip


def read_config(path: str) -> dict[str, Any]:
    """The tokenizer config of a level, from a model's YAML file.

    Raises:
        ValueError: another model, names that are missing or unknown, or what a `VQModel` has not.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"expected YAML in config_file {path}, got {said}") from error
    model = _section(config, "model", path)
    if "first_stage_config" in _section(model, "params", path):
        model = _section(model["params"], "first_stage_config", path)
    target, params = str(model.get("target")), _section(model, "params", path)
    if target.rpartition(".")[2] not in TARGETS:
        raise ValueError(
            f"expected a target among {TARGETS} in {path}, got {target}: its codes are not the "
            "nearest ones in a codebook, or it has none"
        )
    if unknown := sorted(set(params) - UNREAD - {"embed_dim", "n_embed", "ddconfig", "remap"}):
        raise ValueError(f"expected params of a VQGAN in {path}, got {unknown}, too")
    if params.get("remap") is not None:
        raise ValueError(f"expected no remap in {path}, got {params['remap']}: codes as they are")
    sizes = {name: params.get(name) for name in ("embed_dim", "n_embed")}
    return _as_vqmodel({**_ddconfig(_section(params, "ddconfig", path), path), **sizes}, path)


def _section(config: Any, name: str, path: str) -> dict[str, Any]:
    section = config.get(name) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"expected a section {name} in {path}, got {section!r}")
    return section


def _ddconfig(given: dict[str, Any], path: str) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(DDCONFIG)):
        raise ValueError(f"expected {[*DDCONFIG]} in ddconfig of {path}, got {unknown}, too")
    fields = {**DDCONFIG, **given}
    for name, value in REPRESENTED.items():
        if fields[name] != value:
            raise ValueError(
                f"expected {name}={value} in ddconfig of {path}, as a VQModel has it, got "
                f"{fields[name]!r}"
            )
    if fields["attn_type"] not in ("vanilla", "none"):
        raise ValueError(
            f"expected attn_type 'vanilla' or 'none' in ddconfig of {path}, got "
            f"{fields['attn_type']!r}"
        )
    return fields


def _as_vqmodel(fields: dict[str, Any], path: str) -> dict[str, Any]:
    lists = {name: fields[name] for name in ("ch_mult", "attn_resolutions")}
    names = ("z_channels", "resolution", "in_channels", "out_ch", "ch", "num_res_blocks",
             "embed_dim", "n_embed")  # fmt: skip
    numbers = {name: fields[name] for name in names}
    for name, value in lists.items():
        if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
            raise ValueError(f"expected {name} to be a list of numbers in {path}, got {value!r}")
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"expected {name} to be a number in {path}, got {value!r}")
    if lists["ch_mult"][:1] != [1]:
        raise ValueError(
            f"expected ch_mult to begin with 1 in ddconfig of {path}, as a VQModel does, got "
            f"{lists['ch_mult']}"
        )
    has_attention = fields["attn_type"] == "vanilla"
    count, finest = len(lists["ch_mult"]), numbers["resolution"]
    coarsest = finest // 2 ** (count - 1)

    def block_types(resolutions: list[int], plain: str, attentive: str) -> list[str]:
        looks = [has_attention and n in lists["attn_resolutions"] for n in resolutions]
        return [attentive if look else plain for look in looks]

    return {
        "model_type": "vq_model",
        "in_channels": numbers["in_channels"],
        "out_channels": numbers["out_ch"],
        "down_block_types": block_types(
            [finest // 2**i for i in range(count)], "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
        ),
        "up_block_types": block_types(
            [coarsest * 2**i for i in range(count)], "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
        ),
        "block_out_channels": [numbers["ch"] * n for n in lists["ch_mult"]],
        "layers_per_block": numbers["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": numbers["z_channels"],
        "sample_size": numbers["resolution"],
        "num_vq_embeddings": numbers["n_embed"],
        "norm_num_groups": 32,
        "vq_embed_dim": numbers["embed_dim"],
        "mid_block_add_attention": has_attention,
        "do_normalize": True,
    }


def slot(key: str, num_grids: int) -> str | None:
    """The name in a level of a weight of a VQGAN.

    Args:
        num_grids: of its encoder and its decoder, the finest and the coarsest included.
    """
    for theirs, ours in NAMES:
        key = re.sub(theirs, ours, key)
    key = re.sub(r"\.up_blocks\.(\d+)\.",
                 lambda found: f".up_blocks.{num_grids - 1 - int(found[1])}.", key)  # fmt: skip
    return replace_prefix(key, VQ_SLOTS)


def as_linear(key: str, weight: Tensor) -> Tensor:
    """The 1×1 convolutions of attention, whose numbers are those of linear layers."""
    is_attention = re.search(r"\.attn(?:_1|\.\d+)\.(?:[qkv]|proj_out)\.weight$", key) is not None
    is_1x1 = weight.ndim == 4 and weight.shape[2:] == (1, 1)
    return weight.flatten(1) if is_attention and is_1x1 else weight


def main(words: list[str]):
    arguments = parse(words, __doc__)
    if arguments.config_file is None:
        raise ValueError("expected config_file, the YAML file of the checkpoint, got none")
    config = read_config(arguments.config_file)
    weights, left_out = read_weights(arguments.checkpoint_path), []
    if any(key.startswith(FIRST_STAGE) for key in weights):
        rest = len(weights)
        weights = {
            key.removeprefix(FIRST_STAGE): weight
            for key, weight in weights.items()
            if key.startswith(FIRST_STAGE)
        }
        left_out.append(f"{rest - len(weights)} weights that are not of the {FIRST_STAGE}*")
    kept = {key: weight for key, weight in weights.items() if not key.startswith(LEFT_OUT)}
    if len(kept) < len(weights):
        left_out.append(f"{len(weights) - len(kept)} weights of {', '.join(LEFT_OUT)}, of training")
    kept = {key: as_linear(key, weight) for key, weight in kept.items()}
    num_grids = len(config["block_out_channels"])
    convert(arguments, config, make_table(kept, lambda key: slot(key, num_grids)), left_out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:  # of flags, files or the Hub
        sys.exit(f"error: {error}")
