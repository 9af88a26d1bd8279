"""A task that is small enough to follow by hand."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from isic_vq.training.feed import RowFeed
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe
from isic_vq.training.task import Task


class LineTask(Task):
    """Fit y = 2x with a small net that has dropout, so that the global random state counts.

    Attributes:
        validation_losses: what `validate` returns one after the other; the true loss once they are used up.
        before: called with the step before each one.
        validated: every loss `validate` returned.
    """

    averages_directly = True

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        x = torch.linspace(-1, 1, 10)[:, None]
        self.train_set = TensorDataset(x, 2 * x)
        self.validation_losses: list[float] = []
        self.validated: list[float] = []
        self.seen: list[list[float]] = []
        self.before: Callable[[int], None] = lambda step: None

    def feed(self, recipe: LoopRecipe, processes: Processes) -> RowFeed:
        return RowFeed(self.train_set, self.collate, recipe, processes)

    def collate(self, items: list[Any]) -> dict[str, Any]:
        x, y = (torch.stack(column) for column in zip(*items, strict=True))
        return {"x": x, "y": y, "size": len(x)}

    def before_step(self, step: int) -> None:
        self.before(step)

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        self.seen.append(batch["x"].flatten().tolist())
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        return {"loss": loss, "double_loss": 2 * loss}

    def validate(self) -> dict[str, float]:
        self.model.eval()
        x, y = self.train_set.tensors
        with torch.no_grad():
            loss = (self.model(x) - y).square().mean().item()
        self.validated.append(self.validation_losses.pop(0) if self.validation_losses else loss)
        return {"loss": self.validated[-1]}

    def pictures(self) -> dict[str, Image.Image]:
        return {"line": Image.new("RGB", (4, 3), (255, 0, 0))}

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(self.model.state_dict(), folder / "model.safetensors")


def interrupt_at(step: int, number: signal.Signals = signal.SIGINT) -> Callable[[int], None]:
    """A `before_step` that signals this process when that step begins, as Ctrl-C would."""
    return lambda now: os.kill(os.getpid(), number) if now == step else None
