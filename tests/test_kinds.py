"""Every order, quantizer and head that a config can name: trained a step, saved, loaded, walked."""

import pytest
import torch

from helpers.models import decoder_fields
from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig
from progressive_vae.configuration.decoders import (
    COMPONENT_MEANS_DISTRIBUTIONS,
    DECODER_TYPES,
    GUIDED_DISTRIBUTIONS,
    PIXEL_DISTRIBUTIONS,
)
from progressive_vae.models.quantizers import QUANTIZERS
from progressive_vae.models.walk import TeacherForcing

# An ordering has its decoder type; "auxiliary" has no decoder of its own.
PIXEL_ORDERS = ["factorized", "lattice", "masked", "auxiliary"]
ORDERS = [*PIXEL_ORDERS, "raster"]
KINDS = [
    *({**decoder_fields(order), "num_symbols": 5} for order in ORDERS),
    *({**decoder_fields(order), "num_channels": 3} for order in PIXEL_ORDERS),
    {"auxiliary_hidden_size": 8, "num_channels": 3},
    {"auxiliary_hidden_size": 8, "num_channels": 3, "dither": 1.0},
    *({"dither": 1.0, "num_symbols": 5, **decoder_fields(order)} for order in ORDERS),
    *(
        {"decoder_type": "transformer", "ordering": ordering, "num_symbols": 5}
        for ordering in DECODER_TYPES["transformer"]
    ),
    {"decoder_type": "transformer", "num_channels": 3},
    {"decoder_type": "transformer", "ordering": "diagonal", "num_channels": 1},
    *(
        {"bits_per_block": 2, "num_symbols": 64, **decoder_fields(name)}
        for name in ("lattice", "transformer")
    ),
    *({"quantizer": kind, "num_channels": 1} for kind in QUANTIZERS),
    {"quantizer_gradient": "rotation", "num_channels": 1},
    *({"pixel_distribution": kind, "num_channels": 3} for kind in PIXEL_DISTRIBUTIONS),
    *(
        {"palette_size": 3, "pixel_distribution": kind, "num_channels": 3}
        for kind in PIXEL_DISTRIBUTIONS
    ),
    *(
        {"pixel_distribution": kind, **decoder_fields(order), "num_channels": 1}
        for kind in PIXEL_DISTRIBUTIONS
        for order in PIXEL_ORDERS
        if kind not in COMPONENT_MEANS_DISTRIBUTIONS
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_trained_saved_loaded_and_walked(kind, tmp_path):
    torch.manual_seed(0)
    is_guided = kind.get("pixel_distribution") in GUIDED_DISTRIBUTIONS
    if kind.get("decoder_type") == "auxiliary" or is_guided:
        kind = {**kind, "auxiliary_hidden_size": 8}
    config = ProgressiveVAELevelConfig(codebook_size=8, hidden_size=8, num_layers=1, **kind)
    level = ProgressiveVAELevel(config).train()
    shape = (3, 5, 7) if "num_symbols" in kind else (3, kind["num_channels"], 5, 7)
    values = torch.randint(config.num_symbols or config.num_values, shape)
    finer = values if "num_symbols" in kind else level.value_type.from_indices(values)
    level.quantizer.initialize(torch.randn(50, config.codebook_dim), torch.Generator())
    optimizer = torch.optim.AdamW(level.parameters(), lr=0.05)
    for _ in range(3):
        output = level(finer)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        level.after_step(output, lambda tensor: tensor)
    level.eval().save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path).eval()
    codes = level.encode(finer)
    assert torch.equal(codes, loaded.encode(finer))
    with torch.no_grad():
        nats = level.log_prob(finer, codes)
        teacher = TeacherForcing(level.value_type.to_indices(finer))
        walked = loaded.walk(codes, teacher, finer_size=(5, 7))
    assert torch.equal(walked, finer)
    assert torch.allclose(teacher.log_prob(), nats, rtol=1e-4)
    assert loaded.sample(codes, finer_size=(5, 7)).shape == finer.shape
