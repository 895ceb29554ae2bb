# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""The discrete VAE of DALL-E (8,192 codes, f = 8) as the finest level of a progressive VAE.

    python conversion/convert_dalle_dvae.py --checkpoint_path dalle --output_path runs/dalle
        a folder with `encoder.pt` and `decoder.pt`, or `.safetensors`, that contain only weights.

OpenAI's `encoder.pkl` and `decoder.pkl` are pickled modules, which contain code, and are not
loaded. If you trust them, and `dall_e` is installed, convert each of them, here the encoder:
`torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "dalle/encoder.pt")`.
"""

import re
from pathlib import Path

from common import PICKLES, Row, convert, make_table, parse, read_weights, replace_prefix
from torch import Tensor

from progressive_vae.scripts import run_script

ENCODER_PREFIXES = {"blocks.": "encoder.blocks."}
DECODER_PREFIXES = {"blocks.input.": "quantizer.input.", "blocks.": "auxiliary.decoder."}
SUFFIXES = (".safetensors", *PICKLES)


def convert_encoder_key(key: str) -> str | None:
    """Return the key in a level of a weight of `dall_e.Encoder`; as in `FlavaImageCodebook`."""
    key = re.sub(r"\.(group_\d)\.", r".\1.group.", key)
    key = re.sub(r"\.res_path\.", r".res_path.path.", key)
    return replace_prefix(_rename_parameter(key), ENCODER_PREFIXES)


def convert_decoder_key(key: str) -> str | None:
    """Return the key in a level of a weight of `dall_e.Decoder`; layer 1 is the codebook."""
    return replace_prefix(_rename_parameter(key), DECODER_PREFIXES)


def _rename_parameter(key: str) -> str:
    key = re.sub(r"\.w$", ".weight", key)
    return re.sub(r"\.b$", ".bias", key)


def read_part(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the weights of the encoder or the decoder."""
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return read_weights(path)
    raise ValueError(f"expected {name} with a suffix among {SUFFIXES} in {folder}, got none")


def infer_config(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, int]:
    """Infer the config of a discrete VAE from the shapes of its weights."""

    def shape_of(part: str, weights: dict[str, Tensor], layer: str) -> tuple[int, ...]:
        weight = weights.get(f"blocks.{layer}.w")
        if weight is None or weight.ndim != 4:
            raise ValueError(
                f"expected a convolution blocks.{layer}.w in the {part}, got "
                f"{'none' if weight is None else tuple(weight.shape)}"
            )
        return tuple(weight.shape)

    encoder_input = shape_of("encoder", encoder, "input")
    encoder_output = shape_of("encoder", encoder, "output.conv")
    decoder_input = shape_of("decoder", decoder, "input")
    matches = [re.match(r"blocks\.group_1\.(\w+)\.", key) for key in encoder]
    return {
        "vocab_size": encoder_output[0],
        "n_hid": encoder_input[0],
        "n_init": decoder_input[0],
        "n_blk_per_group": len({match[1] for match in matches if match}),
        "num_channels": encoder_input[1],
    }


def main(words: list[str]):
    arguments = parse(words, __doc__)
    if arguments.config_file is not None:
        raise ValueError("expected no config_file, as the sizes are inferred, got one")
    folder = Path(arguments.checkpoint_path)
    if not folder.is_dir():
        raise ValueError(f"expected checkpoint_path to be a folder, got {folder}")
    encoder = read_part(folder, "encoder")
    decoder = read_part(folder, "decoder")
    config = infer_config(encoder, decoder)
    table: list[Row] = []
    for name, weights, convert_key in (
        ("encoder", encoder, convert_encoder_key),
        ("decoder", decoder, convert_decoder_key),
    ):
        rows = make_table(weights, convert_key)
        table += [row._replace(source_key=f"{name}.{row.source_key}") for row in rows]
    convert(arguments, {"model_type": "dalle_dvae", **config}, table)


if __name__ == "__main__":
    run_script(main)
