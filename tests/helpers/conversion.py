"""Checkpoints to convert, and comparisons with their source."""

from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from helpers.scripts import load_script
from progressive_vae import ProgressiveVAELevel

PLAIN = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 5, "vq_embed_dim": 4,
    "num_vq_embeddings": 24, "sample_size": 16,
}  # fmt: skip
VQMODELS = {
    "plain": PLAIN,
    "attentive": PLAIN | {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "layers_per_block": 2,
    },
    "spatial": PLAIN
    | {"norm_type": "spatial", "block_out_channels": [32, 64], "norm_num_groups": 32,
       "vq_embed_dim": 5},
    "like amused's": PLAIN | {
        "mid_block_add_attention": False, "lookup_from_codebook": True, "force_upcast": True,
        "in_channels": 1, "out_channels": 1, "vq_embed_dim": None,
    },
}  # fmt: skip


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights under which codes differ from place to place and images are within their range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "embedding" in name:
                weight.copy_(noise)
            elif weight.ndim == 1:
                weight.copy_(("norm" in name and name.endswith("weight")) + 0.2 * noise)
            elif name == "quant_conv.weight":
                weight.copy_(noise)
            else:
                gain = 0.4 if name == "decoder.conv_out.weight" else 1.0
                weight.copy_(noise * gain / weight[0].numel() ** 0.5)
    return model.eval()


def pixels(channels: int = 3, size: int = 16, count: int = 2) -> torch.Tensor:
    """Images: 8-bit noise added to patches of 8-bit noise."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randint(200, (count, channels, size // 4, size // 4), generator=generator)
    values = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    values += torch.randint(56, values.shape, generator=generator)
    return values / 127.5 - 1


def convert(script: str, *words: object, output: Path) -> ProgressiveVAELevel:
    main = load_script(script, "conversion").main
    main([*map(str, words), "--output_path", str(output)])
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "model.safetensors"]
    assert not list(output.parent.glob("*incomplete*"))
    return ProgressiveVAELevel.from_pretrained(output).eval()


def assert_raises(
    words: str, script: str, *flags: object, output: Path, error: type[Exception] = ValueError
):
    """The script raises an error that matches `words`, and writes no files."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(error, match=words):
        load_script(script, "conversion").main([*map(str, flags), "--output_path", str(output)])
    assert sorted(output.parent.rglob("*")) == before


@torch.no_grad()
def assert_same_outputs(level, pixels, codes, image):
    """Equal codes, and images within 1e-4 of one that is not constant."""
    assert torch.equal(level.encode(pixels), codes) and len(codes.unique()) > 5
    assert image.std() > 0.1 and (image.abs() < 1).float().mean() > 0.5
    assert (level.expect(codes) - image).abs().max() < 1e-4


def save_vqmodel(folder: Path, kind: str = "plain", seed: int = 0, **options) -> VQModel:
    model = shake(VQModel(**VQMODELS[kind]), seed)
    model.save_pretrained(folder, **options)
    return model


def assert_same_weights(model, other):
    expected = other.state_dict()
    assert set(expected) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]) and weight.dtype == expected[name].dtype, name
