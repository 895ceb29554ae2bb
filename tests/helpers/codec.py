"""Pipelines of each kind of level, for the codec."""

from helpers.models import AUXILIARY_ONLY, PALETTE, decoder_fields, tiny_level, tiny_prior
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.configuration.decoders import GUIDED_DISTRIBUTIONS, PIXEL_DISTRIBUTIONS
from progressive_vae.models.quantizers import QUANTIZERS

KINDS = [
    *(
        decoder_fields(order)
        for order in ("factorized", "lattice", "masked", "raster", "transformer")
    ),
    AUXILIARY_ONLY,
    *({"quantizer": kind} for kind in QUANTIZERS),
    *({"pixel_distribution": kind} for kind in PIXEL_DISTRIBUTIONS),
    PALETTE,
]


def codec_pipeline(size, num_classes=0, **kind):
    """N = 2, colored images; z_1 is small enough for a prior and z_2 for the raster order."""
    models_codes_only = kind.get("decoder_type") == "causal_lm"
    finest = {**kind, **(decoder_fields("lattice") if models_codes_only else {})}
    if kind.get("pixel_distribution") in GUIDED_DISTRIBUTIONS:
        finest["auxiliary_hidden_size"] = 8
    classes = {"num_classes": num_classes}
    of_codes = {k: v for k, v in kind.items() if k != "pixel_distribution"}
    fixed = {"codebook_dim": None} if kind.get("quantizer") in ("fsq", "lfq", "bsq") else {}
    levels = [
        tiny_level(1, num_symbols=4, downsample=8, codebook_size=4, **of_codes, **fixed),
        tiny_level(2, num_channels=3, downsample=8, codebook_size=4, **finest, **fixed),
    ]
    grid_size = [-(-n // 64) for n in size]
    prior = tiny_prior(grid_size=grid_size, codebook_size=levels[0].config.codebook_size, **classes)
    pipe = ProgressiveVAEPipeline.from_levels(prior, levels, size)
    pipe.set_progress_bar_config(disable=True)
    return pipe
