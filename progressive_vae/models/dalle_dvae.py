"""The discrete VAE of DALL-E (Ramesh et al. 2021): its decoder, and how both its nets see pixels.

Its encoder is transformers' `FlavaImageCodebook`; no library keeps the decoder.
"""

from collections import OrderedDict

from torch import Tensor, nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

LOGIT_LAPLACE_EPS = 0.1  # of each end of [0, 1], which a logit does not reach


def to_unit(finer: Tensor) -> Tensor:
    """Pixels in [−1, 1] as the encoder sees them, in [ε, 1 − ε]."""
    return (finer + 1) / 2 * (1 - 2 * LOGIT_LAPLACE_EPS) + LOGIT_LAPLACE_EPS


def from_logits(parameters: Tensor) -> Tensor:
    """Locations and log-scales of logit-Laplace distributions, (B, 2C, H, W), as an image in
    [−1, 1] at their medians."""
    unit = parameters.chunk(2, 1)[0].sigmoid()
    return (unit - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS) * 2 - 1


def dalle_encoder(fields: dict) -> nn.Module:
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
    """A residual block whose branch has a gain that goes with the depth of the net."""

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


def dalle_decoder(fields: dict) -> nn.Module:
    """From vectors of codes, (B, n_init, h, w), to (B, 2C, 8h, 8w); names are those of `dall_e`."""
    count, width_in = fields["n_blk_per_group"], fields["n_init"]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, times in enumerate((8, 4, 2, 1), 1):
        width = times * fields["n_hid"]
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, count + 1):
            group[f"block_{i}"] = _Block(width_in, width, 4 * count)
            width_in = width
        if times > 1:
            group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
        layers[f"group_{number}"] = nn.Sequential(group)
    out = nn.Conv2d(width_in, 2 * fields["num_channels"], 1)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=out))
    return nn.Sequential(layers)
