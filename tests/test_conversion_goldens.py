"""Converted tokenizers have the codes and images of other projects' code, in golden files.

`golden/make_tokenizers.py` wrote these, with random weights at tiny size.
"""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from helpers.conversion import assert_raises, assert_same_outputs, convert, pixels
from helpers.recipes import RECIPE
from helpers.scripts import load_script
from helpers.tokenizers import Golden, load_golden
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.image_processor import from_pixel_values
from progressive_vae.models.fingerprint import fingerprint
from progressive_vae.training import train


def save_llamagen(golden: Golden, folder):
    usage = {"quantize.codebook_used": torch.zeros(4)}
    torch.save({"model": {**golden.weights, **usage}}, folder / "vq.pt")
    return "convert_llamagen", "--checkpoint_path", folder / "vq.pt"


def load_llamagen(folder):
    weights = torch.load(folder / "vq.pt", weights_only=True)["model"]
    assert weights.pop("quantize.codebook_used").shape == (65_536,)
    return weights


def save_seed_voken(class_path: str):
    def save(golden: Golden, folder):
        training = {"loss.discriminator.bn.num_batches_tracked": torch.tensor(3),
                    "model_ema.num_updates": torch.tensor(3)}  # fmt: skip
        averages = {f"model_ema.{k.replace('.', '')}": v for k, v in golden.weights.items()}
        current = {key: torch.zeros_like(weight) for key, weight in golden.weights.items()}
        state = {**current, **training, **averages}
        torch.save({"state_dict": state, "epoch": 3}, folder / "last.ckpt")
        ddconfig = {"double_z": False, "z_channels": 6, "resolution": 16, "in_channels": 3,
                    "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1,
                    "attn_resolutions": [4]}  # fmt: skip
        fields = {"ddconfig": ddconfig, "n_embed": 24, "embed_dim": 5}
        config = {"model": {"class_path": class_path, "init_args": fields}}
        (folder / "model.yaml").write_text(yaml.safe_dump(config))
        return ("convert_seed_voken", "--checkpoint_path", folder / "last.ckpt",
                "--config_file", folder / "model.yaml")  # fmt: skip

    return save


def load_seed_voken(folder):
    weights = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    averages = {key: weights.pop(key) for key in [*weights] if key.startswith("model_ema.")}
    for key, weight in weights.items():
        assert torch.equal(averages.pop(f"model_ema.{key.replace('.', '')}"), weight)
    assert not averages
    return weights


def save_maskbit(golden: Golden, folder):
    constants = {"quantize.bits_to_indices": torch.arange(6), "quantize.codebook": torch.zeros(2)}
    torch.save({**golden.weights, **constants}, folder / "maskbit.bin")
    return "convert_maskbit", "--checkpoint_path", folder / "maskbit.bin"


def load_maskbit(folder):
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    bits, codebook = weights.pop("quantize.bits_to_indices"), weights.pop("quantize.codebook")
    assert bits.tolist() == [1, 2, 4, 8, 16, 32]
    assert codebook.shape == (64, 6) and codebook[3].tolist() == [1, 1, -1, -1, -1, -1]
    return weights


def save_titok(has_codes: bool):
    def save(golden: Golden, folder):
        source = folder / "titok"
        source.mkdir(exist_ok=True)
        save_file(golden.weights, source / "model.safetensors")
        fields = {"use_l2_norm": has_codes, "vit_enc_patch_size": 4, "vit_dec_patch_size": 4}
        if not has_codes:  # the defaults are others
            fields |= {"finetune_decoder": False, "is_legacy": False}
        sections = {"model": {"vq_model": fields}, "dataset": {"preprocessing": {"crop_size": 16}}}
        (source / "config.json").write_text(json.dumps(sections))
        return "convert_titok", "--checkpoint_path", source

    return save


def load_titok(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


# name: a function that writes a source, and one that reads what was converted back.
SOURCES = {
    "llamagen": (save_llamagen, load_llamagen),
    "open_magvit2": (save_seed_voken("src.Open_MAGVIT2.models.lfqgan.VQModel"), load_seed_voken),
    "ibq": (save_seed_voken("src.IBQ.models.ibqgan.IBQ"), load_seed_voken),
    "maskbit": (save_maskbit, load_maskbit),
    "titok": (save_titok(True), load_titok),
    "titok_pixels": (save_titok(False), load_titok),
}
NAMES = pytest.mark.parametrize("name", SOURCES)


class Converted(NamedTuple):
    golden: Golden
    folder: Path  # of the level
    level: ProgressiveVAELevel


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A function from a name to its converted level."""

    @cache
    def convert_source(name: str) -> Converted:
        golden, folder = load_golden(name), tmp_path_factory.mktemp(name)
        script, *flags = SOURCES[name][0](golden, folder)
        level = convert(script, *flags, output=folder / "level")
        return Converted(golden, folder / "level", level)

    return convert_source


@NAMES
def test_codes_and_images_are_those_of_the_source(name, converted):
    golden, _, level = converted(name)
    assert_same_outputs(level, golden.pixels, golden.codes, golden.image)


@NAMES
def test_the_way_back_to_the_source(tmp_path, name, converted):
    golden, folder, _ = converted(name)
    save, load = SOURCES[name]
    script = load_script(save(golden, tmp_path)[0], "conversion")
    flags = ["--reverse", "--checkpoint_path", str(folder), "--output_path", str(tmp_path / "back")]
    script.main(flags)
    back = load(tmp_path / "back")
    assert set(back) == set(golden.weights)
    for key, weight in golden.weights.items():
        assert torch.equal(back[key], weight), key


@pytest.mark.parametrize(
    "name, num_levels", [("llamagen", 1), ("open_magvit2", 1), ("maskbit", 1), ("titok", 2)]
)
def test_from_a_tokenizer_to_images(tmp_path, name, num_levels, converted):
    """Levels and a prior on a folder of images, above the converted level; samples; a push."""
    golden, folder, level = converted(name)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(from_pixel_values(pixels(count=12), "pil")):
        image.save(tmp_path / "photos" / f"{i}.png")
    recipe = deepcopy(RECIPE)
    recipe["levels"]["fit"] = recipe["prior"]["fit"] = {"max_train_steps": 1}
    recipe["num_levels"] = num_levels
    recipe["run"] |= {"finest_level": str(folder), "num_validation_images": 1}
    AcceleratorState._reset_state(reset_partial_state=True)
    pipe = train(recipe, tmp_path / "photos", tmp_path / "run")
    pipe.push_to_hub(f"org/{name}")
    assert fingerprint([pipe.levels[-1]]) == fingerprint([level])
    again = ProgressiveVAEPipeline.from_pretrained(f"org/{name}")
    outputs = [
        model(num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), preview=True)
        for model in (pipe, again)
    ]
    assert outputs[0].codes[-1].shape == golden.codes.shape
    assert torch.equal(outputs[0].codes[-1], outputs[1].codes[-1])
    assert outputs[1].images[0].size == (16, 16)


@NAMES
def test_damaged_weights_write_nothing(tmp_path, name):
    golden = load_golden(name)
    save, _ = SOURCES[name]
    key = next(key for key in golden.weights if key.endswith("decoder.conv_out.bias"))
    bias = golden.weights[key]
    for change, words in (
        ({"decoder.extra.weight": torch.zeros(2)}, "1 unexpected: decoder.extra.weight"),
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
