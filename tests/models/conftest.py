"""Tiny models. Those of session scope are shared: a test that changes one makes its own, or copies it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isic_vq import IsicVQConfig, IsicVQModel, PixelCNNConfig, PixelCNNModel, VQVAEConfig, VQVAEModel

NUM_CODES = 7
CLASSES = {0: "melanoma", 1: "nevus", 2: "dermatofibroma"}
VQVAE = {
    "image_size": 16,
    "hidden_sizes": (6, 8),
    "num_residual_blocks": 1,
    "residual_size": 4,
    "num_codes": NUM_CODES,
    "code_dim": 3,
}
PRIOR = {
    "num_codes": NUM_CODES,
    "grid_size": 4,
    "hidden_size": 6,
    "num_layers": 2,
    "kernel_size": 3,
    "first_kernel_size": 3,
    "head_size": 8,
    "dropout": 0.0,
    "class_dropout": 0.0,
    "id2label": CLASSES,
}


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """Move what starts at zero or one off it, so that no term of a formula is tested at a value that hides it."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


@pytest.fixture(scope="session")
def make_vqvae() -> Callable[..., VQVAEModel]:
    """A tiny tokenizer in eval mode, always the same one for the same settings."""

    def make(**settings: Any) -> VQVAEModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return stirred(VQVAEModel(VQVAEConfig(**{**VQVAE, **settings})))

    return make


@pytest.fixture(scope="session")
def make_prior() -> Callable[..., PixelCNNModel]:
    """A tiny prior in eval mode, always the same one for the same settings."""

    def make(**settings: Any) -> PixelCNNModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return stirred(PixelCNNModel(PixelCNNConfig(**{**PRIOR, **settings})))

    return make


@pytest.fixture(scope="session")
def make_composite() -> Callable[[], IsicVQModel]:
    """A tiny composite in eval mode, always the same one."""

    def make() -> IsicVQModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = IsicVQConfig(vqvae_config=dict(VQVAE), prior_config=dict(PRIOR))
            return stirred(IsicVQModel(config))

    return make


@pytest.fixture(scope="session")
def composite(make_composite: Callable[[], IsicVQModel]) -> IsicVQModel:
    """The shared composite: not to be changed."""
    return make_composite()


@pytest.fixture(scope="session")
def composite_folder(composite: IsicVQModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared composite, saved: not to be changed."""
    folder = tmp_path_factory.mktemp("composite")
    composite.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run a script in a fresh interpreter, one thread, and return what it printed."""

    def run(script: str, *arguments: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
