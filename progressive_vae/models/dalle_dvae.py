"""The discrete VAE of DALL-E (Ramesh et al. 2021): its decoder, and the range of its pixels.

Its encoder is transformers' `FlavaImageCodebook`; no library has the decoder.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

LOGIT_LAPLACE_EPS = 0.1  # pixels are scaled to [ε, 1 − ε], as logits of 0 and 1 are infinite


def to_logit_laplace(pixel_values: Tensor) -> Tensor:
    """Scale pixels from [−1, 1] to the encoder's range [ε, 1 − ε]."""
    return (pixel_values + 1) / 2 * (1 - 2 * LOGIT_LAPLACE_EPS) + LOGIT_LAPLACE_EPS


def logit_laplace_medians(parameters: Tensor) -> Tensor:
    """Return the medians of logit-Laplace distributions, an image (B, C, H, W) in [−1, 1].

    Args:
        parameters: locations and log-scales, (B, 2C, H, W).
    """
    unit = parameters.chunk(2, 1)[0].sigmoid()
    return (unit - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS) * 2 - 1


def dalle_encoder(fields: dict[str, Any]) -> nn.Module:
    """Return the encoder: pixels (B, C, H, W) in [ε, 1 − ε] -> logits of codes (B, K, H/8, W/8)."""
    config = FlavaImageCodebookConfig(
        num_groups=4,
        input_channels=fields["num_channels"],
        num_blocks_per_group=fields["n_blk_per_group"],
        hidden_size=fields["n_hid"],
        vocab_size=fields["vocab_size"],
        freeze=False,
    )
    return FlavaImageCodebook(config).blocks


class _Block(nn.Module):
    """A residual block with a gain on its branch, 1 / depth²; names are those of `dall_e`."""

    def __init__(self, width_in: int, width: int, depth: int):
        super().__init__()
        hidden = width // 4
        self.gain = 1 / depth**2
        is_same = width_in == width
        self.id_path = nn.Identity() if is_same else nn.Conv2d(width_in, width, 1)
        self.res_path = nn.Sequential(
            OrderedDict(
                relu_1=nn.ReLU(),
                conv_1=nn.Conv2d(width_in, hidden, 1),
                relu_2=nn.ReLU(),
                conv_2=nn.Conv2d(hidden, hidden, 3, padding=1),
                relu_3=nn.ReLU(),
                conv_3=nn.Conv2d(hidden, hidden, 3, padding=1),
                relu_4=nn.ReLU(),
                conv_4=nn.Conv2d(hidden, width, 3, padding=1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


def dalle_decoder(fields: dict[str, Any]) -> nn.Module:
    """Return the decoder: code vectors (B, n_init, H/8, W/8) -> parameters (B, 2C, H, W).

    Names of modules are those of `dall_e`.
    """
    num_blocks = fields["n_blk_per_group"]
    width_in = fields["n_init"]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, factor in enumerate((8, 4, 2, 1), 1):
        width = factor * fields["n_hid"]
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, num_blocks + 1):
            group[f"block_{i}"] = _Block(width_in, width, 4 * num_blocks)
            width_in = width
        if factor > 1:
            group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
        layers[f"group_{number}"] = nn.Sequential(group)
    out = nn.Conv2d(width_in, 2 * fields["num_channels"], 1)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=out))
    return nn.Sequential(layers)
