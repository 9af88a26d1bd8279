"""Trainers of the task of `line_task`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from line_task import LineTask

from isic_vq.training.loop import Trainer
from isic_vq.training.recipe import LoopRecipe


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Trainers of `LineTask` (5 batches of 2 an epoch) in folders of this test."""

    def make(name: str = "run", task: LineTask | None = None, **loop: Any) -> Trainer:
        fields = {"max_steps": 10, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 3}
        fields |= {"average_decay": 0.5, "precision": "fp32"}
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = LoopRecipe(**{**fields, **loop})
        return Trainer(
            task or LineTask(), recipe, tmp_path / name, settings={"stage": "line", "sizes": (1, 8)}
        )

    return make
