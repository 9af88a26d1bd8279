"""A run's checkpoints: written aside and renamed, the last few kept, the newest readable one resumed.

A checkpoint is tensors and JSON: model, averaged parameters, optimizer, schedule, position in the run and, of each process,
random states and feed. Unlike a pickle, neither can hold code that runs when it is read. Published weights lie elsewhere.
"""

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from isic_vq.files import write_atomically, write_tensors
from isic_vq.training.averaging import AveragedParameters
from isic_vq.training.processes import Processes

logger = logging.getLogger(__name__)

MODEL, OPTIMIZER, SCHEDULE = "model.safetensors", "optimizer.safetensors", "schedule.json"
AVERAGED, PROGRESS = "averaged.safetensors", "progress.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or a run that has none to resume."""


@dataclass
class Progress:
    """Position of a run, as checkpoints keep it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs begun before the current one
    batch: int = 0  # batches done in the current epoch
    best_loss: float | None = None  # lowest `Task.selection` so far; None before the first validation
    best_step: int = 0  # step of that validation
    validations_since_best: int = 0  # what early stopping counts


class Checkpoints:
    """The checkpoint folders of one run, `step-00000500` and so on, of which the last `keep` are kept.

    Every process takes part in saving (each has random states of its own) and in loading; the folder is on a disk that all of
    them see. The main process makes and renames.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes, state: "TrainingState"):
        self.folder, self.keep, self.processes, self.state = folder, keep, processes, state
        self.feed: dict[str, Any] | None = None

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def newest_name(self) -> str:
        saved = self.list()
        return saved[-1].name if saved else "none"

    def save(self, progress: Progress, feed: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint and drop the oldest ones past `keep`; CheckpointError if some process cannot write its part.

        `feed` is what this process has to know, in JSON, to be fed the rest of an epoch.
        """
        target = self.folder / f"step-{progress.step:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        error = self._attempt(lambda: self._begin(temporary), on_main=True)
        error = error or self._attempt(lambda: self._fill(temporary, progress, feed))
        error = error or self._attempt(lambda: self._publish(temporary, target), on_main=True)
        if error:
            if self.processes.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of step {progress.step} was not written ({error}); the last good one is "
                f"{self.newest_name()}. Free some space and run the same command with --resume"
            )
        return target

    def _attempt(self, action: Callable[[], None], on_main: bool = False) -> str | None:
        """Do something in every process, or in the main one; returns why it failed in this one or another."""
        error = None
        try:
            if self.processes.is_main or not on_main:
                action()
        except (OSError, SafetensorError, RuntimeError) as failure:
            # A full disk is an OSError to Python, the other two to safetensors and torch.
            error = str(failure)
        if self.processes.agree(error is not None):
            return error or "another process failed"
        return None

    def _begin(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _fill(self, temporary: Path, progress: Progress, feed: dict[str, Any] | None) -> None:
        write_atomically(self._path(temporary, "random"), json.dumps(random_state()).encode())
        if feed is not None:
            write_atomically(self._path(temporary, "feed"), json.dumps(feed).encode())
        if self.processes.is_main:
            self.state.save(temporary)
            fields = {**asdict(progress), "num_processes": self.processes.world}
            write_atomically(temporary / PROGRESS, json.dumps(fields).encode())

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}-{self.processes.rank}.json"

    def _publish(self, temporary: Path, target: Path) -> None:
        """Rename the finished folder, and drop the oldest ones."""
        old = self.folder / f"{target.name}.old"  # still listed, should the process be killed right here
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        if old.exists():
            shutil.rmtree(old)
        for path in self.list()[: -self.keep]:
            shutil.rmtree(path)

    def load_newest(self) -> Progress:
        """Restore the newest checkpoint that every process can read; a damaged one is passed over with a warning."""
        for path in reversed(self.list()):
            progress, error = None, None
            try:
                progress = self._read(path)
            except CheckpointError:
                raise
            except Exception as failure:  # torch, safetensors and json raise their own for a damaged file
                error = failure
            if not self.processes.agree(error is not None):
                assert progress is not None
                return progress
            reason = error or "by another process"
            logger.warning("checkpoint %s cannot be read (%s); trying the one before it", path.name, reason)
        raise CheckpointError(
            f"{self.folder.parent.name} has no readable checkpoint: choose another output_dir, and start without --resume"
        )

    def _read(self, path: Path) -> Progress:
        fields = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        num_processes = fields.pop("num_processes")
        if num_processes != self.processes.world:
            raise CheckpointError(
                f"{path.name} was written by {num_processes} processes: resume with as many, not {self.processes.world}"
            )
        if (path / "optimizer.bin").exists():
            raise CheckpointError(
                f"{path.name} holds pickles, which may run code: start again in another output_dir"
            )
        random_before = json.loads(self._path(path, "random").read_text(encoding="utf-8"))
        feed = self._path(path, "feed")
        self.feed = json.loads(feed.read_text(encoding="utf-8")) if feed.exists() else None
        self.state.load(path)
        restore_random_state(random_before)
        return Progress(**fields)


@dataclass
class TrainingState:
    """Model (not wrapped for several processes), its optimizer, the schedule of the learning rate, and averaged parameters."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    averaged: AveragedParameters | None = None

    def save(self, folder: Path) -> None:
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{name}": tensor.contiguous()
            for index, state in optimizer["state"].items()
            for name, tensor in state.items()
        }
        schedule = {"schedule": self.scheduler.state_dict(), "groups": optimizer["param_groups"]}
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        write_tensors(folder / MODEL, weights)
        write_tensors(folder / OPTIMIZER, moments)
        write_atomically(folder / SCHEDULE, json.dumps(schedule).encode())
        if self.averaged is not None:
            write_tensors(folder / AVERAGED, self.averaged.state_dict())

    def load(self, folder: Path) -> None:
        """Restore what `save` has written; all files are read before anything changes."""
        weights, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
        schedule = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
        averaged = {} if self.averaged is None else load_file(folder / AVERAGED)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            index, name = key.split(".", 1)
            parameter = parameters[int(index)]
            if (
                tensor.shape == parameter.shape
            ):  # fused optimizers take the parameter's memory format for granted
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[name] = tensor
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict({"state": state, "param_groups": schedule["groups"]})
        self.scheduler.load_state_dict(schedule["schedule"])
        if self.averaged is not None:
            self.averaged.load_state_dict(averaged)


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's global generators in this process; JSON."""
    name, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *position],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().tolist(),
        "cuda": [device.tolist() for device in torch.cuda.get_rng_state_all()],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned, before or after JSON."""
    version, internal, gauss = state["python"]
    cuda = [torch.tensor(device, dtype=torch.uint8) for device in state["cuda"]]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
