"""The log of a run: metrics.jsonl always, experiment trackers on request, the same numbers in both."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from isic_vq.files import write_atomically
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import LoopRecipe

logger = logging.getLogger(__name__)


class MetricLog:
    """metrics.jsonl and the trackers: one record per optimizer step, one per epoch, pictures per validation.

    Only the main process writes. The id names the run to the trackers, so that a resumed run continues the same one.
    """

    def __init__(
        self, run_dir: Path, run_id: str, recipe: LoopRecipe, processes: Processes, settings: dict[str, Any]
    ):
        self.path, self.run_id, self.settings = run_dir / "metrics.jsonl", run_id, settings
        self.recipe, self.processes = recipe, processes

    @property
    def has_trackers(self) -> bool:
        return bool(self.processes.accelerator.trackers)

    def begin(self, step: int, epoch: int) -> list[dict[str, Any]]:
        """Begin the trackers' run, or continue it after `step` in `epoch`; returns the records written before.

        Drops records past the step, those of epochs that have not ended (a checkpoint of an epoch's last step comes before its
        validation), and a last line that a killed run left half-written.

        TrainingError if wandb knows no login, or metrics.jsonl is damaged.
        """
        if self.recipe.trackers:
            run_dir, name = self.path.parent, f"{self.path.parent.name}-{self.run_id}"
            scalars = (bool, int, float, str)  # all that TensorBoard takes
            shown = {key: v if isinstance(v, scalars) else str(v) for key, v in self.settings.items()}
            try:
                self.processes.accelerator.init_trackers(
                    self.recipe.project,
                    config=None if step else shown,
                    init_kwargs={
                        "wandb": {"dir": str(run_dir), "id": self.run_id, "name": name, "resume": "allow"},
                        "tensorboard": {"purge_step": step + 1 if step else None},
                        "trackio": {"name": name, "resume": "allow"},
                    },
                )
            except Exception as error:
                if not type(error).__module__.startswith(
                    "wandb."
                ):  # its errors are neither ValueError nor RuntimeError
                    raise
                raise TrainingError(
                    f"loop.trackers: wandb cannot begin a run ({error}): log in with wandb login, or set WANDB_MODE=offline"
                ) from error
        if not self.processes.is_main or not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            records = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            kept = [
                (line, record)
                for line, record in records
                if record["step"] <= step and (record["kind"] == "batch" or record["epoch"] < epoch)
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{self.path.name} of {self.path.parent.name} is damaged ({error}): move it away to continue without the records "
                "so far"
            ) from error
        write_atomically(self.path, "".join(line for line, _ in kept).encode())
        return [record for _, record in kept]

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        if not self.processes.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        if self.has_trackers:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self.processes.accelerator.log(named, step=step)

    def show(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Hand pictures to the trackers."""
        for tracker in self.processes.accelerator.trackers:
            if tracker.name == "trackio":  # accelerate has no log_images for it
                import trackio

                images = {name: trackio.Image(picture) for name, picture in pictures.items()}
                tracker.tracker.log(images, step=step)
            else:
                arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(arrays, step=step, **options)

    def finish(self) -> None:
        self.processes.accelerator.end_training()
