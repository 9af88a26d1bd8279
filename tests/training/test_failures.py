"""What goes wrong: every end names its step, its cause and the way on, and what was learned is kept."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from line_task import LineTask
from run_folder import digests, records, untimed
from torch.utils.data import TensorDataset, get_worker_info

from isic_vq.training.checkpoints import CheckpointError
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import TrainingError, is_out_of_memory
from isic_vq.training.recipe import VQVAERecipe
from isic_vq.training.vqvae import VQVAETask, train_vqvae


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.task.model.named_parameters()}


# Numbers that are not finite


@pytest.mark.parametrize(("step", "last"), [(4, "step-00000003"), (1, "none")])
def test_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(make_trainer, step, last):
    class Exploding(LineTask):
        def losses(self, model, batch, now):
            losses = super().losses(model, batch, now)
            return {**losses, "loss": losses["loss"] * math.nan} if now == step else losses

    trainer = make_trainer(task=Exploding())
    with pytest.raises(TrainingError) as error:
        trainer.train()
    assert f"the loss is nan at step {step}; the last good checkpoint is {last}." in str(error.value)
    assert "Lower loop.learning_rate or set loop.precision=fp32" in str(error.value)
    assert all(torch.isfinite(value).all() for value in trainer.task.model.state_dict().values())
    assert len(records(trainer.run.folder, "batch")) == step, "the broken step is not logged as a step"


class SteepTask(LineTask):
    """Its loss stays finite, but at step 4 its gradient does not: the slope of a square root at zero."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def losses(self, model, batch, step):
        losses = super().losses(model, batch, step)
        if step == 4:
            weight = self.model[0].weight
            losses["loss"] = losses["loss"] + ((weight - weight.detach()).sqrt() * self.factor).sum()
            assert torch.isfinite(losses["loss"])
        return losses


@pytest.mark.parametrize(("factor", "norm"), [(0.0, "nan"), (1.0, "(inf|nan)")])
def test_gradient_that_is_not_finite_never_reaches_the_weights(make_trainer, factor, norm):
    task, kept = SteepTask(factor), {}
    trainer = make_trainer(task=task)
    task.before = lambda step: kept.update(weights_of(trainer))
    with pytest.raises(TrainingError) as error:
        trainer.train()
    assert re.search(
        f"the gradient's norm is {norm} at step 4; the last good checkpoint is", str(error.value)
    )
    assert "checkpoint is step-00000003. Lower loop.learning_rate or set loop.precision=fp32" in str(
        error.value
    )
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, kept[name]), name
    assert len(records(trainer.run.folder, "batch")) == 4


# Data that end


class DyingSet(TensorDataset):
    """Items that cannot be read from some moment on, as those of a disk that is gone."""

    error: Exception | None = None

    def __getitem__(self, index):
        if self.error is not None:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "error", [OSError(5, os.strerror(5)), ValueError("not a record")], ids=["disk", "decoder"]
)
def test_data_that_cannot_be_read_any_more_end_the_run_with_a_checkpoint(make_trainer, error):
    task = LineTask()
    task.train_set = DyingSet(*task.train_set.tensors)
    task.before = lambda step: setattr(task.train_set, "error", error if step == 6 else None)
    trainer = make_trainer(task=task, save_every=100)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert str(caught.value) == (
        f"the images of step 7 could not be loaded ({error}); a checkpoint was saved there. Repair the data and run "
        "the same command with --resume"
    )
    assert caught.value.__cause__ is error
    assert [path.name for path in trainer.checkpoints.list()] == ["step-00000007"]


def test_run_goes_on_bit_for_bit_once_its_images_are_back(tiny_run, tmp_path, monkeypatch):
    """The folder of images goes after step 2's images were read, which is within the first epoch, and comes back."""
    images, gone = tmp_path / "train", tmp_path / "gone"
    images.symlink_to(tiny_run.images["train"])
    overrides = [f"output_dir={tmp_path / 'run'}", f"data.train=folder:{images}", "data.cache=false"]
    recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], overrides)
    before_step = VQVAETask.before_step

    def pull_the_plug(self, step):
        before_step(self, step)  # reads images itself, for the codebook's start
        if step == 2:
            images.rename(gone)

    with monkeypatch.context() as patch:
        patch.setattr(VQVAETask, "before_step", pull_the_plug)
        with pytest.raises(
            TrainingError, match=r"images of step 3 could not be loaded \(4 of .* are corrupt"
        ):
            train_vqvae(recipe)
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    gone.rename(images)
    torch.manual_seed(99)
    train_vqvae(recipe, resume=True)
    for part in ("best", "model", "arrays"):
        assert digests(tmp_path / "run" / part) == digests(tiny_run.vqvae / part), part
    assert untimed(records(tmp_path / "run")) == untimed(records(tiny_run.vqvae))


class HoledSet(TensorDataset):
    def __getitem__(self, index):
        if index == 9:
            raise OSError(5, os.strerror(5))
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_the_data_is_one_line_whichever_process_loads_them(make_trainer, num_workers):
    task = LineTask()
    task.train_set = HoledSet(*task.train_set.tensors)
    trainer = make_trainer(task=task, save_every=100, num_workers=num_workers)
    step = next(step for step, batch in enumerate(trainer.feed.batches) if 9 in batch)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"the images of step {step} could not be loaded (")
    assert "[Errno 5] Input/output error); a checkpoint was saved there" in lines[0]
    assert [path.name for path in trainer.checkpoints.list()] == [f"step-{step:08d}"]


class DeadlySet(TensorDataset):
    """Its last item kills the process that loads it, as the kernel does when memory runs out."""

    def __getitem__(self, index):
        if index == 9 and get_worker_info() is not None:
            time.sleep(2)  # the loop has trained on all that came before, and waits
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.slow
def test_killed_loader_process_ends_the_run_with_a_checkpoint(make_trainer):
    task = LineTask()
    task.train_set = DeadlySet(*task.train_set.tensors)
    trainer = make_trainer(task=task, save_every=100, num_workers=1)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    step = trainer.progress.step
    assert 0 <= step < 5, "the epoch holds every item"
    assert f"the images of step {step} could not be loaded (DataLoader worker" in str(error.value)
    assert "a checkpoint was saved there" in str(error.value)
    assert [path.name for path in trainer.checkpoints.list()] == [f"step-{step:08d}"]


# Memory and disk that run out

TOO_MUCH = 1 << 60


def test_the_errors_of_allocators_are_told_from_others():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(TOO_MUCH, dtype=np.uint8)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_numpy.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("std::bad_alloc")), (
        "what torch's C++ containers raise, with a limit only"
    )
    with pytest.raises(RuntimeError) as of_shapes:
        torch.zeros(2) + torch.zeros(3)
    assert not is_out_of_memory(of_shapes.value)
    assert not is_out_of_memory(OSError("No space left on device"))


@pytest.mark.parametrize("where", ["losses", "collate"])
def test_memory_that_runs_out_names_the_settings_that_need_less(make_trainer, where):
    class Hungry(LineTask):
        def losses(self, model, batch, step):
            if where == "losses" and step == 4:
                torch.empty(TOO_MUCH, dtype=torch.uint8)
            return super().losses(model, batch, step)

        def collate(self, items):
            if where == "collate" and len(self.seen) == 8:
                np.empty(TOO_MUCH, dtype=np.uint8)
            return super().collate(items)

    trainer = make_trainer(task=Hungry(), batch_size=4, accumulation_steps=2, precision="fp32")
    with pytest.raises(TrainingError) as error:
        trainer.train()
    assert str(error.value).startswith("out of memory at step 4 with 2 images at once on cpu;")
    assert "the last good checkpoint is step-00000003. Raise loop.accumulation_steps (now 2)" in str(
        error.value
    )
    assert "lower loop.batch_size, or set loop.precision=bf16" in str(error.value)
    assert [path.name for path in trainer.checkpoints.list()] == ["step-00000003"], "what failed is not saved"


LIMITED = """
import resource
import psutil
from isic_vq import cli
from isic_vq.training.vqvae import VQVAETask

def limit(self, step):
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 20 * 2**20, -1))

VQVAETask.before_step = limit
cli.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")
def test_memory_that_runs_out_in_a_real_process_is_one_line(tiny_run, tmp_path):
    """The first layer's output for 16 images takes 32 MiB, and 20 are left."""
    overrides = [f"output_dir={tmp_path / 'run'}", "model.image_size=32", "model.hidden_sizes=[2048, 8]"]
    arguments = ["train", str(tiny_run.configs["vqvae"]), *overrides, "loop.batch_size=16"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "error: out of memory at step 0 with 16 images at once on cpu; the last good checkpoint is none. Raise "
        "loop.accumulation_steps (now 1), which keeps the batch, lower loop.batch_size, or set loop.precision=bf16"
    )


def test_full_disk_at_a_checkpoint_ends_the_run_with_the_earlier_one_kept(make_trainer):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = LineTask()
    task.before = lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard)) if step == 5 else None
    trainer = make_trainer(task=task, max_steps=6)
    try:
        with pytest.raises(CheckpointError, match="checkpoint of step 6 .* last good one is step-00000003"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resumed = make_trainer(max_steps=6)
    resumed.resume()
    resumed.train()
    assert resumed.progress.step == 6
