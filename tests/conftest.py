"""Fixtures and hooks; plain functions lie in `helpers/`."""

# ruff: noqa: E402, I001
import gc

import pytest

pytest.register_assert_rewrite("helpers")

from helpers.hub import HUB  # before others import huggingface_hub
import helpers.processes  # noqa: F401  # new processes import this checkout

import torch
from accelerate.state import AcceleratorState

from helpers.models import tiny_pipeline
from helpers.scripts import load_script
from progressive_vae.evaluation import image_metrics, sliced_wasserstein

# Quick, where a test does not set them.
sliced_wasserstein.NUM_DIRECTIONS = 32
image_metrics.MAX_EPOCHS = 4
torch.set_num_threads(1)

# Their tests train models, start processes, load from a Hub, or compile. The tests of all other
# files are marked "unit". The longest come first, so that all workers end at about the same time.
INTEGRATION = """
    test_processes test_training test_greedy test_run test_examples test_checkpoints test_docs
    test_conventions test_archive test_sampling_defaults test_op_count test_likelihood
    test_auxiliary_decoder test_streaming test_hub_training test_codec test_remote_code test_app
    test_fixed_point test_hub test_tokenizers test_attack test_global_settings test_level
    test_compress test_archive test_conversion test_conversion_peers test_conversion_damage
    test_modeling_utils
    test_hub_push test_scripts test_compare_decoders test_ablations test_fit test_recipe
    test_augmentation test_app_load test_sliced_wasserstein
""".split()
LONG_UNITS = ["test_walk", "test_decoders", "test_pipeline", "test_inpainting", "test_kinds"]


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if item.path.stem not in INTEGRATION and not is_long:
            item.add_marker(pytest.mark.unit)
    places = {name: place for place, name in enumerate([*INTEGRATION, *LONG_UNITS])}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    gc.freeze()  # the objects of all modules, which each collection would visit: 0.3 s


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
