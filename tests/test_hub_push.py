"""Pushing to the Hub, a local server in these tests."""

import json
import re
import shutil

import PIL.Image
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from helpers.hub import HUB
from helpers.loopback_hub import Repo
from helpers.model_cards import METRICS
from helpers.models import assert_same, tiny_level, tiny_pipeline
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.hub.repository import push_folder, weights_digest, write_card

WEIGHTS = [f"{part}/model.safetensors" for part in ("level_1", "level_2", "level_3", "prior")]
CONFIGS = [f"{part}/config.json" for part in ("level_1", "level_2", "level_3", "prior")]


def test_a_push_is_one_commit_with_only_the_pipeline():
    address = tiny_pipeline().push_to_hub("org/pushed", commit_message="A first one")
    commits = HUB.repos["org/pushed"].commits
    assert commits[-1].message == "A first one" and address.oid in address
    assert sorted(HUB.files("org/pushed")) == sorted(
        ["README.md", "model_index.json", *WEIGHTS, *CONFIGS]
    )
    assert len(commits) == 2  # the creation of the repository, and the push
    tiny_pipeline().push_to_hub("org/pushed")
    assert len(commits) == 2  # nothing has changed


def test_a_push_deletes_outdated_files(tmp_path):
    """Outdated files would hide new ones, or be weights and metrics of another pipeline."""
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / "samples.png").write_bytes(b"an image")
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

    # In shards, with other weights, for which there are no metrics.
    pipe, commits = tiny_pipeline(), len(HUB.repos["org/changing"].commits)
    pipe.level_3.quantizer.codebook.neg_()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB", push_to_hub=True, repo_id="org/changing")
    assert len(HUB.repos["org/changing"].commits) == commits + 1
    assert (tmp_path / "metrics.json").is_file()  # a push does not delete local files
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


def test_parts_of_an_earlier_pipeline_are_ignored(tmp_path):
    """They are not loaded, not pushed, and not described by the card."""
    tiny_pipeline().save_pretrained(tmp_path)
    metrics = METRICS | {"weights": weights_digest(tmp_path)}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    finest = tiny_level(num_channels=3, codebook_size=5, seed=3)
    pipe = ProgressiveVAEPipeline(None, finest, image_size=[5, 7])
    pipe.save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "level_1" / "model.safetensors").unlink()
    write_card(tmp_path)
    assert (tmp_path / "level_3" / "model.safetensors").is_file()
    loaded = ProgressiveVAEPipeline.from_pretrained(tmp_path, variant="fp16")
    assert loaded.num_levels == 1 and loaded.prior is None
    card = (tmp_path / "README.md").read_text()
    assert "PIL.Image.open" in card and 'variant="fp16"' in card and "| total |" not in card
    push_folder(tmp_path, "org/left", variant="fp16")
    parts = {name.split("/")[0] for name in HUB.files("org/left") if "/" in name}
    assert parts == {"level_1"}


def test_metrics_with_a_prior_are_not_those_without(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    metrics = METRICS | {"weights": weights_digest(tmp_path)}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_card(tmp_path)
    assert "| total |" in (tmp_path / "README.md").read_text()
    ProgressiveVAEPipeline.from_levels(None, pipe.levels, [5, 7]).save_pretrained(tmp_path)
    assert "| total |" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_push_to_a_branch(tmp_path, is_saved):
    name, first, second = f"org/branches-{is_saved}", tiny_pipeline(), tiny_pipeline()
    first.push_to_hub(name)
    second.level_3.quantizer.codebook.neg_()
    before = HUB.files(name)
    for pipe in (first, second):  # a new branch, and the same again
        if is_saved:
            pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id=name, revision="v2")
        else:
            pipe.push_to_hub(name, revision="v2")
    assert HUB.files(name) == before
    assert_same(first, ProgressiveVAEPipeline.from_pretrained(name))
    assert_same(second, ProgressiveVAEPipeline.from_pretrained(name, revision="v2"))


def test_a_push_into_a_subfolder_is_an_error(tmp_path):
    for push in (
        lambda: tiny_pipeline().push_to_hub("org/inside", subfolder="x"),
        lambda: tiny_pipeline().save_pretrained(
            tmp_path / "p", push_to_hub=True, repo_id="org/inside", subfolder="x"
        ),
    ):
        with pytest.raises(ValueError, match="subfolder=None, got 'x': diffusers loads no"):
            push()
    assert "org/inside" not in HUB.repos and not (tmp_path / "p").exists()


def test_a_saved_level_is_pushed_to_a_branch(tmp_path):
    level = tiny_level(num_channels=1)
    level.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/a-level", revision="v2")
    assert "model.safetensors" not in HUB.files("org/a-level")
    ProgressiveVAELevel.from_pretrained("org/a-level", revision="v2")
    with pytest.raises(ValueError, match="expected variant=None with push_to_hub=True, got 'fp16'"):
        level.save_pretrained(tmp_path / "x", push_to_hub=True, variant="fp16")
    assert not (tmp_path / "x").exists()


def test_save_pretrained_with_push_to_hub(tmp_path):
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
    # The pushed card names the repository, the local one the folder.
    assert 'from_pretrained("org/saved")' in HUB.files("org/saved")["README.md"].decode()
    assert f'from_pretrained("{folder}")' in (folder / "README.md").read_text()
    pipe.save_pretrained(folder, push_to_hub=True)
    assert "tester/mine" in HUB.repos and not HUB.repos["tester/mine"].private
    shutil.rmtree(folder / "level_2")
    with pytest.raises(ValueError, match="expected config.json and weights .*level_2, which"):
        push_folder(folder, "org/damaged")
    assert "org/damaged" not in HUB.repos
    with pytest.raises(ValueError, match="safe_serialization=True, got False"):
        pipe.save_pretrained(folder, safe_serialization=False)


def test_a_card_written_by_hand_is_preserved(tmp_path):
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


def test_a_pull_request_does_not_change_main(repository):
    before, pipe = HUB.files(repository), tiny_pipeline()
    pipe.level_3.quantizer.codebook.neg_()
    info = pipe.push_to_hub(repository, create_pr=True)
    assert info.pr_revision and HUB.files(repository) == before
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(repository, revision=info.pr_revision))
    # Also in a repository without write permission.
    others = HUB.repos["others/repository"] = Repo(private=False)
    others.refs["main"] = others.add("initial commit", {}).oid
    with pytest.raises(HfHubHTTPError):
        pipe.push_to_hub("others/repository")
    info = pipe.push_to_hub("others/repository", create_pr=True)
    assert info.pr_num == 1 and not HUB.files("others/repository")


def test_a_push_does_not_change_visibility():
    HfApi().create_repo("org/open", private=False)
    HfApi().create_repo("org/closed", private=True)
    for name, private, visibility in (("open", True, "private"), ("closed", False, "public")):
        with pytest.raises(ValueError, match=f"expected org/{name} to be {visibility}, got a "):
            tiny_pipeline().push_to_hub(f"org/{name}", private=private)
        assert "model_index.json" not in HUB.files(f"org/{name}")
    tiny_pipeline().push_to_hub("org/closed")  # private=None does not change it
    assert HUB.repos["org/closed"].private


@pytest.mark.parametrize("where", ["/preupload/", "/info/lfs/", "PUT /lfs/", "POST .*/commit/"])
def test_an_interrupted_push_can_be_repeated(where):
    name, pipe = f"org/broken{len(where)}", tiny_pipeline()
    pipe.push_to_hub(name)
    before = HUB.files(name)
    with torch.no_grad():  # new bytes, which have to be uploaded
        pipe.level_3.quantizer.codebook += len(where)
    HUB.fail_on = where
    with pytest.raises((HfHubHTTPError, OSError, RuntimeError)):
        pipe.push_to_hub(name)
    assert HUB.files(name) == before
    HUB.fail_on = None
    HUB.log.clear()
    pipe.push_to_hub(name)
    assert any(re.search(where, line) for line in HUB.log)  # the push came to this step
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(name))


def test_only_a_pipeline_can_be_pushed(tmp_path):
    with pytest.raises(ValueError, match="expected a saved pipeline, with model_index.json"):
        push_folder(tmp_path, "org/nothing")
    assert "org/nothing" not in HUB.repos


def test_usage_in_the_card_runs(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_usage(repository)
    assert (tmp_path / "sample.png").is_file()


def run_usage(repository):
    content = ModelCard.load(repository).content
    (usage,) = re.findall(r"```python\n(.*?)```", content, re.S)
    exec(usage, {})
    return usage


def test_usage_without_a_prior_starts_from_an_image(tmp_path, monkeypatch):
    levels = {name: getattr(tiny_pipeline(), name) for name in ("level_1", "level_2", "level_3")}
    ProgressiveVAEPipeline(prior=None, **levels, image_size=[5, 7]).push_to_hub("org/no-prior")
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (7, 5), "red").save("image.png")
    assert "PIL.Image.open" in run_usage("org/no-prior") and (tmp_path / "sample.png").is_file()


def test_usage_of_a_single_variant_names_it(tmp_path, monkeypatch):
    tiny_pipeline().to(torch.float16).push_to_hub("org/half", variant="fp16")
    monkeypatch.chdir(tmp_path)
    assert 'variant="fp16", dtype=torch.float16' in run_usage("org/half")
    tiny_pipeline().push_to_hub("org/half")
    assert "variant" not in run_usage("org/half")
