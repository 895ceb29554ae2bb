"""Hooks; fixtures and plain functions lie in `helpers/`."""

import gc
import os

import pytest

pytest.register_assert_rewrite("helpers")

# Their tests train models, start processes, load from a Hub, or compile. The tests of all other
# files are marked "unit". The longest come first, so that all workers end at about the same time.
INTEGRATION = """
    test_processes test_training test_greedy test_run test_examples test_checkpoints test_docs
    test_conventions test_sampling_defaults test_op_count test_likelihood
    test_auxiliary_decoder test_streaming test_hub_training test_codec test_remote_code test_app
    test_fixed_point test_hub test_tokenizers test_attack test_global_settings test_level
    test_compress test_archive test_conversion test_conversion_peers test_conversion_damage
    test_conversion_goldens
    test_modeling_utils test_hub_push test_scripts test_compare_decoders test_ablations test_fit
    test_recipe test_augmentation test_app_load test_sliced_wasserstein test_captions
    test_text_to_image
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


def pytest_configure(config):
    """Load the fixtures, except in the process that only starts workers: imports take seconds."""
    has_workers = config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if not has_workers:
        config.pluginmanager.import_plugin("helpers.fixtures")
