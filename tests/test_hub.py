"""Every way in and out of the Hub, over a Hub of our own on the loopback."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.hooks import CpuOffload
from conftest import HUB, load_script, tiny_level, tiny_pipeline, tiny_prior
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from loopback_hub import Repo
from test_card import METRICS
from test_training import SMALL
from transformers import AutoConfig, AutoModel

from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPrior,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.hub import push_folder, weights_digest, write_card

ROOT = Path(__file__).parents[1]
WEIGHTS = [f"{part}/model.safetensors" for part in ("level_1", "level_2", "level_3", "prior")]
CONFIGS = [f"{part}/config.json" for part in ("level_1", "level_2", "level_3", "prior")]


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


def weights_of(pipe):
    return {
        f"{n}.{k}": v for n in pipe.factor_names for k, v in getattr(pipe, n).state_dict().items()
    }


def assert_same(pipe, other):
    theirs = weights_of(other)
    for name, value in weights_of(pipe).items():
        assert torch.equal(value, theirs[name]), name
    assert type(other) is ProgressiveVAEPipeline and other.image_shape == pipe.image_shape


# ---- in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ProgressiveVAEPipeline, diffusers.DiffusionPipeline])
def test_a_pipeline_by_its_own_name_and_by_the_generic_one(repository, cls, images):
    loaded = cls.from_pretrained(repository)
    assert_same(tiny_pipeline(), loaded)
    # Where weights lie in memory may change the order of a sum on some processors.
    bits = tiny_pipeline().bits_per_dim(images)
    assert loaded.bits_per_dim(images) == pytest.approx(bits, rel=1e-5)


def test_parts_alone(repository):
    pipe = tiny_pipeline()
    level = ProgressiveVAELevel.from_pretrained(repository, subfolder="level_2")
    auto = AutoModel.from_pretrained(repository, subfolder="level_2")
    assert isinstance(auto, ProgressiveVAELevel)
    for part, ours in (
        (level, pipe.level_2),
        (auto, pipe.level_2),
        (ProgressiveVAEPrior.from_pretrained(repository, subfolder="prior"), pipe.prior),
        (AutoModel.from_pretrained(repository, subfolder="prior"), pipe.prior),
    ):
        assert all(torch.equal(v, ours.state_dict()[n]) for n, v in part.state_dict().items())
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
    assert downloaded == {"model.fp16.safetensors"}  # no weights that were not asked for
    assert_same(tiny_pipeline().to(torch.float16), half)
    for dtype in (torch.bfloat16, torch.float32):
        assert load(dtype=dtype).dtype == dtype
    bits = half.bits_per_dim(images)["total"]
    assert bits == pytest.approx(tiny_pipeline().bits_per_dim(images)["total"], rel=0.02)
    with pytest.raises(ValueError, match="variant=bf16"):
        load(variant="bf16")


def test_safetensors_offline_and_from_the_cache(repository, tmp_path):
    load = lambda **kwargs: ProgressiveVAEPipeline.from_pretrained(  # noqa: E731
        repository, cache_dir=tmp_path, **kwargs
    )
    with pytest.raises(OSError):
        load(local_files_only=True)
    load(use_safetensors=True)
    assert_same(tiny_pipeline(), load(local_files_only=True))
    HUB.fail_on = ".*"  # what has been loaded once loads without a Hub
    assert_same(tiny_pipeline(), load())


def test_private_repositories_need_the_token(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    tiny_pipeline().push_to_hub("org/private", private=True, token=HUB.token)
    assert HUB.repos["org/private"].private
    for cls in (ProgressiveVAEPipeline, diffusers.DiffusionPipeline):
        assert_same(tiny_pipeline(), cls.from_pretrained("org/private", token=HUB.token))
    with pytest.raises((OSError, RepositoryNotFoundError)):
        ProgressiveVAEPipeline.from_pretrained("org/private", cache_dir=tmp_path)


def test_components_can_be_replaced_or_left_out(repository, images):
    load = ProgressiveVAEPipeline.from_pretrained
    prior = tiny_prior(grid_size=[1, 1], seed=5)
    replaced = load(repository, prior=prior)
    assert replaced.prior is prior and replaced.level_1 is not None
    without = load(repository, prior=None)
    assert [z.shape[1:] for z in without.encode(images)] == [(1, 1), (2, 2), (3, 4)]
    with pytest.raises(ValueError, match="expected a pipeline with a prior"):
        without()
    # Nothing can see pixels without the finest level; a slot that is empty may be named.
    with pytest.raises(ValueError, match="expected level_2, the finest, with num_channels"):
        load(repository, level_3=None)
    assert_same(tiny_pipeline(), load(repository, level_4=None))


def test_from_pipe_shares_the_parts(repository):
    pipe = ProgressiveVAEPipeline.from_pretrained(repository)
    prior = tiny_prior(grid_size=[1, 1], seed=5)
    other = ProgressiveVAEPipeline.from_pipe(pipe, prior=prior)
    assert other.level_3 is pipe.level_3 and other.prior is prior
    assert other.image_shape == pipe.image_shape and other(output_type="np").images.ndim == 4


def test_without_the_package_diffusers_says_so_and_the_readme_quotes_it(repository):
    code = f"""
import sys
sys.modules["progressive_vae"] = None  # as if it had not been installed
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({repository!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout.strip().replace(repository, "org/name")
    assert re.search("is not a module in 'diffusers/pipelines'", said), done.stderr
    assert said in re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    assert "pip install progressive-vae" in HUB.files(repository)["README.md"].decode()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_model_offload_brings_each_part_before_it_is_used(repository, images, device, monkeypatch):
    pipe = ProgressiveVAEPipeline.from_pretrained(repository)
    expected = pipe.bits_per_dim(images)["total"]
    brought = []
    bring = CpuOffload.pre_forward

    def record(hook, module, *args, **kwargs):
        brought.append(module)
        return bring(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", record)
    pipe.enable_model_cpu_offload(device=device)
    for use, parts in (
        (lambda: pipe.encode(images), pipe.levels),
        (lambda: pipe.bits_per_dim(images), [pipe.prior, *pipe.levels]),
        (lambda: pipe(output_type="np"), [pipe.prior, *pipe.levels]),
    ):
        brought.clear()
        use()
        assert {id(part) for part in parts} <= {id(module) for module in brought}
    assert pipe.bits_per_dim(images)["total"] == pytest.approx(expected, rel=1e-3)
    assert all(level.device.type == "cpu" for level in pipe.levels)
    with pytest.raises(ValueError, match="expected enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


# ---- out ----------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_the_pipeline_alone():
    address = tiny_pipeline().push_to_hub("org/pushed", commit_message="A first one")
    commits = HUB.repos["org/pushed"].commits
    assert commits[-1].message == "A first one" and address.oid in address
    assert sorted(HUB.files("org/pushed")) == sorted(
        ["README.md", "model_index.json", *WEIGHTS, *CONFIGS]
    )
    assert len(commits) == 2  # that of the creation, and this one
    tiny_pipeline().push_to_hub("org/pushed")
    assert len(commits) == 2  # nothing has changed


def test_a_push_takes_away_what_the_pipeline_no_longer_has(tmp_path):
    """Old files would hide new ones, or stay as weights and figures of another pipeline."""
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "samples.png").write_bytes(b"a picture")
    metrics = METRICS | {"weights": weights_digest(tmp_path)}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_card(tmp_path)
    push_folder(tmp_path, "org/changing")
    assert {"metrics.json", "samples.png"} <= set(HUB.files("org/changing"))
    half = tiny_pipeline().to(torch.float16)
    half.push_to_hub("org/changing", variant="fp16")
    files = HUB.files("org/changing")
    assert {"metrics.json", "samples.png", "level_1/model.fp16.safetensors"} <= set(files)
    assert "| total | 2.1000 |" in files["README.md"].decode()

    # Into shards, with other weights: their figures are not known.
    pipe, commits = tiny_pipeline(), len(HUB.repos["org/changing"].commits)
    pipe.level_3.quantizer.codebook.neg_()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB", push_to_hub=True, repo_id="org/changing")
    assert len(HUB.repos["org/changing"].commits) == commits + 1
    assert (tmp_path / "metrics.json").is_file()  # but nothing of the folder's own is deleted
    files = HUB.files("org/changing")
    assert "level_1/model.safetensors.index.json" in files and "metrics.json" not in files
    assert "level_1/model.safetensors" not in files and "samples.png" not in files
    assert "level_1/model.fp16.safetensors" in files
    assert "| total |" not in files["README.md"].decode()
    for place in ("org/changing", tmp_path):
        assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(place))

    # And with fewer levels.
    finest = tiny_level(num_channels=3, codebook_size=5, seed=3)
    ProgressiveVAEPipeline(None, finest, image_size=[5, 7]).push_to_hub("org/changing")
    parts = {name.split("/")[0] for name in HUB.files("org/changing") if "/" in name}
    assert parts == {"level_1"}


def test_saving_pushes_too(tmp_path):
    pipe, folder = tiny_pipeline(), tmp_path / "mine"
    folder.mkdir()
    for beside in ("checkpoint-1", "cache", "level_9"):
        (folder / beside).mkdir()
        (folder / beside / "model.safetensors").write_bytes(b"not of the pipeline")
    (folder / "optimizer.bin").write_bytes(b"neither")
    pipe.save_pretrained(folder, push_to_hub=True, repo_id="org/saved", private=True)
    assert HUB.repos["org/saved"].private
    assert sorted(HUB.files("org/saved")) == sorted(
        ["README.md", "model_index.json", *WEIGHTS, *CONFIGS]
    )
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained("org/saved"))
    # The card names the repository there, and the folder here.
    assert 'from_pretrained("org/saved")' in HUB.files("org/saved")["README.md"].decode()
    assert f'from_pretrained("{folder}")' in (folder / "README.md").read_text()
    pipe.save_pretrained(folder, push_to_hub=True)
    assert "tester/mine" in HUB.repos and not HUB.repos["tester/mine"].private
    shutil.rmtree(folder / "level_2")
    with pytest.raises(ValueError, match="expected config.json and weights .*level_2, which"):
        push_folder(folder, "org/never")
    assert "org/never" not in HUB.repos
    with pytest.raises(ValueError, match="safe_serialization=True, got False"):
        pipe.save_pretrained(folder, safe_serialization=False)


def test_a_card_written_by_hand_is_kept(tmp_path):
    HfApi().create_repo("org/carded")
    HfApi().upload_file(
        repo_id="org/carded", path_in_repo="README.md", path_or_fileobj=b"# By hand"
    )
    tiny_pipeline().push_to_hub("org/carded")
    assert HUB.files("org/carded")["README.md"] == b"# By hand"
    tiny_pipeline().save_pretrained(tmp_path, push_to_hub=True, repo_id="org/carded")
    assert HUB.files("org/carded")["README.md"] == b"# By hand"
    (tmp_path / "README.md").write_text("# By hand here")
    tiny_pipeline().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# By hand here"
    assert_same(tiny_pipeline(), ProgressiveVAEPipeline.from_pretrained("org/carded"))


def test_a_pull_request_leaves_main_alone(repository):
    before, pipe = HUB.files(repository), tiny_pipeline()
    pipe.level_3.quantizer.codebook.neg_()
    info = pipe.push_to_hub(repository, create_pr=True)
    assert info.pr_revision and HUB.files(repository) == before
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(repository, revision=info.pr_revision))
    # Also to those in whose repository one may not write.
    others = HUB.repos["others/theirs"] = Repo(private=False)
    others.refs["main"] = others.add("initial commit", {}).oid
    with pytest.raises(HfHubHTTPError):
        pipe.push_to_hub("others/theirs")
    info = pipe.push_to_hub("others/theirs", create_pr=True)
    assert info.pr_num == 1 and not HUB.files("others/theirs")


def test_nothing_private_becomes_public_and_nothing_public_private():
    HfApi().create_repo("org/open", private=False)
    HfApi().create_repo("org/closed", private=True)
    for name, private, words in (("open", True, "private"), ("closed", False, "public")):
        with pytest.raises(ValueError, match=f"expected org/{name} to be {words}, got a "):
            tiny_pipeline().push_to_hub(f"org/{name}", private=private)
        assert "model_index.json" not in HUB.files(f"org/{name}")
    tiny_pipeline().push_to_hub("org/closed")  # without a word on it, it stays as it is
    assert HUB.repos["org/closed"].private


@pytest.mark.parametrize("where", ["/preupload/", "/info/lfs/", "PUT /lfs/", "POST .*/commit/"])
def test_an_interrupted_push_can_be_repeated(where):
    name, pipe = f"org/broken{len(where)}", tiny_pipeline()
    pipe.push_to_hub(name)
    before = HUB.files(name)
    with torch.no_grad():  # bytes that this Hub has not seen
        pipe.level_3.quantizer.codebook += len(where)
    HUB.fail_on = where
    with pytest.raises((HfHubHTTPError, OSError, RuntimeError)):
        pipe.push_to_hub(name)
    assert HUB.files(name) == before
    HUB.fail_on = None
    HUB.log.clear()
    pipe.push_to_hub(name)
    assert any(re.search(where, line) for line in HUB.log)  # it had come that far
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(name))


def test_only_a_pipeline_can_be_pushed(tmp_path):
    with pytest.raises(ValueError, match="expected a saved pipeline, with model_index.json"):
        push_folder(tmp_path, "org/nothing")
    assert "org/nothing" not in HUB.repos


def test_usage_in_the_card_runs_as_it_stands(repository, tmp_path, monkeypatch):
    content = ModelCard.load(repository).content
    (usage,) = re.findall(r"```python\n(.*?)```", content, re.S)
    monkeypatch.chdir(tmp_path)
    exec(usage, {})
    assert (tmp_path / "sample.png").is_file()


# ---- the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    return load_script("train")


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """A run that pushes, into a private repository."""
    output_dir = tmp_path_factory.mktemp("runs") / "digits"
    flags = f"--output_dir {output_dir} --push_to_hub --hub_model_id org/digits --hub_private_repo"
    flags += " --level_2.refit.fit.max_train_steps 2 --max_train_samples 300 --max_eval_samples 40"
    script.main([*SMALL, *flags.split()])
    return output_dir


def test_training_pushes_what_is_whole(trained):
    repository = HUB.repos["org/digits"]
    assert repository.private
    pushed = [commit for commit in repository.commits if "level_1/config.json" in commit.files]
    # After the prior, after the refit of level 2, and with the figures.
    assert len(pushed) == 3 and [*("metrics.json" in c.files for c in pushed)] == [
        False,
        False,
        True,
    ]
    assert sorted(HUB.files("org/digits")) == sorted(
        ["README.md", "metrics.json", "model_index.json", "reconstructions.png", "samples.png"]
        + [f"{p}/{f}" for p in ("level_1", "level_2", "prior")
           for f in ("config.json", "model.safetensors")]
    )  # fmt: skip
    card = HUB.files("org/digits")["README.md"].decode()
    assert 'from_pretrained("org/digits")' in card and "](samples.png)" in card
    assert ModelCard(card).data.eval_results[0].metric_type == "bits_per_dim"
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(trained),
        diffusers.DiffusionPipeline.from_pretrained("org/digits"),
    )


def test_training_goes_on_without_a_network(script, tmp_path, trained):
    output_dir = tmp_path / "digits"
    shutil.copytree(trained, output_dir)
    flags = f"--output_dir {output_dir} --push_to_hub --hub_model_id org/later"
    flags += " --max_train_samples 300 --max_eval_samples 40 --phase"
    HUB.fail_on = ".*"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script.main([*SMALL, *flags.split(), "prior"])
        script.main([*SMALL, *flags.split(), "evaluate"])
    said = "\n".join(str(warning.message) for warning in caught)
    assert "training goes on" in said and f"the files are in {output_dir}" in said
    HUB.fail_on = None
    later = re.findall(r"python -c (.*)", said)[-1]
    exec(shlex.split(later)[0])
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(output_dir),
        ProgressiveVAEPipeline.from_pretrained("org/later"),
    )
    assert "metrics.json" in HUB.files("org/later")


def test_a_wrong_token_or_visibility_is_said_before_training(script, tmp_path, monkeypatch):
    flags = [*SMALL, "--output_dir", str(tmp_path), "--push_to_hub", "--hub_model_id"]
    HfApi().create_repo("org/seen-by-all", private=False, exist_ok=True)
    with pytest.raises(ValueError, match="expected org/seen-by-all to be private"):
        script.main([*flags, "org/seen-by-all", "--hub_private_repo"])
    others = HUB.repos["others/read-only"] = Repo(private=False)
    others.refs["main"] = others.add("initial commit", {}).oid
    with pytest.raises(ValueError, match="(?s)token that may write to others/read-only"):
        script.main([*flags, "others/read-only"])
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="(?s)expected a token that may write to.*hf auth login"):
        script.main([*flags, "org/mine"])
    assert not (tmp_path / "level_2").exists()


def test_the_hf_command_carries_the_folder(trained, tmp_path):
    hf = [str(Path(sys.executable).with_name("hf"))]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = lambda *words: subprocess.run(  # noqa: E731
        [*hf, *words], check=True, env=environment, capture_output=True, text=True
    )
    run("upload", "org/by-hand", str(trained), ".", "--private")
    names = HUB.files("org/by-hand")
    assert "model_index.json" in names and "samples.png" in names
    assert not [name for name in names if name.startswith(("cache", "logs", "validation"))]
    run("download", "org/by-hand", "--local-dir", str(tmp_path / "again"))
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(trained),
        ProgressiveVAEPipeline.from_pretrained(tmp_path / "again"),
    )
    folder = snapshot_download("org/by-hand")
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(trained),
        ProgressiveVAEPipeline.from_pretrained(folder),
    )
