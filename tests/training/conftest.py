"""Trainers of the task of `line_task`, and tasks of the tiny tokenizer recipe."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from line_task import LineTask

from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe
from isic_vq.training.run import Run


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Trainers of `LineTask` (5 batches of 2 an epoch) in folders of this test."""

    def make(name: str = "run", task: LineTask | None = None, **loop: Any) -> Trainer:
        fields = {"max_steps": 10, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 3}
        fields |= {"average_decay": 0.5, "precision": "fp32"}
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = LoopRecipe(**{**fields, **loop})
        run, processes = Run(tmp_path / name, "0123abcd"), Processes(recipe, tmp_path / name)
        return Trainer(task or LineTask(), recipe, run, processes, {"stage": "line", "sizes": (1, 8)})

    return make


@pytest.fixture
def make_vqvae_task(tiny_run: SimpleNamespace) -> Callable[..., Any]:
    """Tasks of the tiny recipe, with overrides, on freshly initialised models; a trainer begins them."""
    from isic_vq.data.loading import DecodedImages
    from isic_vq.models.configuration_vqvae import VQVAEConfig
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel
    from isic_vq.training.recipe import VQVAERecipe, load_recipe
    from isic_vq.training.run import build_config
    from isic_vq.training.vqvae import VQVAETask, open_data

    def make(*overrides: str) -> VQVAETask:
        recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], list(overrides))
        train, validation, _ = open_data(recipe.data)
        config = build_config(VQVAEConfig, recipe.model)
        torch.manual_seed(recipe.loop.seed)
        processor = IsicVQImageProcessor(size=config.image_size)
        sets = [DecodedImages(records, processor, cache=True) for records in (train, validation)]
        return VQVAETask(VQVAEModel(config), processor, *sets, recipe)

    return make
