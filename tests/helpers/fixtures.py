"""Fixtures of all tests; `conftest.py` loads them in the processes that run tests."""

# ruff: noqa: I001
from helpers.hub import HUB  # before others import huggingface_hub
import helpers.processes  # noqa: F401  # new processes import this checkout

import pytest
import torch
from accelerate.state import AcceleratorState

from helpers.models import tiny_pipeline
from helpers.scripts import load_script
from progressive_vae.evaluation import image_metrics, sliced_wasserstein

# Quick, where a test does not set them.
sliced_wasserstein.NUM_DIRECTIONS = 32
image_metrics.MAX_EPOCHS = 4
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def script():
    return load_script("train")


@pytest.fixture
def fresh_state():
    """Accelerate's settings of a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def a_hub_that_works():
    yield
    HUB.fail_on = None


@pytest.fixture(scope="module")
def repository():
    """A pipeline in a public repository; beside its weights those in half precision."""
    pipe = tiny_pipeline()
    pipe.push_to_hub("org/public")
    tiny_pipeline().to(torch.float16).push_to_hub("org/public", variant="fp16")
    return "org/public"


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, 5, 7), generator=generator, dtype=torch.uint8)
