"""The real classes at tiny size, with weights that make no distribution uniform."""

import torch

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)

# (ordering, downsample, num_groups) of pixels; codes have the raster and diagonals too.
PIXEL_ORDERS = [
    ("factorized", 2, None), ("factorized", 4, None), ("lattice", 2, None), ("lattice", 4, 7),
    ("lattice", 2, 7), ("lattice", 4, 10), ("masked", 2, 3), ("masked", 4, None),
]  # fmt: skip
CODE_ORDERS = [
    *PIXEL_ORDERS, ("raster", 2, None), ("raster", 4, None), ("diagonal", 2, None),
    ("diagonal", 2, 3),
]  # fmt: skip
ORDER_NAMES = "order, downsample, num_groups"
LOGISTICS = {"pixel_distribution": "logistic_mixture"}
GUIDED = {"pixel_distribution": "guided_logistic_mixture", "auxiliary_hidden_size": 8}
PALETTE = {"palette_size": 3}
AUXILIARY = {"auxiliary_hidden_size": 8}
AUXILIARY_ONLY = {**AUXILIARY, "decoder_type": "auxiliary"}


def randomize(model, seed: int = 0, scale: float = 0.5):
    """Random weights everywhere: fresh levels are uniform and their blocks the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("codebook") and model.config.quantizer == "vq":
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.eval()


def tiny_level(seed: int = 0, **config) -> ProgressiveVAELevel:
    config = {"codebook_size": 3, "codebook_dim": 4, "hidden_size": 8, "num_layers": 1, **config}
    return randomize(ProgressiveVAELevel(ProgressiveVAELevelConfig(**config)), seed)


def decoder_fields(name: str) -> dict[str, str]:
    """The config's fields of the decoder with an ordering, or of a decoder type."""
    if name in ("auxiliary", "transformer"):
        return {"decoder_type": name}
    types = {"raster": "causal_lm", "diagonal": "transformer"}
    return {"ordering": name, "decoder_type": types.get(name, "conv")}


def level_of(order, downsample, num_groups, **config):
    fields = {"downsample": downsample, "num_groups": num_groups, **decoder_fields(order)}
    return tiny_level(**{**fields, **config})


def tiny_prior(seed: int = 0, **config) -> ProgressiveVAEPrior:
    backbone = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    config = {"codebook_size": 3, "grid_size": [2, 2], "backbone_config": backbone, **config}
    return randomize(ProgressiveVAEPrior(ProgressiveVAEPriorConfig(**config)), seed, 0.4)


def tiny_pipeline(num_channels: int = 3, **prior) -> ProgressiveVAEPipeline:
    """N = 3, images of 5×7: grids of 3×4, 2×2 and 1×1 codes."""
    pipe = ProgressiveVAEPipeline(
        prior=tiny_prior(grid_size=[1, 1], num_classes=2, codebook_size=3, **prior),
        level_1=tiny_level(num_symbols=4, seed=1),
        level_2=tiny_level(num_symbols=5, codebook_size=4, seed=2),
        level_3=tiny_level(num_channels=num_channels, codebook_size=5, seed=3),
        image_size=[5, 7],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_of(**kind) -> ProgressiveVAEPipeline:
    """N = 2, images of 5×7."""
    coarsest = tiny_level(num_symbols=4, seed=1, **kind)
    finest = tiny_level(num_channels=3, codebook_size=4, seed=2, **kind)
    pipe = ProgressiveVAEPipeline.from_levels(
        tiny_prior(grid_size=[2, 2]), [coarsest, finest], [5, 7]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def weights_of(pipe):
    return {
        f"{n}.{k}": v for n in pipe.factor_names for k, v in getattr(pipe, n).state_dict().items()
    }


def assert_same(pipe, other):
    expected = weights_of(other)
    for name, value in weights_of(pipe).items():
        assert torch.equal(value, expected[name]), name
    assert type(other) is ProgressiveVAEPipeline and other.image_shape == pipe.image_shape
