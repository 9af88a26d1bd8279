"""Trainers of the task of `line_task`, tasks of the tiny tokenizer recipe, and what the decoder stage needs."""

import json
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
    from isic_vq.models.configuration_vqvae import VQVAEConfig
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel
    from isic_vq.training.image_task import open_images
    from isic_vq.training.load import load_recipe
    from isic_vq.training.recipe import VQVAERecipe
    from isic_vq.training.run import build_config
    from isic_vq.training.vqvae import VQVAETask

    def make(*overrides: str) -> VQVAETask:
        recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], list(overrides))
        config = build_config(VQVAEConfig, recipe.model)
        torch.manual_seed(recipe.loop.seed)
        processor = IsicVQImageProcessor(size=config.image_size)
        train_set, validation_set, _ = open_images(recipe.data, processor)
        return VQVAETask(VQVAEModel(config), processor, train_set, validation_set, recipe)

    return make


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a feature model, a tokenizer and a whole model for 32-pixel images."""
    from transformers import ResNetConfig, ResNetModel

    from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
    from isic_vq.models.configuration_vqvae import VQVAEConfig
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.models.modeling_pixelcnn import PixelCNNModel
    from isic_vq.models.modeling_vqvae import VQVAEModel

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    ResNetModel(backbone).save_pretrained(folder / "features")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 32}}
    (folder / "features" / "preprocessor_config.json").write_text(json.dumps(settings))
    config = VQVAEConfig(
        image_size=32, hidden_sizes=(4, 8), num_residual_blocks=1, residual_size=4, num_codes=8, code_dim=4
    )
    tokenizer = VQVAEModel(config)
    tokenizer(torch.rand(8, 3, 32, 32))  # moves BatchNorm's statistics away from their start
    tokenizer.eval().save_pretrained(folder / "tokenizer")
    prior = PixelCNNModel(PixelCNNConfig(num_codes=8, grid_size=8, hidden_size=8, num_layers=1, head_size=8))
    IsicVQModel.from_parts(tokenizer, prior).save_pretrained(folder / "whole")
    IsicVQImageProcessor(size=32).save_pretrained(folder / "whole")
    return folder


@pytest.fixture(scope="session")
def decoder_settings(parts: Path, tiny_run: SimpleNamespace) -> list[str]:
    """A recipe of the decoder stage, as overrides; a test adds its output_dir."""
    return [
        f"model={parts / 'tokenizer'}",
        f"feature_model={parts / 'features'}",
        f"data.train=folder:{tiny_run.images['train']}",
        f"data.validation=folder:{tiny_run.images['validation']}",
        "loop.max_steps=6",
        "loop.batch_size=4",
        "loop.learning_rate=2e-3",
        "loop.warmup_steps=2",
        "loop.average_decay=0.5",
        "loop.precision=fp32",
        "loop.save_every=2",
        "adversarial_start=2",
    ]
