"""A run's checkpoints: written aside and renamed, the last few kept, the newest readable one resumed.

The private state of a run is accelerate's own format (model, optimizer, scheduler, random states) plus
the averaged parameters and the position in the run. Published weights are written elsewhere, as
safetensors only.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import load
from accelerate.utils.constants import RNG_STATE_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from isic_vq.files import replaced_directory
from isic_vq.training.averaging import AveragedParameters

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
        best_loss: lowest validation loss so far; None before the first validation.
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
    """The checkpoint folders of one run, `step-00000500` and so on."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def save(self, accelerator: Accelerator, averaged: AveragedParameters | None, progress: Progress) -> Path:
        """Write a checkpoint and drop the oldest ones past `keep`.

        Raises:
            CheckpointError: it cannot be written; the earlier checkpoints are untouched.
        """
        target = self.folder / f"step-{progress.step:08d}"
        try:
            with replaced_directory(target) as folder:
                accelerator.save_state(str(folder))
                if averaged is not None:
                    save_file(averaged.state_dict(), folder / "averaged.safetensors")
                (folder / "progress.json").write_text(json.dumps(asdict(progress)))
        except (OSError, SafetensorError, RuntimeError) as error:
            # A full disk is an OSError to Python, the other two to safetensors and torch.
            last = self.list()
            raise CheckpointError(
                f"checkpoint of step {progress.step} was not written ({error}); the last good one is "
                f"{last[-1].name if last else 'none'}. Free some space and run the same command with --resume"
            ) from error
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def load_newest(self, accelerator: Accelerator, averaged: AveragedParameters | None) -> Progress:
        """Restore the newest checkpoint that can be read; a damaged one is passed over with a warning.

        Raises:
            CheckpointError: there is none.
        """
        for path in reversed(self.list()):
            try:
                progress = Progress(**json.loads((path / "progress.json").read_text()))
                # accelerate passes over damaged random states in silence; this does not
                load(path / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
                accelerator.load_state(str(path))
                if averaged is not None:
                    averaged.load_state_dict(load_file(path / "averaged.safetensors"))
            except Exception as error:  # torch, safetensors and json each raise their own for a damaged file
                logger.warning(
                    "checkpoint %s cannot be read (%s); trying the one before it", path.name, error
                )
                continue
            return progress
        raise CheckpointError(
            f"{self.folder.parent.name} has no readable checkpoint: delete that folder, or choose another "
            "output_dir, and start without --resume"
        )
