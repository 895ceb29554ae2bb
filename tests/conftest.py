"""The real classes at tiny size, with weights that make no distribution uniform.

All tests see the Hub that runs in this process, and no other: huggingface_hub reads where the Hub
is when it is imported, so that comes before the other imports.
"""

# ruff: noqa: E402
import os
import tempfile

from loopback_hub import LoopbackHub

HUB = LoopbackHub()
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_TOKEN": HUB.token,
    "HF_HOME": tempfile.mkdtemp(),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "0",
    "NO_PROXY": "127.0.0.1",
}

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)

torch.set_num_threads(1)

# Their tests train models, start processes or load from a Hub. The tests of all other files are
# marked "unit".
INTEGRATION = set(
    """
    test_app test_app_load test_attack test_augmentation test_auxiliary_decoder test_checkpoints
    test_codec test_compare_decoders test_compress test_conversion test_conversion_damage
    test_conversion_peers test_docs test_examples test_fit test_fixed_point test_global_settings
    test_greedy test_hub test_hub_push test_hub_training test_level test_modeling_utils
    test_processes test_recipe test_remote_code test_run test_scripts test_streaming
    test_tokenizers test_training
    """.split()
)

# What git checks out in place of a file that git-lfs holds.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# (ordering, downsample, num_groups) of pixels; codes have the raster ordering too.
PIXEL_ORDERS = [
    ("factorized", 2, None), ("factorized", 4, None), ("lattice", 2, None), ("lattice", 4, 7),
    ("lattice", 2, 7), ("lattice", 4, 10), ("masked", 2, 3), ("masked", 4, None),
]  # fmt: skip
SYMBOL_ORDERS = [*PIXEL_ORDERS, ("raster", 2, None), ("raster", 4, None)]
ORDER_NAMES = "order, downsample, num_groups"
LOGISTICS = {"pixel_distribution": "logistic_mixture"}
GUIDED = {"pixel_distribution": "guided_logistic_mixture", "auxiliary_hidden_size": 8}


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
    """The config's fields of the decoder with an ordering, or with no decoder of its own."""
    if name == "auxiliary":
        return {"decoder_type": "auxiliary"}
    return {"ordering": name, "decoder_type": "causal_lm" if name == "raster" else "conv"}


def level_of(order, downsample, num_groups, **config):
    fields = {"downsample": downsample, "num_groups": num_groups, **decoder_fields(order)}
    return tiny_level(**fields, **config)


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


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def weights_of(pipe):
    return {
        f"{n}.{k}": v for n in pipe.factor_names for k, v in getattr(pipe, n).state_dict().items()
    }


def assert_same(pipe, other):
    theirs = weights_of(other)
    for name, value in weights_of(pipe).items():
        assert torch.equal(value, theirs[name]), name
    assert type(other) is ProgressiveVAEPipeline and other.image_shape == pipe.image_shape


def load_script(name: str, folder: str = "examples"):
    """A script as a module; each `main` starts as a new process would."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where the script finds modules beside it
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as Python does when it runs a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    main = module.main

    def fresh_main(arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        main(arguments)

    module.main = fresh_main
    return module


def all_grids(num_values: int, height: int, width: int) -> torch.Tensor:
    """Every grid, int64 (V^(H·W), H, W)."""
    positions = [torch.arange(num_values)] * (height * width)
    return torch.cartesian_prod(*positions).reshape(-1, height, width)


def total_variation(log_prob: torch.Tensor, grids: torch.Tensor, drawn: torch.Tensor) -> float:
    """Between exp(log_prob) over all grids and the frequencies of drawn ones."""
    powers = (int(grids.max()) + 1) ** torch.arange(grids[0].numel())
    frequency_table = torch.bincount((drawn.flatten(1) * powers).sum(1), minlength=len(grids))
    order = (grids.flatten(1) * powers).sum(1)
    return (frequency_table[order] / len(drawn) - log_prob.exp()).abs().sum().item() / 2


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if item.path.stem not in INTEGRATION and not is_long:
            item.add_marker(pytest.mark.unit)


@pytest.fixture(scope="module")
def script():
    return load_script("train")


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
