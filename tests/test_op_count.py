"""Limits of operations, each of which starts a kernel on a GPU, and of reads of values."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from helpers.models import tiny_level
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.evaluation.op_count import as_on_accelerator, count_ops

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def script():
    return load_script("count_operations")


@pytest.fixture(scope="module", params=["color_64", "fashion_mnist", "cifar10"])
def model(request, script):
    name = request.param
    if name != "cifar10":
        return name, ProgressiveVAEPipeline.from_pretrained(EXAMPLES / name)
    # The number of operations does not depend on the width.
    narrow = {"levels": {"hidden_size": 16}, "level_1": {"hidden_size": 64}}
    recipe = EXAMPLES / "configs" / "cifar10.yaml"
    return name, script.untrained_pipeline(recipe, (3, 32, 32), 10, narrow)


# Each of the 64 codes of level_1 of CIFAR-10 is a step of a language model.
SAMPLING_LIMITS = {"color_64": 3000, "fashion_mnist": 1100, "cifar10": 4700}
TRAINING_LIMITS = {
    ("color_64", 3): 1000,
    ("fashion_mnist", 2): 400,
    ("cifar10", 1): 370,  # 24 of them are casts that only CPUs need
    ("cifar10", 2): 700,
}


@pytest.mark.unit
def test_samples_take_few_operations(model, script):
    name, pipe = model
    with as_on_accelerator():
        counts = script.sampling_ops(pipe, 2)
    assert sum(count.num_ops for count in counts.values()) <= SAMPLING_LIMITS[name]
    assert not any(count.waits for count in counts.values())


@pytest.mark.unit
@torch.no_grad()
def test_a_transformer_takes_few_operations():
    """60 for each of the 13 groups in sampling, and one pass for all groups in the likelihood."""
    config = {"num_symbols": 5, "downsample": 4, "num_layers": 3, "ordering": "diagonal"}
    level = tiny_level(decoder_type="transformer", **config)
    finer = torch.zeros(2, 7, 7, dtype=torch.long)
    codes = level.encode(finer)
    with as_on_accelerator():
        sampling = count_ops(lambda: level.sample(codes, finer_size=(7, 7)))
        likelihood = count_ops(lambda: level.log_prob(finer, codes))
    assert sampling.num_ops <= 66 * 13 and likelihood.num_ops <= 95
    assert not sampling.waits and not likelihood.waits


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
def test_a_compiled_transformer_layer_has_few_kernels(script):
    kernels = script.transformer_kernels(3, width=16) - script.transformer_kernels(2, width=16)
    assert kernels["mm"] == 15 and kernels.total() <= 25


@pytest.mark.unit
def test_training_steps_take_few_operations(model, script):
    name, pipe = model
    for i, level in enumerate(pipe.levels, 1):
        with as_on_accelerator():
            counts = script.training_ops(level, pipe.grid_sizes[i], 2)
        total = sum(count.num_ops for count in counts.values())
        assert total <= TRAINING_LIMITS.get((name, i), 300), f"{name} level_{i}"
        assert not counts["forward"].waits and not counts["backward"].waits
