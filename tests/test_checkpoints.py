"""A run that is killed and resumed ends with the weights of an undisturbed one."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from helpers.interruptions import FLAGS, disturb, finish, start, weights
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAELevel
from progressive_vae.training.checkpoints import Checkpoints

RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    load_script("train").main([*FLAGS, "--output_dir", str(output_dir)])
    return output_dir


def test_killed_and_resumed_runs_have_the_same_weights(undisturbed, tmp_path):
    assert len(weights(undisturbed)) == 3
    for seed in range(9):
        output_dir = tmp_path / f"run-{seed}"
        kills = disturb(output_dir, kills=3, seed=seed)
        assert weights(output_dir) == weights(undisturbed)
        assert not list(output_dir.glob("checkpoint-*"))  # finished phases need none
        if kills:  # a short run may end before its first one
            return
    pytest.fail("expected a run that was killed, got none")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signals_save_a_checkpoint(undisturbed, tmp_path, number):
    """The processes that load batches get the signal too."""
    output_dir = tmp_path / "run"
    flags = ["--checkpointing_steps", "null", "--dataloader_num_workers", "2"]
    process = start(output_dir, *flags)
    while not (output_dir / "validation" / "level_2").is_dir():
        assert process.is_alive()
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does, and `timeout`
    finish(process, output_dir)
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" not in log and "\nstopped in level_2 at step" in log
    (saved,) = output_dir.glob("checkpoint-*")
    assert saved.name.startswith("checkpoint-level_2-")
    finish(start(output_dir, *RESUME, "--checkpointing_steps", "null"), output_dir)
    assert weights(output_dir) == weights(undisturbed)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, "checkpoint-level_2-00000006")
        with pytest.raises(SystemExit):
            load_script("train").main([*FLAGS, "--output_dir", str(output_dir)])
    return output_dir


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The folder of a run that stopped after its second checkpoint of level_2."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def stop_at(monkeypatch, name):
    save = Checkpoints.save

    def save_and_stop(self, identity, progress, states, accelerator):
        save(self, identity, progress, states, accelerator)
        if (self.folder / name).exists():
            raise SystemExit("stopped")

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)


def test_damaged_checkpoints_and_other_settings_are_refused(stopped):
    script, flags = load_script("train"), [*FLAGS, "--output_dir", str(stopped), *RESUME]
    with pytest.raises(ValueError, match="with learning_rate=0.002, got learning_rate=0.001: "):
        script.main([*flags, "--levels.fit.learning_rate", "0.001"])
    newest = stopped / "checkpoint-level_2-00000006"
    for name in ("fit.pt", "identity.json", "model.safetensors", "optimizer.bin"):
        path = newest / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(
            ValueError, match="expected (a complete checkpoint, got|JSON in) .*00000006.*delete"
        ):
            script.main(flags)
        flipped = bytearray(content)
        flipped[-len(content) // 3] ^= 1  # it may still be valid JSON
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"00000006|--overwrite_output_dir"):
            script.main(flags)
        path.write_bytes(content)
    with pytest.raises(ValueError, match="resume_from_checkpoint to be 'latest' or a checkpoint"):
        script.main([*flags, "--resume_from_checkpoint", str(stopped / "nothing")])


def test_a_checkpoint_by_its_path(stopped, undisturbed):
    script = load_script("train")
    older = stopped / "checkpoint-level_2-00000003"
    flags = [*FLAGS, "--output_dir", str(stopped), "--resume_from_checkpoint", str(older)]
    script.main(flags)
    assert weights(stopped) == weights(undisturbed)


def test_checkpoints_total_limit(tmp_path, monkeypatch):
    script = load_script("train")
    stop_at(monkeypatch, "checkpoint-level_2-00000009")
    with pytest.raises(SystemExit):
        script.main([*FLAGS, "--output_dir", str(tmp_path), "--checkpoints_total_limit", "2"])
    steps = sorted(int(path.name[-8:]) for path in tmp_path.glob("checkpoint-level_2-*"))
    assert steps == [6, 9]
    identity = json.loads((tmp_path / "checkpoint-level_2-00000009" / "identity.json").read_text())
    assert identity["phase"] == "level_2" and identity["num_processes"] == 1


def test_a_new_run_ignores_old_checkpoints(stopped, undisturbed):
    script, flags = load_script("train"), [*FLAGS, "--output_dir", str(stopped)]
    with pytest.raises(ValueError, match="got .* with checkpoint-level_2-.*--overwrite_output_dir"):
        script.main(flags)
    script.main([*flags, "--overwrite_output_dir"])
    assert weights(stopped) == weights(undisturbed)
    assert not list(stopped.glob("checkpoint-*"))


@pytest.mark.parametrize("when", ["checkpoint", pytest.param("level", marks=pytest.mark.slow)])
def test_a_full_disk_loses_no_work(stopped, undisturbed, when, monkeypatch):
    script = load_script("train")
    flags = [*FLAGS, "--output_dir", str(stopped), *RESUME]
    before = {path.name for path in stopped.iterdir()}
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ):

        def full(*arguments, error=error, **keywords):
            raise error

        where = torch if when == "checkpoint" else ProgressiveVAELevel
        name = "save" if when == "checkpoint" else "save_pretrained"
        monkeypatch.setattr(where, name, full)
        with pytest.raises(OSError, match="No space left|unexpected pos"):
            script.main(flags)
        if when == "checkpoint":
            assert before <= {path.name for path in stopped.iterdir()}
        monkeypatch.undo()
    script.main(flags)
    assert weights(stopped) == weights(undisturbed)


def test_an_ignored_signal_stays_ignored(tmp_path):
    """A shell starts background jobs with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Checkpoints(tmp_path).handle_signals():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_handled_until_the_block_ends(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Checkpoints(tmp_path).handle_signals():
            assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_checkpoint_in_the_home_folder(stopped, monkeypatch):
    monkeypatch.setenv("HOME", str(stopped))
    checkpoint = Checkpoints(stopped, resume="~/checkpoint-level_2-00000003").explicit_path
    assert checkpoint == (stopped / "checkpoint-level_2-00000003").resolve()
