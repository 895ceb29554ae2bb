"""Loading from the Hub, a local server in these tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoConfig, AutoModel

from helpers.hub import HUB, LFS_POINTER
from helpers.models import assert_same, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("cls", [ProgressiveVAEPipeline, diffusers.DiffusionPipeline])
def test_load_by_the_pipeline_class_and_by_diffusionpipeline(repository, cls, images):
    loaded = cls.from_pretrained(repository)
    assert_same(tiny_pipeline(), loaded)
    # Memory alignment may change the order of summation on some processors.
    bits = tiny_pipeline().bits_per_dim(images)
    assert loaded.bits_per_dim(images) == pytest.approx(bits, rel=1e-5)


def test_load_single_parts(repository):
    pipe = tiny_pipeline()
    level = ProgressiveVAELevel.from_pretrained(repository, subfolder="level_2")
    auto = AutoModel.from_pretrained(repository, subfolder="level_2")
    assert isinstance(auto, ProgressiveVAELevel)
    for part, expected in (
        (level, pipe.level_2),
        (auto, pipe.level_2),
        (ProgressiveVAEPrior.from_pretrained(repository, subfolder="prior"), pipe.prior),
        (AutoModel.from_pretrained(repository, subfolder="prior"), pipe.prior),
    ):
        assert all(torch.equal(v, expected.state_dict()[n]) for n, v in part.state_dict().items())
    config = AutoConfig.from_pretrained(repository, subfolder="level_3")
    assert isinstance(config, ProgressiveVAELevelConfig) and config.num_channels == 3
    config = AutoConfig.from_pretrained(repository, subfolder="prior")
    assert isinstance(config, ProgressiveVAEPriorConfig) and config.num_classes == 2


def test_a_level_in_a_repository_of_its_own():
    level = tiny_level(num_channels=1)
    level.push_to_hub("org/level", private=True)
    assert HUB.repos["org/level"].private
    loaded = AutoModel.from_pretrained("org/level")
    assert torch.equal(loaded.quantizer.codebook, level.quantizer.codebook)


def test_revisions(repository):
    api = HfApi()
    first = api.repo_info(repository).sha
    api.create_branch(repository, branch="v1")
    changed = tiny_pipeline()
    changed.level_3.quantizer.codebook.neg_()
    changed.push_to_hub(repository, commit_message="Another codebook")
    try:
        for revision in (first, "v1"):
            loaded = ProgressiveVAEPipeline.from_pretrained(repository, revision=revision)
            assert_same(tiny_pipeline(), loaded)
        assert_same(changed, ProgressiveVAEPipeline.from_pretrained(repository))
    finally:
        tiny_pipeline().push_to_hub(repository)


def test_half_precision(repository, images, tmp_path):
    load = lambda **kwargs: ProgressiveVAEPipeline.from_pretrained(  # noqa: E731
        repository, cache_dir=tmp_path, **kwargs
    )
    half = load(variant="fp16", dtype=torch.float16)
    assert half.dtype == torch.float16
    downloaded = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert downloaded == {"model.fp16.safetensors"}  # no other weights
    assert_same(tiny_pipeline().to(torch.float16), half)
    for dtype in (torch.bfloat16, torch.float32):
        assert load(dtype=dtype).dtype == dtype
    bits = half.bits_per_dim(images)["total"]
    assert bits == pytest.approx(tiny_pipeline().bits_per_dim(images)["total"], rel=0.02)
    with pytest.raises(ValueError, match="variant=bf16"):
        load(variant="bf16")


@pytest.mark.parametrize("from_hub", [True, False])
@pytest.mark.parametrize(
    "device_map", ["cpu", "balanced", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_load_with_a_dtype_and_a_device_map(repository, tmp_path, images, device_map, from_hub):
    name = repository
    if not from_hub:
        name = tmp_path
        tiny_pipeline().save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        name, dtype=torch.bfloat16, device_map=device_map
    )
    assert type(loaded) is ProgressiveVAEPipeline
    parts = [getattr(loaded, name) for name in loaded.factor_names]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    device = "cuda" if device_map == "cuda" else "cpu"
    assert {part.device.type for part in parts} == {device} and loaded.device.type == device
    assert len(loaded(num_images_per_prompt=2).images) == 2
    bits = tiny_pipeline().bits_per_dim(images)["total"]
    assert loaded.bits_per_dim(images)["total"] == pytest.approx(bits, rel=0.1)


def test_a_dtype_for_each_part(repository):
    dtypes = {"level_3": torch.bfloat16, "default": torch.float32}
    loaded = diffusers.DiffusionPipeline.from_pretrained(repository, dtype=dtypes)
    assert loaded.level_3.dtype == torch.bfloat16 and loaded.level_2.dtype == torch.float32


@pytest.mark.parametrize("is_offline", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_an_unreachable_hub_after_a_first_load(repository, tmp_path, is_offline):
    """In a new process, with and without HF_HUB_OFFLINE; with code in the repository, and not."""
    tiny_pipeline().push_to_hub("org/cached", with_code=True)
    for name, code in ((repository, False), ("org/cached", True)):
        ProgressiveVAEPipeline.from_pretrained(
            name, trust_remote_code=code, cache_dir=tmp_path / "hub"
        )
    code = f"""
from diffusers import DiffusionPipeline
from transformers import AutoModel
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
ProgressiveVAEPipeline.from_pretrained({repository!r})
DiffusionPipeline.from_pretrained({repository!r})
AutoModel.from_pretrained({repository!r}, subfolder="prior")
ProgressiveVAELevel.from_pretrained({repository!r}, subfolder="level_1")
for options in ({{}}, dict(trust_remote_code=True), dict(local_files_only=True)):
    ProgressiveVAEPipeline.from_pretrained("org/cached", **options)
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment |= {"HF_HUB_OFFLINE": is_offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_safetensors_offline_and_from_the_cache(repository, tmp_path):
    load = lambda **kwargs: ProgressiveVAEPipeline.from_pretrained(  # noqa: E731
        repository, cache_dir=tmp_path, **kwargs
    )
    with pytest.raises(OSError):
        load(local_files_only=True)
    load(use_safetensors=True)
    assert_same(tiny_pipeline(), load(local_files_only=True))
    HUB.fail_on = ".*"  # cached files load without the Hub
    assert_same(tiny_pipeline(), load())


def test_errors_of_wrong_arguments_do_not_mention_the_files(tmp_path):
    load, folder = ProgressiveVAEPipeline.from_pretrained, tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    for arguments, error, message in (
        (dict(device_map="auto"), NotImplementedError, "auto not supported"),
        (dict(variant="bf16"), ValueError, "variant=bf16"),
        (dict(quantization_config={}), ValueError, "PipelineQuantizationConfig"),
        (dict(subfolder="level_1"), ValueError, "subfolder=None, got 'level_1'"),
        (dict(prior=3), ValueError, "expected prior to be a model or None, got 3"),
    ):
        with pytest.raises(error, match=message) as raised:
            load(folder, **arguments)
        assert "again" not in str(raised.value)
    with pytest.raises(ValueError, match="with model_index.json, in .*level_1, got config.json"):
        load(folder / "level_1")
    for missing in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(ValueError, match='none" is neither a valid local path'):
            load(missing)


@pytest.mark.parametrize("value", [7, ["progressive_vae"], ["progressive_vae", "Other"], None])
def test_a_damaged_index_names_its_entry(tmp_path, value):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"level_2": value}))
    with pytest.raises(ValueError, match=r"\[library, class\] as level_2 in .*model_index.json"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model_index.json", "level_2/model.safetensors"])
def test_pointers_of_git_lfs(tmp_path, name):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(ValueError, match=f"{name}, got a git-lfs pointer: run `git lfs pull`"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["fp16", None])
def test_sharded_variants_in_one_folder(tmp_path, first):
    second = None if first else "fp16"
    pipes = {first: tiny_pipeline(), second: tiny_pipeline()}
    pipes[second].level_3.quantizer.codebook.neg_()
    for variant, pipe in pipes.items():
        pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB")
    for variant, pipe in pipes.items():
        assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(tmp_path, variant=variant))


def test_private_repositories_need_the_token(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    tiny_pipeline().push_to_hub("org/private", private=True, token=HUB.token)
    assert HUB.repos["org/private"].private
    for cls in (ProgressiveVAEPipeline, diffusers.DiffusionPipeline):
        assert_same(tiny_pipeline(), cls.from_pretrained("org/private", token=HUB.token))
    with pytest.raises((OSError, RepositoryNotFoundError)):
        ProgressiveVAEPipeline.from_pretrained("org/private", cache_dir=tmp_path)


def test_components_can_be_replaced_or_none(repository, images):
    load = ProgressiveVAEPipeline.from_pretrained
    prior = tiny_prior(grid_size=[1, 1], seed=5)
    replaced = load(repository, prior=prior)
    assert replaced.prior is prior and replaced.level_1 is not None
    without = load(repository, prior=None)
    assert [z.shape[1:] for z in without.encode(images)] == [(1, 1), (2, 2), (3, 4)]
    with pytest.raises(ValueError, match="expected a pipeline with a prior"):
        without()
    # The finest level is required; an empty component may be named.
    with pytest.raises(ValueError, match="expected level_2, the finest, with num_channels"):
        load(repository, level_3=None)
    assert_same(tiny_pipeline(), load(repository, level_4=None))


def test_from_pipe_shares_the_parts(repository):
    pipe = ProgressiveVAEPipeline.from_pretrained(repository)
    prior = tiny_prior(grid_size=[1, 1], seed=5)
    other = ProgressiveVAEPipeline.from_pipe(pipe, prior=prior)
    assert other.level_3 is pipe.level_3 and other.prior is prior
    assert other.image_shape == pipe.image_shape and other(output_type="np").images.ndim == 4


def test_a_page_quotes_the_error_without_the_package(repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "progressive_vae", None)  # as if not installed
    monkeypatch.delattr(diffusers, "ProgressiveVAEPipeline")
    monkeypatch.delattr(diffusers.pipelines, "progressive_vae")
    monkeypatch.delitem(pipeline_loading_utils.LOADABLE_CLASSES, "progressive_vae")
    with pytest.raises(ValueError, match="is not a module in 'diffusers/pipelines'") as raised:
        diffusers.DiffusionPipeline.from_pretrained(repository)
    message = str(raised.value).strip().replace(repository, "org/name")
    assert message in re.sub(r"\s+", " ", (ROOT / "examples/docs/hub.md").read_text())
    assert "`pip install .` in a clone" in HUB.files(repository)["README.md"].decode()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_model_offload_moves_each_part_before_use(repository, images, device, monkeypatch):
    pipe = ProgressiveVAEPipeline.from_pretrained(repository)
    expected = pipe.bits_per_dim(images)["total"]
    moved = []
    pre_forward = CpuOffload.pre_forward

    def record(hook, module, *args, **kwargs):
        moved.append(module)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", record)
    pipe.enable_model_cpu_offload(device=device)
    for use, parts in (
        (lambda: pipe.encode(images), pipe.levels),
        (lambda: pipe.bits_per_dim(images), [pipe.prior, *pipe.levels]),
        (lambda: pipe(output_type="np"), [pipe.prior, *pipe.levels]),
    ):
        moved.clear()
        use()
        assert {id(part) for part in parts} <= {id(module) for module in moved}
    assert pipe.bits_per_dim(images)["total"] == pytest.approx(expected, rel=1e-3)
    assert all(level.device.type == "cpu" for level in pipe.levels)
    with pytest.raises(ValueError, match="expected enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
