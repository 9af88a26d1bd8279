"""Checkpoints: whole or not at all, the last few kept, the newest readable one resumed."""

import errno
import json
import logging
import os
import shutil

import pytest
import torch

from isic_vq.training.checkpoints import CheckpointError, Progress


@pytest.fixture
def trainer(make_trainer):
    """A trainer with checkpoints of steps 3 and 6, at step 6."""
    trainer = make_trainer(max_steps=6)
    trainer.train()
    return trainer


def fingerprint(trainer):
    """Everything that decides how training goes on."""
    optimizer = trainer.optimizer.state_dict()["state"]
    tensors = {f"model {name}": value for name, value in trainer.task.model.state_dict().items()}
    tensors |= {f"average {name}": value for name, value in trainer.averaged.state_dict().items()}
    tensors |= {
        f"optimizer {i} {name}": value for i, state in optimizer.items() for name, value in state.items()
    }
    tensors["random state"] = torch.get_rng_state()
    tensors["schedule"] = torch.tensor(trainer.scheduler.last_epoch)
    return {name: value.clone() for name, value in tensors.items()}


def names(trainer):
    return [path.name for path in trainer.checkpoints.list()]


def test_checkpoint_restores_everything_bit_for_bit(trainer, make_trainer):
    expected = fingerprint(trainer)
    other = make_trainer(max_steps=6)
    torch.manual_seed(99)
    progress = other.checkpoints.load_newest()
    assert progress == trainer.progress
    found = fingerprint(other)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_checkpoint_folder_has_no_leftovers_beside_it(trainer):
    assert {path.name for path in trainer.checkpoints.folder.iterdir()} == {"step-00000003", "step-00000006"}


def test_only_the_last_k_are_kept(make_trainer):
    trainer = make_trainer(max_steps=10, save_every=2, keep_checkpoints=3)
    trainer.train()
    assert names(trainer) == ["step-00000006", "step-00000008", "step-00000010"]


def test_saving_the_same_step_again_replaces_it(trainer):
    trainer.progress.best_loss = 0.125
    trainer.checkpoints.save(trainer.progress)
    assert names(trainer) == ["step-00000003", "step-00000006"]
    saved = json.loads((trainer.checkpoints.folder / "step-00000006" / "progress.json").read_text())
    assert saved["best_loss"] == 0.125


@pytest.mark.parametrize("of", ["the same step", "an earlier step"])
def test_what_a_killed_run_left_half_written_goes_with_the_next_checkpoint(trainer, of):
    left = trainer.checkpoints.folder / f".step-{6 if of == 'the same step' else 4:08d}.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert names(trainer) == ["step-00000003", "step-00000006"], "it never counts as a checkpoint"
    trainer.checkpoints.save(trainer.progress)
    found = {path.name for path in trainer.checkpoints.folder.iterdir()}
    assert found == {"step-00000003", "step-00000006"}


@pytest.mark.parametrize("killed", ["before the new one has its name", "before the old one is deleted"])
def test_kill_while_a_checkpoint_is_replaced_leaves_one_to_resume(trainer, make_trainer, killed):
    """Saving a step again lets the old folder step aside, renames the new one, and deletes the old one."""
    folder = trainer.checkpoints.folder
    (folder / "step-00000006").rename(folder / "step-00000006.old")
    new = ".step-00000006.tmp" if killed.startswith("before the new") else "step-00000006"
    shutil.copytree(folder / "step-00000006.old", folder / new)
    expected = fingerprint(trainer)
    other = make_trainer(max_steps=6)
    other.resume()
    assert other.progress == trainer.progress
    found = fingerprint(other)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    other.checkpoints.save(other.progress)
    found = {path.name for path in folder.iterdir()}
    assert found == {"step-00000003", "step-00000006"}, "the next save tidies up"


def test_checkpoint_of_another_number_of_processes_is_refused(trainer):
    for path in trainer.checkpoints.list():
        state = json.loads((path / "progress.json").read_text())
        assert state.pop("num_processes") == 1
        (path / "progress.json").write_text(json.dumps({**state, "num_processes": 4}))
    before = fingerprint(trainer)
    with pytest.raises(CheckpointError) as error:
        trainer.resume()
    assert "step-00000006 was written by 4 processes: resume with as many, not 1" in str(error.value)
    for name, value in fingerprint(trainer).items():
        assert torch.equal(before[name], value), f"{name} was restored all the same"


def test_without_averaging_no_average_is_written(make_trainer):
    trainer = make_trainer(max_steps=2, average_decay=0)
    trainer.train()
    assert not (trainer.checkpoints.list()[-1] / "averaged.safetensors").exists()
    assert trainer.checkpoints.load_newest().step == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "schedule.json",
        "random-0.json",
        "averaged.safetensors",
        "progress.json",
    ],
)
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(trainer, make_trainer, caplog, name, damage):
    older = make_trainer(max_steps=6)
    newest = older.checkpoints.folder / "step-00000006"
    if damage == "missing":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes((newest / name).read_bytes()[: (newest / name).stat().st_size // 2])
    with caplog.at_level(logging.WARNING, logger="isic_vq"):
        progress = older.checkpoints.load_newest()
    assert progress.step == 3
    found = fingerprint(older)
    shutil.rmtree(newest)
    older.checkpoints.load_newest()
    for key, value in fingerprint(older).items():
        assert torch.equal(found[key], value), f"{key}: part of the damaged checkpoint stayed loaded"
    (record,) = (record for record in caplog.records if record.name.startswith("isic_vq"))
    assert "checkpoint step-00000006 cannot be read" in record.getMessage()
    assert "trying the one before it" in record.getMessage()


def test_run_without_a_readable_checkpoint_says_how_to_go_on(trainer):
    for path in trainer.checkpoints.list():
        (path / "progress.json").write_text("{")
    with pytest.raises(CheckpointError, match="run has no readable checkpoint: choose another output_dir"):
        trainer.checkpoints.load_newest()


def test_run_without_any_checkpoint_says_how_to_go_on(make_trainer):
    trainer = make_trainer()
    with pytest.raises(CheckpointError, match="start without --resume"):
        trainer.checkpoints.load_newest()


def test_full_disk_keeps_the_last_checkpoint_and_names_the_way_out(trainer, monkeypatch):
    def full_disk(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.checkpoints.state, "save", full_disk)
    trainer.progress.step = 8
    with pytest.raises(CheckpointError) as error:
        trainer.checkpoints.save(trainer.progress)
    assert "checkpoint of step 8 was not written" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "the last good one is step-00000006" in str(error.value)
    assert "Free some space and run the same command with --resume" in str(error.value)
    assert {path.name for path in trainer.checkpoints.folder.iterdir()} == {"step-00000003", "step-00000006"}


@pytest.mark.parametrize("limit", [0, 3000, 6000])
def test_files_that_cannot_be_written_to_the_end_are_a_checkpoint_error(trainer, limit):
    """A limit on file size makes the writers of safetensors and torch fail as a full disk does: not with OSError."""
    resource = pytest.importorskip("resource")
    expected = {path: path.read_bytes() for path in trainer.checkpoints.folder.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.progress.step = 8
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="the last good one is step-00000006"):
            trainer.checkpoints.save(trainer.progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = {path: path.read_bytes() for path in trainer.checkpoints.folder.rglob("*") if path.is_file()}
    assert found == expected, "the earlier checkpoints are untouched, and nothing half-written is left"


def test_first_checkpoint_that_fails_says_that_there_is_none(make_trainer, monkeypatch):
    trainer = make_trainer()
    # That folder exists: an OSError.
    monkeypatch.setattr(trainer.checkpoints.state, "save", lambda *_: os.mkdir(trainer.run.folder))
    with pytest.raises(CheckpointError, match="the last good one is none"):
        trainer.checkpoints.save(Progress(step=3))
