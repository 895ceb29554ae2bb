"""Limits of operations, each of which starts a kernel on a GPU, and of reads of values."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.evaluation.op_count import as_on_accelerator

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


# Each code of level_1 of Fashion-MNIST and CIFAR-10 is a step of a language model: 49 and 64 codes.
SAMPLING_LIMITS = {"color_64": 3000, "fashion_mnist": 2400, "cifar10": 4700}
TRAINING_LIMITS = {
    ("color_64", 3): 1000,
    ("fashion_mnist", 2): 400,
    ("cifar10", 1): 350,
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
def test_training_steps_take_few_operations(model, script):
    name, pipe = model
    for i, level in enumerate(pipe.levels, 1):
        with as_on_accelerator():
            counts = script.training_ops(level, pipe.grid_sizes[i], 2)
        total = sum(count.num_ops for count in counts.values())
        assert total <= TRAINING_LIMITS.get((name, i), 300), f"{name} level_{i}"
        assert not counts["forward"].waits and not counts["backward"].waits
