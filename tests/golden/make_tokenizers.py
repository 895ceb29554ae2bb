"""Write a golden file of a tokenizer: codes and image by the code of the project that it is from.

    python tests/golden/make_tokenizers.py llamagen LlamaGen
        a name of `MAKERS`, and a checkout of the project's repository.

Weights are random, as `helpers/tokenizers.py` makes them from their names and shapes. The golden
file contains these, the pixels, codes and image, and the commit of the checkout.
"""

import json
import re
import subprocess
import sys
from functools import partial
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.conversion import pixels  # noqa: E402
from helpers.tokenizers import GOLDEN, random_weights  # noqa: E402


def load(model: nn.Module, excluded: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Load random weights into a model, and return their shapes."""
    shapes = {
        name: list(weight.shape)
        for name, weight in model.state_dict().items()
        if not name.startswith(excluded)
    }
    incompatible = model.load_state_dict(random_weights(shapes), strict=False)
    assert all(name.startswith(excluded) for name in incompatible.missing_keys)
    model.eval()
    return shapes


def llamagen(x: Tensor):
    from tokenizer.tokenizer_image import vq_model

    for name in ("Encoder", "Decoder"):
        small = partial(getattr(vq_model, name), ch=32, num_res_blocks=1)
        setattr(vq_model, name, small)
    sizes = {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], "z_channels": 6}
    model = vq_model.VQModel(vq_model.ModelArgs(codebook_size=24, codebook_embed_dim=4, **sizes))
    shapes = load(model, excluded=("quantize.codebook_used",))
    quantized, _, (_, _, codes) = model.encode(x)
    codes = codes.view(len(x), *quantized.shape[2:])
    return shapes, codes, model.decode_code(codes.flatten(), quantized.shape)


class Parts(nn.Module):
    """A tokenizer from its parts, without the project's training code."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


DDCONFIG = {"double_z": False, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 2, 2], "num_res_blocks": 1}  # fmt: skip


def open_magvit2(x: Tensor):
    from src.Open_MAGVIT2.modules.diffusionmodules.improved_model import Decoder, Encoder
    from src.Open_MAGVIT2.modules.vqvae.lookup_free_quantize import LFQ

    sizes = {**DDCONFIG, "z_channels": 6}
    model = Parts(encoder=Encoder(**sizes), decoder=Decoder(**sizes))
    shapes = load(model)
    quantized, _, codes = LFQ(dim=6, codebook_size=2**6).eval()(model.encoder(x))
    return shapes, codes.view(len(x), *quantized.shape[2:]), model.decoder(quantized)


def ibq(x: Tensor):
    from src.IBQ.modules.diffusionmodules.model import Decoder, Encoder
    from src.IBQ.modules.vqvae.quantize import IndexPropagationQuantize

    sizes = {**DDCONFIG, "z_channels": 6, "attn_resolutions": [4], "dropout": 0.0}
    model = Parts(
        encoder=Encoder(**sizes),
        decoder=Decoder(**sizes),
        quantize=IndexPropagationQuantize(24, 5),
        quant_conv=nn.Conv2d(6, 5, 1),
        post_quant_conv=nn.Conv2d(5, 6, 1),
    )
    shapes = load(model)
    latents = model.quant_conv(model.encoder(x))
    _, _, (_, _, codes) = model.quantize(latents)
    codes = codes.view(len(x), *latents.shape[2:])
    quantized = model.quantize.embedding(codes).movedim(-1, 1)
    return shapes, codes, model.decoder(model.post_quant_conv(quantized))


def stub_torchvision():
    """Losses import it, and are imported beside the networks."""
    for name in (
        "",
        ".models",
        ".models.feature_extraction",
        ".transforms",
        ".transforms._presets",
    ):
        sys.modules[f"torchvision{name}"] = MagicMock()


def maskbit(x: Tensor):
    stub_torchvision()
    from modeling.conv_vqgan import ConvVQModel
    from omegaconf import OmegaConf

    model = ConvVQModel(
        OmegaConf.create(
            {"quantizer_type": "lookup-free", "token_size": 6, "commitment_cost": 0.25,
             "entropy_loss_weight": 0.0, "entropy_loss_temperature": 0.01, "entropy_gamma": 1.0,
             "num_channels": 3, "hidden_channels": 32, "channel_mult": [1, 2, 2],
             "num_resolutions": 3, "num_res_blocks": 1, "sample_with_conv": True}
        )
    )  # fmt: skip
    shapes = load(model, excluded=("quantize.",))
    _, results = model.encode((x + 1) / 2)
    codes = results["min_encoding_indices"]
    return shapes, codes, model.decode_tokens(codes.flatten(1)) * 2 - 1


# Constants in the source text of TiTok, and those of a small one.
SMALL_TITOK = {
    '"small": 512': '"small": 64',
    r'"small": 8,(\s+"base": 12,\s+"large": 24)': r'"small": 2,\1',
    r'"small": 8,(\s+"base": 12,\s+"large": 16)': r'"small": 1,\1',
    "2 \\* self.width, 1024": "2 * self.width, 16",
    r"\[1, 1, 2, 2, 4\]": "[1, 2, 2]",
    '"num_resolutions": 5': '"num_resolutions": 3',
    '"hidden_channels": 128': '"hidden_channels": 32',
    '"num_res_blocks": 2': '"num_res_blocks": 1',
    '"z_channels": 256': '"z_channels": 6',
    "num_embeddings=1024, embedding_dim=256": "num_embeddings=16, embedding_dim=6",
}


def titok(x: Tensor, has_codes: bool = True):
    stub_torchvision()
    sys.path_hooks.insert(0, FileFinder.path_hook((SmallLoader, [".py"])))
    sys.path_importer_cache.clear()
    from modeling.titok import TiTok

    fields = {"codebook_size": 24, "token_size": 5, "use_l2_norm": has_codes,
              "commitment_cost": 0.25, "vit_enc_model_size": "small", "vit_dec_model_size": "small",
              "vit_enc_patch_size": 4, "vit_dec_patch_size": 4, "num_latent_tokens": 8,
              "finetune_decoder": has_codes, "is_legacy": has_codes}  # fmt: skip
    model = TiTok({"model": {"vq_model": fields}, "dataset": {"preprocessing": {"crop_size": 16}}})
    shapes = load(model)
    codes = model.encode((x + 1) / 2)[1]["min_encoding_indices"]
    return shapes, codes, model.decode_tokens(codes) * 2 - 1


class SmallLoader(SourceFileLoader):
    """Imports modules with the constants of `SMALL_TITOK`."""

    def get_code(self, fullname):
        text = self.get_data(self.get_filename(fullname)).decode()
        for pattern, replacement in SMALL_TITOK.items():
            text = re.sub(pattern, replacement, text)
        return compile(text, fullname, "exec")


MAKERS = {
    "llamagen": llamagen,
    "open_magvit2": open_magvit2,
    "ibq": ibq,
    "maskbit": maskbit,
    "titok": titok,
    "titok_pixels": partial(titok, has_codes=False),
}


@torch.no_grad()
def main(name: str, checkout: str):
    sys.path.insert(0, checkout)
    x = pixels()
    shapes, codes, image = MAKERS[name](x)
    git = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    tensors = {
        "pixels": ((x + 1) * 127.5).round().to(torch.uint8),
        "codes": codes.int().contiguous(),
        "image": image.float().clamp(-1, 1).contiguous(),
    }
    print(name, tuple(codes.shape), len(codes.unique()), "codes, image", image.std().item())
    metadata = {"shapes": json.dumps(shapes), "commit": commit}
    save_file(tensors, GOLDEN / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
