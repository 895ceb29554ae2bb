"""Configs of pretrained tokenizers, and the fields of a level that follow from them."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from diffusers import VQModel
from transformers import JanusVQVAEConfig, PreTrainedConfig

from .base import check_limits

# A larger value is a damaged or a hostile file.
MAX_WIDTH = 2**14
MAX_BLOCKS = 1_000

# By which a latent's code is the best one. The vectors of JanusVQVAE are normalized only to decode.
SIMILARITIES = ("euclidean", "cosine", "dot")

DALLE_DVAE = {"vocab_size": 8192, "n_hid": 256, "n_init": 128, "n_blk_per_group": 2,
              "num_channels": 3}  # fmt: skip

# A VQGAN without attention and with a lookup-free quantizer, as those of Open-MAGVIT2 and MaskBit.
LFQ_VQGAN: dict[str, Any] = {"network": "open_magvit2", "num_channels": 3, "base_channels": 128,
             "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 4,
             "num_bits": 18}  # fmt: skip
NETWORKS = ("open_magvit2", "maskgit")
MAX_BITS = 20

# A row of tokens for an image of one size. Without `pixel_codebook_size` the decoder's transformer
# returns pixels, otherwise probabilities of codes, for the VQGAN's decoder of the fields below it.
TITOK: dict[str, Any] = {
    "image_size": 256,
    "num_channels": 3,
    "num_tokens": 32,
    "codebook_size": 4096,
    "codebook_dim": 12,
    "similarity": "cosine",
    "encoder_width": 1024,
    "encoder_num_layers": 24,
    "encoder_patch_size": 16,
    "decoder_width": 1024,
    "decoder_num_layers": 24,
    "decoder_patch_size": 16,
    "pixel_codebook_size": 1024,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
}


class TokenizerShape(NamedTuple):
    """The fields of a level that its tokenizer determines."""

    num_channels: int
    codebook_size: int
    codebook_dim: int
    downsample: int


@cache
def _defaults(kind: str) -> dict[str, Any]:
    """The fields of a kind of tokenizer, and their defaults."""
    if kind == "vq_model":
        parameters = inspect.signature(VQModel.__init__).parameters.values()
        fields = {p.name: p.default for p in parameters if p.name != "self"}
        return {**fields, "do_normalize": True, "similarity": "euclidean"}
    if kind == "janus_vqgan":
        config = JanusVQVAEConfig()
        excluded = ("model_type", "base_config_key")
        names = [name for name in JanusVQVAEConfig.__annotations__ if name not in excluded]
        return {**{name: getattr(config, name) for name in names}, "similarity": "euclidean"}
    return {"dalle_dvae": DALLE_DVAE, "lfq_vqgan": LFQ_VQGAN, "titok": TITOK}[kind]


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


# Functions of a tokenizer's fields: the output channels, and the shape.


def _vq_model_shape(fields: dict[str, Any]) -> tuple[int, TokenizerShape]:
    lists = [fields[n] for n in ("block_out_channels", "down_block_types", "up_block_types")]
    if len({len(values) for values in lists}) != 1:
        raise ValueError(f"expected as many down blocks as up blocks and widths, got {lists}")
    dim = fields["vq_embed_dim"] or fields["latent_channels"]
    downsample = 2 ** (len(fields["block_out_channels"]) - 1)
    shape = TokenizerShape(fields["in_channels"], fields["num_vq_embeddings"], dim, downsample)
    return fields["out_channels"], shape


def _janus_vqgan_shape(fields: dict[str, Any]) -> tuple[int, TokenizerShape]:
    if fields["double_latent"]:
        raise ValueError("expected double_latent=False of a 'janus_vqgan', got True")
    downsample = 2 ** (len(fields["channel_multiplier"]) - 1)
    shape = TokenizerShape(
        fields["in_channels"], fields["num_embeddings"], fields["embed_dim"], downsample
    )
    return fields["out_channels"], shape


def _dalle_dvae_shape(fields: dict[str, Any]) -> tuple[int, TokenizerShape]:
    channels = fields["num_channels"]
    return channels, TokenizerShape(channels, fields["vocab_size"], fields["n_init"], 8)


def _lfq_vqgan_shape(fields: dict[str, Any]) -> tuple[int, TokenizerShape]:
    channels, num_bits = fields["num_channels"], fields["num_bits"]
    downsample = 2 ** (len(fields["channel_multiplier"]) - 1)
    return channels, TokenizerShape(channels, 2**num_bits, num_bits, downsample)


def _titok_shape(fields: dict[str, Any]) -> tuple[int, TokenizerShape]:
    channels, downsample = fields["num_channels"], fields["decoder_patch_size"]
    for name in ("encoder_patch_size", "decoder_patch_size"):
        if fields["image_size"] % fields[name]:
            raise ValueError(
                f"expected {name} to divide image_size={fields['image_size']}, got {fields[name]}"
            )
    factor = 2 ** (len(fields["channel_multiplier"]) - 1)
    if fields["pixel_codebook_size"] is not None and factor != downsample:
        raise ValueError(
            f"expected channel_multiplier of a decoder that upsamples by decoder_patch_size="
            f"{downsample}, got {fields['channel_multiplier']}"
        )
    shape = TokenizerShape(channels, fields["codebook_size"], fields["codebook_dim"], downsample)
    return channels, shape


_SHAPES = {
    "vq_model": _vq_model_shape,
    "janus_vqgan": _janus_vqgan_shape,
    "dalle_dvae": _dalle_dvae_shape,
    "lfq_vqgan": _lfq_vqgan_shape,
    "titok": _titok_shape,
}


@dataclass(frozen=True)
class Tokenizer:
    """A checked `tokenizer_config`.

    Args:
        kind: `"vq_model"` (diffusers' `VQModel`), `"janus_vqgan"` (transformers' `JanusVQVAE`),
            `"dalle_dvae"` (OpenAI's discrete VAE), `"lfq_vqgan"` (Open-MAGVIT2, MaskBit) or
            `"titok"`.
        fields: of the library's own config; of a `"vq_model"` also `do_normalize`, whether its
            input is an image in [−1, 1] rather than [0, 1]. Those with a codebook have
            `similarity`: `"euclidean"`, `"cosine"` or `"dot"`, by which latents have codes.
        shape: the fields of the level.
    """

    kind: str
    fields: dict[str, Any]
    shape: TokenizerShape


def read_tokenizer(config: dict[str, Any]) -> Tokenizer:
    """Check the `tokenizer_config` of a level.

    Args:
        config: fields of the tokenizer and its `model_type`; the others have their defaults.

    Raises:
        ValueError: an unknown `model_type` or field, or a value that no network can have.
    """
    arguments = _as_json(config)
    kind = arguments.pop("model_type", None)
    if kind not in _SHAPES:
        raise ValueError(
            f"expected tokenizer_config with a model_type among {[*_SHAPES]}, got {kind!r}"
        )
    defaults = _defaults(kind)
    if unknown := sorted(set(arguments) - set(defaults)):
        raise ValueError(
            f"expected fields of a {kind!r} in tokenizer_config, {[*defaults]}, got {unknown}"
        )
    check_limits(arguments, **{n: MAX_BLOCKS for n in defaults if "layer" in n or "num_res" in n},
                 n_blk_per_group=MAX_BLOCKS, num_bits=MAX_BITS)  # fmt: skip
    for name, value in arguments.items():
        widths = value if isinstance(value, list) else []
        minimum = 0 if "layer" in name or "num_res" in name else 1
        if any(type(n) is int and n < minimum for n in [value, *widths]):
            raise ValueError(f"expected {name} >= {minimum} in tokenizer_config, got {value}")
        if any(isinstance(n, int) and n > MAX_WIDTH for n in widths) or len(widths) > 16:
            raise ValueError(
                f"expected {name} of at most 16 widths up to {MAX_WIDTH} in tokenizer_config, got "
                f"{value}"
            )
    fields = _as_json({**defaults, **arguments})
    for name, choices in (("similarity", SIMILARITIES), ("network", NETWORKS)):
        if name in fields and fields[name] not in choices:
            raise ValueError(
                f"expected {name} in {choices} in tokenizer_config, got {fields[name]!r}"
            )
    try:
        channels_out, shape = _SHAPES[kind](fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"expected fields of a {kind!r}, got {fields}: {error}") from error
    if not all(type(n) is int and n >= 1 for n in shape):
        raise ValueError(f"expected positive numbers in tokenizer_config, got {shape._asdict()}")
    if channels_out != shape.num_channels:
        raise ValueError(
            f"expected a tokenizer with as many output as input channels, got {channels_out} and "
            f"{shape.num_channels}"
        )
    return Tokenizer(kind, fields, shape)


def fixed_sizes(config: dict[str, Any] | None) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return (image size, grid of codes) of a `tokenizer_config` for images of one size, or
    `None` if a code is of a patch, and images have any size."""
    if config is None or config.get("model_type") != "titok":
        return None
    fields = {**TITOK, **config}
    return (fields["image_size"], fields["image_size"]), (1, fields["num_tokens"])


def set_tokenizer_fields(config: PreTrainedConfig):
    """Set the fields of a level's config that its tokenizer determines.

    Raises:
        ValueError: the config has other values, which are not its defaults.
    """
    for name, value in read_tokenizer(config.tokenizer_config).shape._asdict().items():
        if getattr(config, name) not in (value, getattr(type(config), name)):
            raise ValueError(
                f"expected {name}={value}, as tokenizer_config has, got {getattr(config, name)}"
            )
        setattr(config, name, value)
    if fixed_sizes(config.tokenizer_config) and config.decoder_type != "auxiliary":
        raise ValueError(
            "expected decoder_type='auxiliary' of a tokenizer whose codes are not of patches, got "
            f"{config.decoder_type!r}"
        )
