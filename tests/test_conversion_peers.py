"""Converted tokenizers against the code of optional libraries."""

import pytest
import torch
import yaml
from torch import nn

from helpers.conversion import (
    assert_raises,
    assert_same_outputs,
    assert_same_weights,
    convert,
    pixels,
    shake,
)

INSTALL = (
    "pip install --no-deps taming-transformers-rom1504==0.0.6 DALL-E==0.1 "
    "&& pip install attrs requests einops"
)
DDCONFIG = {
    "double_z": False, "z_channels": 5, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
SIZES = {"embed_dim": 4, "n_embed": 24}


def need(*names: str) -> list:
    return [pytest.importorskip(name, reason=f"run `{INSTALL}`") for name in names]


def write_yaml(path, target="taming.models.vqgan.VQModel", ddconfig=None, **params):
    params = {"ddconfig": {**DDCONFIG, **(ddconfig or {})}, **SIZES, **params}
    params = {name: value for name, value in params.items() if value != "removed"}
    path.write_text(yaml.safe_dump({"model": {"target": target, "params": params}}))


# ---- taming-transformers -------------------------------------------------------------------------


class Taming(nn.Module):
    """Its `VQModel`, without Lightning."""

    def __init__(self, ddconfig: dict, embed_dim: int, n_embed: int):
        super().__init__()
        model, quantize = need(
            "taming.modules.diffusionmodules.model", "taming.modules.vqvae.quantize"
        )
        self.encoder, self.decoder = model.Encoder(**ddconfig), model.Decoder(**ddconfig)
        self.quantize = quantize.VectorQuantizer2(n_embed, embed_dim, beta=0.25)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    @torch.no_grad()
    def outputs(self, x):
        quantized, _, (_, _, codes) = self.quantize(self.quant_conv(self.encoder(x)))
        codes = codes.view(len(x), *quantized.shape[2:])
        vectors = self.quantize.get_codebook_entry(
            codes.flatten(), (*codes.shape, quantized.shape[1])
        )
        return codes, self.decoder(self.post_quant_conv(vectors))


@pytest.mark.parametrize("changes", [
    {}, {"attn_resolutions": []}, {"attn_resolutions": [16, 4], "num_res_blocks": 2},
    {"ch_mult": [1, 2], "attn_resolutions": [8]}, {"in_channels": 1, "out_ch": 1},
    {"resolution": 18, "attn_resolutions": [18, 8]},  # where the decoder has other resolutions
    {"attn_type": "none"},
], ids=str)  # fmt: skip
def test_a_vqgan(tmp_path, changes, monkeypatch):
    (nets,) = need("taming.modules.diffusionmodules.model")
    if changes.get("attn_type") == "none":  # as in latent diffusion
        monkeypatch.setattr(nets, "AttnBlock", lambda channels: nn.Identity())
    model = shake(Taming({**DDCONFIG, **changes}, **SIZES))
    write_yaml(tmp_path / "model.yaml", ddconfig=changes, monitor="val/rec_loss")
    loss = {"main.0.weight": torch.ones(2, 2), "main.3.num_batches_tracked": torch.tensor(7)}
    state = {**model.state_dict(), **{f"loss.discriminator.{k}": v for k, v in loss.items()}}
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, tmp_path / "last.ckpt")
    level = convert(
        "convert_taming_vqgan", "--checkpoint_path", tmp_path / "last.ckpt",
        "--config_file", tmp_path / "model.yaml", output=tmp_path / "level",
    )  # fmt: skip
    x = pixels(model.encoder.in_channels)
    codes, image = model.outputs(x)
    assert_same_outputs(level, x, codes, image.clamp(-1, 1))


def test_the_first_stage_of_a_latent_diffusion(tmp_path, capsys):
    model = shake(Taming(DDCONFIG, **SIZES))
    torch.save(model.state_dict(), tmp_path / "stage.pt")
    target = "ldm.models.autoencoder.VQModelInterface"
    write_yaml(tmp_path / "stage.yaml", target, use_ema=False)
    stage = yaml.safe_load((tmp_path / "stage.yaml").read_text())["model"]
    diffusion = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion",
             "params": {"timesteps": 1000, "first_stage_config": stage}}  # fmt: skip
    (tmp_path / "diffusion.yaml").write_text(yaml.safe_dump({"model": diffusion}))
    state = {f"first_stage_model.{key}": value for key, value in model.state_dict().items()}
    state["model.diffusion_model.out.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "diffusion.ckpt")
    levels = [
        convert(
            "convert_taming_vqgan", "--checkpoint_path", tmp_path / checkpoint,
            "--config_file", tmp_path / config, output=tmp_path / f"level_{checkpoint}_{config}",
        )
        for checkpoint in ("stage.pt", "diffusion.ckpt")
        for config in ("stage.yaml", "diffusion.yaml")
    ]  # fmt: skip
    for level in levels[1:]:
        assert_same_weights(levels[0], level)
    codes, image = model.outputs(pixels())
    assert_same_outputs(levels[0], pixels(), codes, image.clamp(-1, 1))
    assert "ignored: 1 weights that are not first_stage_model.*" in capsys.readouterr().out


@pytest.mark.parametrize("changes, words", [
    ({"ddconfig": {"double_z": True}}, "expected double_z=False in ddconfig of"),
    ({"ddconfig": {"resamp_with_conv": False}}, "expected resamp_with_conv=True in ddconfig"),
    ({"ddconfig": {"attn_type": "linear"}}, "expected attn_type 'vanilla' or 'none'"),
    ({"ddconfig": {"ch_mult": [2, 4]}}, "expected ch_mult to begin with 1"),
    ({"ddconfig": {"ch_mult": 3}}, "expected ch_mult to be a list of numbers"),
    ({"ddconfig": {"depth": 3}}, r"in ddconfig of .* got \['depth'\]"),
    ({"ddconfig": {"ch": None}}, "expected ch to be a number in .*, got None"),
    ({"ddconfig": {"ch": 33}}, "tokenizer_config of a network of 'vq_model', got .*num_groups"),
    ({"target": "taming.models.vqgan.GumbelVQ"}, "got taming.models.vqgan.GumbelVQ"),
    ({"target": "ldm.models.autoencoder.AutoencoderKL"}, "got ldm.*AutoencoderKL"),
    ({"remap": "used.npy"}, "expected no remap in"),
    ({"embed_dim": "removed"}, "expected embed_dim to be a number"),
    ({"n_embed": 25}, r"quantize.embedding.weight \(24, 4\), expected \(25, 4\)"),
    ({"quantizer": "x"}, r"expected params of a VQGAN in .*, got \['quantizer'\]"),
], ids=str)  # fmt: skip
def test_vqgans_that_a_vqmodel_cannot_represent(tmp_path, changes, words):
    weights = {"quantize.embedding.weight": torch.zeros(24, 4)}
    torch.save(weights, tmp_path / "last.ckpt")
    write_yaml(tmp_path / "model.yaml", **changes)
    assert_raises(
        words, "convert_taming_vqgan", "--checkpoint_path", tmp_path / "last.ckpt",
        "--config_file", tmp_path / "model.yaml", output=tmp_path / "level",
    )  # fmt: skip


def test_a_vqgan_without_a_config(tmp_path):
    flags = "convert_taming_vqgan", "--checkpoint_path", tmp_path / "last.ckpt"
    path, target = tmp_path / "model.yaml", tmp_path / "level"
    assert_raises("expected config_file, the YAML file", *flags, output=target)
    assert_raises("expected YAML in config_file", *flags, "--config_file", path, output=target)
    path.write_text("model: [1, 2")
    assert_raises("expected YAML in config_file", *flags, "--config_file", path, output=target)
    path.write_text("model: {target: a.VQModel}")
    assert_raises("a section params in", *flags, "--config_file", path, output=target)
    write_yaml(path)
    assert_raises("file of weights, got .*last.ckpt", *flags, "--config_file", path, output=target)


# ---- DALL-E --------------------------------------------------------------------------------------


def save_dalle(folder, num_blocks: int = 1):
    (dall_e,) = need("dall_e")
    sizes = {"n_hid": 64, "n_blk_per_group": num_blocks, "vocab_size": 512}
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(n_init=8, **sizes)
    generator = torch.Generator().manual_seed(0)
    for part, model in (("encoder", encoder), ("decoder", decoder)):
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if noise.ndim == 4:  # a mean would dominate after a ReLU
                noise -= noise.mean(1, keepdim=True)
            scale = 0.1 if name.endswith(".b") else (weight[0].numel() / 2) ** -0.5
            scale = 1.0 if part == "decoder" and name == "blocks.input.w" else scale
            weight.copy_(noise * scale)
        torch.save(model.state_dict(), folder / f"{part}.pt")
    return dall_e, encoder, decoder


@pytest.mark.parametrize("num_blocks", [1, 2])
@torch.no_grad()
def test_the_discrete_vae_of_dalle(tmp_path, num_blocks):
    folder = tmp_path / "source"
    folder.mkdir()
    dall_e, encoder, decoder = save_dalle(folder, num_blocks)
    flags = "convert_dalle_dvae", "--checkpoint_path", folder
    level = convert(*flags, output=tmp_path / "level")
    x = pixels(size=32)
    codes = encoder(dall_e.map_pixels((x + 1) / 2)).argmax(1)
    logits = decoder(nn.functional.one_hot(codes, 512).movedim(-1, 1).float())
    image = dall_e.unmap_pixels(logits[:, :3].sigmoid())
    assert_same_outputs(level, x, codes, image * 2 - 1)

    assert_raises("expected no config_file", *flags, "--config_file", "x", output=tmp_path / "no")
    weights = torch.load(folder / "decoder.pt", weights_only=True)
    torch.save({**weights, "blocks.group_5.w": torch.zeros(1)}, folder / "decoder.pt")
    assert_raises("unexpected: decoder.blocks.group_5.w", *flags, output=tmp_path / "no")
    del weights["blocks.group_2.block_1.res_path.conv_1.b"]
    torch.save(weights, folder / "decoder.pt")
    assert_raises("missing: auxiliary.decoder.group_2.block_1.res_path.conv_1.bias", *flags,
                   output=tmp_path / "no")  # fmt: skip
    torch.save(decoder, folder / "decoder.pt")  # as OpenAI's are
    assert_raises("contains code or objects, which is not loaded", *flags, output=tmp_path / "no")
    (folder / "decoder.pt").unlink()
    assert_raises("expected decoder with a suffix among", *flags, output=tmp_path / "no")
    torch.save({"blocks.input.weight": torch.zeros(1)}, folder / "decoder.pt")
    assert_raises("expected a convolution blocks.input.w in the decoder, got none", *flags,
                   output=tmp_path / "no")  # fmt: skip
