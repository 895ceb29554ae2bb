"""A run that is killed and started again ends with the weights of one that was not."""

import errno
import json
import signal
import time

import pytest
import torch
from conftest import load_script
from interruptions import FLAGS, disturb, finish, start, weights

from progressive_vae import ProgressiveVAELevel
from progressive_vae.training.checkpoints import Checkpoints

RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    load_script("train").main([*FLAGS, "--output_dir", str(output_dir)])
    return output_dir


def test_killed_and_started_again_the_weights_are_the_same(undisturbed, tmp_path):
    output_dir = tmp_path / "run"
    assert len(weights(undisturbed)) == 3
    assert disturb(output_dir, kills=3) > 0
    assert weights(output_dir) == weights(undisturbed)
    assert not list(output_dir.glob("checkpoint-*"))  # what is done needs none


def test_told_to_stop_it_saves_and_goes_on_later(undisturbed, tmp_path):
    output_dir = tmp_path / "run"
    process = start(output_dir, "--checkpointing_steps", "null")
    while not (output_dir / "validation" / "level_2").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    (saved,) = output_dir.glob("checkpoint-*")
    assert saved.name.startswith("checkpoint-level_2-")
    finish(start(output_dir, *RESUME, "--checkpointing_steps", "null"), output_dir)
    assert weights(output_dir) == weights(undisturbed)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that has just written two checkpoints of level_2, and where it lies."""
    script = load_script("train")
    stop_at(monkeypatch, "checkpoint-level_2-00000010")
    with pytest.raises(SystemExit):
        script.main([*FLAGS, "--output_dir", str(tmp_path)])
    monkeypatch.undo()
    return tmp_path


def stop_at(monkeypatch, name):
    save = Checkpoints.save

    def save_and_stop(self, identity, progress, states, accelerator):
        save(self, identity, progress, states, accelerator)
        if (self.folder / name).exists():
            raise SystemExit("stopped")

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)


def test_damaged_and_foreign_checkpoints_are_refused(stopped):
    script, flags = load_script("train"), [*FLAGS, "--output_dir", str(stopped), *RESUME]
    with pytest.raises(ValueError, match="with learning_rate=0.002, got learning_rate=0.001: "):
        script.main([*flags, "--levels.fit.learning_rate", "0.001"])
    newest = stopped / "checkpoint-level_2-00000010"
    for name in ("fit.pt", "identity.json", "model.safetensors", "optimizer.bin"):
        path = newest / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ValueError, match="expected (a whole checkpoint, got|JSON in) .*00000010.*delete"
        ):
            script.main(flags)
        flipped = bytearray(whole)
        flipped[-len(whole) // 3] ^= 1  # which may well be read
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"00000010|--overwrite_output_dir"):
            script.main(flags)
        path.write_bytes(whole)
    with pytest.raises(ValueError, match="resume_from_checkpoint to be 'latest' or a checkpoint"):
        script.main([*flags, "--resume_from_checkpoint", str(stopped / "nothing")])


def test_a_checkpoint_by_its_path(stopped, undisturbed):
    script = load_script("train")
    older = stopped / "checkpoint-level_2-00000005"
    flags = [*FLAGS, "--output_dir", str(stopped), "--resume_from_checkpoint", str(older)]
    script.main(flags)
    assert weights(stopped) == weights(undisturbed)


def test_only_so_many_checkpoints_are_kept(tmp_path, monkeypatch):
    script = load_script("train")
    stop_at(monkeypatch, "checkpoint-level_2-00000020")
    with pytest.raises(SystemExit):
        script.main([*FLAGS, "--output_dir", str(tmp_path), "--checkpoints_total_limit", "3"])
    steps = sorted(int(path.name[-8:]) for path in tmp_path.glob("checkpoint-level_2-*"))
    assert steps == [10, 15, 20]
    identity = json.loads((tmp_path / "checkpoint-level_2-00000020" / "identity.json").read_text())
    assert identity["phase"] == "level_2" and identity["num_processes"] == 1


def test_starting_anew_takes_no_old_checkpoint(stopped, undisturbed):
    script, flags = load_script("train"), [*FLAGS, "--output_dir", str(stopped)]
    with pytest.raises(ValueError, match="got .* with checkpoint-level_2-.*--overwrite_output_dir"):
        script.main(flags)
    script.main([*flags, "--overwrite_output_dir"])
    assert weights(stopped) == weights(undisturbed)
    assert not list(stopped.glob("checkpoint-*"))


@pytest.mark.parametrize("when", ["checkpoint", "level"])
def test_a_full_disk_loses_nothing(stopped, undisturbed, when, monkeypatch):
    script = load_script("train")
    flags = [*FLAGS, "--output_dir", str(stopped), *RESUME]

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    where = torch if when == "checkpoint" else ProgressiveVAELevel
    monkeypatch.setattr(where, "save" if when == "checkpoint" else "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        script.main(flags)
    monkeypatch.undo()
    script.main(flags)
    assert weights(stopped) == weights(undisturbed)
