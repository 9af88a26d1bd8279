"""A run's checkpoints: written aside and renamed, the last few kept, the newest readable one resumed.

The private state of a run is accelerate's own format (model, optimizer, scheduler, random states) plus
the averaged parameters and the position in the run. Published weights are written elsewhere, as
safetensors only.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from isic_vq.files import write_atomically, write_tensors
from isic_vq.training.averaging import AveragedParameters
from isic_vq.training.processes import Processes
from isic_vq.training.state import (
    TrainingState,
    read_random_state,
    restore_random_state,
    save_random_state,
)

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or a run that has none to resume."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        epoch: epochs begun before the current one.
        batch: batches done in the current epoch.
        best_loss: lowest `Task.selection` so far; None before the first validation.
        best_step: step of that validation.
        validations_since_best: what early stopping counts.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_loss: float | None = None
    best_step: int = 0
    validations_since_best: int = 0


class Checkpoints:
    """The checkpoint folders of one run, `step-00000500` and so on.

    Every process takes part in saving (each has random states of its own) and in loading; the folder is on a disk
    that all of them see. The main process makes and renames.

    Args:
        folder: where they are.
        keep: how many of them are kept.
        processes: the group.
        state: what is trained.

    Attributes:
        feed: what `save` was given as this process's feed in the checkpoint loaded last; None if it was given none.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes, state: TrainingState):
        self.folder, self.keep, self.processes, self.state = folder, keep, processes, state
        self.feed: dict[str, Any] | None = None

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def newest_name(self) -> str:
        """Name of the newest complete checkpoint, for messages."""
        saved = self.list()
        return saved[-1].name if saved else "none"

    def save(
        self, averaged: AveragedParameters | None, progress: Progress, feed: dict[str, Any] | None = None
    ) -> Path:
        """Write a checkpoint and drop the oldest ones past `keep`.

        Args:
            averaged: averaged parameters, if there are any.
            progress: where the run stands, in all processes.
            feed: what else this process has to know to be fed the rest of an epoch.

        Raises:
            CheckpointError: it cannot be written, by any process; the earlier checkpoints are untouched.
        """
        target = self.folder / f"step-{progress.step:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        error = self._attempt(lambda: self._begin(temporary), on_main=True)
        error = error or self._attempt(lambda: self._fill(temporary, averaged, progress, feed))
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
        """Do something in every process, or in the main one; what went wrong in this one or elsewhere."""
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
        """Make an empty folder; what a killed run left half-written goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _fill(
        self,
        temporary: Path,
        averaged: AveragedParameters | None,
        progress: Progress,
        feed: dict[str, Any] | None,
    ) -> None:
        """Write this process's part."""
        save_random_state(self._own(temporary, "random"))
        if feed is not None:
            write_atomically(self._own(temporary, "feed"), json.dumps(feed).encode())
        if self.processes.is_main:
            self.state.save(temporary)
            if averaged is not None:
                write_tensors(temporary / "averaged.safetensors", averaged.state_dict())
            state = {**asdict(progress), "num_processes": self.processes.world}
            write_atomically(temporary / "progress.json", json.dumps(state).encode())

    def _own(self, folder: Path, name: str) -> Path:
        """A file of this process."""
        return folder / f"{name}-{self.processes.rank}.json"

    def _publish(self, temporary: Path, target: Path) -> None:
        """Let the finished folder take its name, and drop the oldest ones."""
        old = self.folder / f"{target.name}.old"  # still listed, should the process be killed right here
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        if old.exists():
            shutil.rmtree(old)
        for path in self.list()[: -self.keep]:
            shutil.rmtree(path)

    def load_newest(self, averaged: AveragedParameters | None) -> Progress:
        """Restore the newest checkpoint that every process can read; a damaged one is passed over with a warning.

        Raises:
            CheckpointError: there is none, it was written by another number of processes, or it is a pickle.
        """
        for path in reversed(self.list()):
            progress, error = None, None
            try:
                progress = self._read(path, averaged)
            except CheckpointError:
                raise
            except (
                Exception
            ) as failure:  # torch, safetensors and json each raise their own for a damaged file
                error = failure
            if self.processes.agree(error is not None):
                logger.warning(
                    "checkpoint %s cannot be read (%s); trying the one before it",
                    path.name,
                    error or "by another process",
                )
                continue
            assert progress is not None
            return progress
        raise CheckpointError(
            f"{self.folder.parent.name} has no readable checkpoint: delete that folder, or choose another "
            "output_dir, and start without --resume"
        )

    def _read(self, path: Path, averaged: AveragedParameters | None) -> Progress:
        """Restore one checkpoint."""
        fields = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        num_processes = fields.pop("num_processes")
        if num_processes != self.processes.world:
            raise CheckpointError(
                f"{path.name} was written by {num_processes} processes, this run has {self.processes.world}: an exact "
                "resume needs as many, each with its own random state"
            )
        if (path / "optimizer.bin").exists():
            raise CheckpointError(
                f"{path.name} holds pickles, which may run code and are not read: an older version wrote it; start again in "
                "another output_dir"
            )
        random_state, feed = read_random_state(self._own(path, "random")), self._own(path, "feed")
        self.feed = json.loads(feed.read_text(encoding="utf-8")) if feed.exists() else None
        average = load_file(path / "averaged.safetensors") if averaged is not None else {}
        self.state.load(path)
        if averaged is not None:
            averaged.load_state_dict(average)
        restore_random_state(random_state)
        return Progress(**fields)
