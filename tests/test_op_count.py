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


@pytest.fixture(scope="module", params=["color_64", "fashion_mnist"])
def model(request):
    return request.param, ProgressiveVAEPipeline.from_pretrained(EXAMPLES / request.param)


# A CPU takes six operations for a root mean square norm: 400 more than a GPU for the prior of
# color_64. Each of the 49 codes of Fashion-MNIST's level_1 is a step of a language model.
SAMPLING_LIMITS = {"color_64": 3900, "fashion_mnist": 2650}
TRAINING_LIMITS = {("color_64", 3): 1000, ("fashion_mnist", 2): 400}


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
