"""Write a golden file of a tokenizer: codes and image by the code of the project that it is from.

    python tests/golden/make_tokenizers.py llamagen LlamaGen
        a name of `MAKERS`, and a checkout of the project's repository.

Weights are random, as `helpers/tokenizers.py` makes them from their names and shapes. The golden
file contains these, the pixels, codes and image, and the commit of the checkout.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

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
    model.load_state_dict(random_weights(shapes), strict=False)
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


MAKERS = {"llamagen": llamagen}


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
