"""Converted tokenizers have the codes and images of other projects' code, in golden files.

`golden/make_tokenizers.py` wrote these, with random weights at tiny size.
"""

import pytest
import torch

from helpers.conversion import assert_raises, assert_same_outputs, convert
from helpers.scripts import load_script
from helpers.tokenizers import Golden, load_golden

pytestmark = pytest.mark.unit


def save_llamagen(golden: Golden, folder):
    usage = {"quantize.codebook_used": torch.zeros(4)}
    torch.save({"model": {**golden.weights, **usage}}, folder / "vq.pt")
    return "convert_llamagen", "--checkpoint_path", folder / "vq.pt"


def load_llamagen(folder):
    weights = torch.load(folder / "vq.pt", weights_only=True)["model"]
    assert weights.pop("quantize.codebook_used").shape == (65_536,)
    return weights


# name: a function that writes a source, and one that reads what was converted back.
SOURCES = {"llamagen": (save_llamagen, load_llamagen)}
NAMES = pytest.mark.parametrize("name", SOURCES)


@NAMES
def test_codes_and_images_are_those_of_the_source(tmp_path, name):
    golden = load_golden(name)
    save, load = SOURCES[name]
    script, *flags = save(golden, tmp_path)
    level = convert(script, *flags, output=tmp_path / "level")
    assert_same_outputs(level, golden.pixels, golden.codes, golden.image)
    load_script(script, "conversion").main(
        ["--reverse", "--checkpoint_path", str(tmp_path / "level"),
         "--output_path", str(tmp_path / "back")]
    )  # fmt: skip
    back = load(tmp_path / "back")
    assert set(back) == set(golden.weights)
    for key, weight in golden.weights.items():
        assert torch.equal(back[key], weight), key


@NAMES
def test_damaged_weights_write_nothing(tmp_path, name):
    golden = load_golden(name)
    save, _ = SOURCES[name]
    key = next(key for key in golden.weights if key.endswith("decoder.conv_out.bias"))
    bias = golden.weights[key]
    for change, words in (
        ({"decoder.extra.weight": torch.zeros(2)}, "1 unexpected: decoder.extra.weight"),
        ({key: bias[:2]}, "1 mismatched: .*conv_out.bias"),
        ({key: bias * float("nan")}, "expected finite weights, .*conv_out.bias"),
        ({key: None}, "1 missing: auxiliary.decoder.*conv_out.bias"),
    ):
        weights = {**golden.weights, **change}
        weights = {key: weight for key, weight in weights.items() if weight is not None}
        script, *flags = save(golden._replace(weights=weights), tmp_path)
        assert_raises(words, script, *flags, output=tmp_path / "level")


def test_residual_tokenizers_are_refused(tmp_path):
    """The grids of VAR are no levels: see the message."""
    weights = {"quantize.quant_resi.qresi_ls.0.weight": torch.zeros(4, 4, 3, 3)}
    torch.save(weights, tmp_path / "vae_ch160v4096z32.pth")
    flags = "--checkpoint_path", tmp_path / "vae_ch160v4096z32.pth"
    words = "one grid of codes in .*, got residual grids, as those of VAR"
    assert_raises(words, "convert_llamagen", *flags, output=tmp_path / "level")
