# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""The discrete VAE of DALL-E (8,192 codes, f = 8) as the finest level of a progressive VAE.

    python conversion/convert_dalle_dvae.py --checkpoint_path dalle --output_path runs/dalle
        a folder with `encoder.pt` and `decoder.pt`, or `.safetensors`, of the weights alone.

OpenAI's `encoder.pkl` and `decoder.pkl` are pickled modules, which are code, and not loaded. Where
you trust them, and `dall_e` is installed, this makes the files, here that of the encoder:
`torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "dalle/encoder.pt")`.
"""

import re
import sys
from pathlib import Path

from common import PICKLES, Row, convert, make_table, parse, read_weights, replace_prefix
from torch import Tensor

ENCODER_SLOTS = {"blocks.": "encoder.blocks."}
DECODER_SLOTS = {"blocks.input.": "quantizer.input.", "blocks.": "auxiliary.decoder."}
SUFFIXES = (".safetensors", *PICKLES)


def encoder_slot(key: str) -> str | None:
    """The name in a level of a weight of a `dall_e.Encoder`: that of `FlavaImageCodebook`'s."""
    key = re.sub(r"\.(group_\d)\.", r".\1.group.", key)
    key = re.sub(r"\.res_path\.", r".res_path.path.", key)
    return replace_prefix(_spelled_out(key), ENCODER_SLOTS)


def decoder_slot(key: str) -> str | None:
    """The name in a level of a weight of a `dall_e.Decoder`: its first layer is the codebook."""
    return replace_prefix(_spelled_out(key), DECODER_SLOTS)


def _spelled_out(key: str) -> str:
    key = re.sub(r"\.w$", ".weight", key)
    return re.sub(r"\.b$", ".bias", key)


def read_half(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of the encoder or the decoder."""
    for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES):
        if path.is_file():
            return read_weights(path)
    raise ValueError(f"expected {name} with a suffix among {SUFFIXES} in {folder}, got none")


def read_sizes(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, int]:
    """The config of a discrete VAE, which its weights tell."""
    shapes = {}
    for half, weights, layer in (
        ("encoder", encoder, "input"), ("encoder", encoder, "output.conv"),
        ("decoder", decoder, "input"),
    ):  # fmt: skip
        weight = weights.get(f"blocks.{layer}.w")
        if weight is None or weight.ndim != 4:
            raise ValueError(
                f"expected a convolution blocks.{layer}.w in the {half}, got "
                f"{'none' if weight is None else tuple(weight.shape)}"
            )
        shapes[half, layer] = weight.shape
    blocks = {found[1] for key in encoder if (found := re.match(r"blocks\.group_1\.(\w+)\.", key))}
    return {
        "vocab_size": shapes["encoder", "output.conv"][0],
        "n_hid": shapes["encoder", "input"][0],
        "n_init": shapes["decoder", "input"][0],
        "n_blk_per_group": len(blocks),
        "num_channels": shapes["encoder", "input"][1],
    }


def main(words: list[str]):
    arguments = parse(words, __doc__)
    if arguments.config_file is not None:
        raise ValueError("expected no config_file, as the weights tell the sizes, got one")
    folder = Path(arguments.checkpoint_path)
    if not folder.is_dir():
        raise ValueError(f"expected checkpoint_path to be a folder, got {folder}")
    encoder, decoder = read_half(folder, "encoder"), read_half(folder, "decoder")
    sizes = read_sizes(encoder, decoder)
    table: list[Row] = []
    for name, weights, slot in (
        ("encoder", encoder, encoder_slot), ("decoder", decoder, decoder_slot)
    ):  # fmt: skip
        rows = make_table(weights, slot)
        table += [row._replace(theirs=f"{name}.{row.theirs}") for row in rows]
    convert(arguments, {"model_type": "dalle_dvae", **sizes}, table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:  # of flags, files or the Hub
        sys.exit(f"error: {error}")
