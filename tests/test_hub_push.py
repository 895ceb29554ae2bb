"""Every way into the Hub, over a Hub of our own on the loopback."""

import json
import re
import shutil

import PIL.Image
import pytest
import torch
from conftest import HUB, assert_same, tiny_level, tiny_pipeline
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import Repo
from test_model_card import METRICS

from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline
from progressive_vae.hub.repository import push_folder, weights_digest, write_card

WEIGHTS = [f"{part}/model.safetensors" for part in ("level_1", "level_2", "level_3", "prior")]
CONFIGS = [f"{part}/config.json" for part in ("level_1", "level_2", "level_3", "prior")]


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


def test_parts_that_an_earlier_pipeline_left_in_the_folder(tmp_path):
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


def test_figures_of_a_pipeline_with_a_prior_are_not_of_one_without(tmp_path):
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


def test_a_push_into_a_subfolder_is_refused(tmp_path):
    for push in (
        lambda: tiny_pipeline().push_to_hub("org/inside", subfolder="x"),
        lambda: tiny_pipeline().save_pretrained(
            tmp_path / "p", push_to_hub=True, repo_id="org/inside", subfolder="x"
        ),
    ):
        with pytest.raises(ValueError, match="subfolder=None, got 'x': diffusers loads no"):
            push()
    assert "org/inside" not in HUB.repos and not (tmp_path / "p").exists()


def test_a_level_that_is_saved_is_pushed_to_its_branch(tmp_path):
    level = tiny_level(num_channels=1)
    level.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/a-level", revision="v2")
    assert "model.safetensors" not in HUB.files("org/a-level")
    ProgressiveVAELevel.from_pretrained("org/a-level", revision="v2")
    with pytest.raises(ValueError, match="expected variant=None with push_to_hub=True, got 'fp16'"):
        level.save_pretrained(tmp_path / "x", push_to_hub=True, variant="fp16")
    assert not (tmp_path / "x").exists()


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
    monkeypatch.chdir(tmp_path)
    run_usage(repository)
    assert (tmp_path / "sample.png").is_file()


def run_usage(repository):
    content = ModelCard.load(repository).content
    (usage,) = re.findall(r"```python\n(.*?)```", content, re.S)
    exec(usage, {})
    return usage


def test_usage_without_a_prior_starts_from_a_picture(tmp_path, monkeypatch):
    levels = {name: getattr(tiny_pipeline(), name) for name in ("level_1", "level_2", "level_3")}
    ProgressiveVAEPipeline(prior=None, **levels, image_size=[5, 7]).push_to_hub("org/no-prior")
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (7, 5), "red").save("image.png")
    assert "PIL.Image.open" in run_usage("org/no-prior") and (tmp_path / "sample.png").is_file()


def test_usage_of_one_variant_alone_names_it(tmp_path, monkeypatch):
    tiny_pipeline().to(torch.float16).push_to_hub("org/half", variant="fp16")
    monkeypatch.chdir(tmp_path)
    assert 'variant="fp16", dtype=torch.float16' in run_usage("org/half")
    tiny_pipeline().push_to_hub("org/half")
    assert "variant" not in run_usage("org/half")
