"""Tiny models. Those of session scope are shared: a test that changes one makes its own, or copies it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PRIOR, SCALES, VAR, VQVAE, stirred

from isic_vq import (
    IsicVQConfig,
    IsicVQModel,
    PixelCNNConfig,
    PixelCNNModel,
    VARConfig,
    VARModel,
    VQVAEConfig,
    VQVAEModel,
)


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
def make_var() -> Callable[..., VARModel]:
    """A tiny VAR in eval mode, always the same one for the same settings."""

    def make(**settings: Any) -> VARModel:
        fields = {key: value for key, value in VAR.items() if key != "model_type"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return stirred(VARModel(VARConfig(**{**fields, **settings})))

    return make


@pytest.fixture(scope="session")
def make_composite() -> Callable[..., IsicVQModel]:
    """A tiny composite in eval mode, with a PixelCNN or, `scales=True`, with a VAR; always the same one."""

    def make(scales: bool = False) -> IsicVQModel:
        tokenizer = {**VQVAE, "scales": SCALES, "num_phi": 2} if scales else dict(VQVAE)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = IsicVQConfig(vqvae_config=tokenizer, prior_config=dict(VAR if scales else PRIOR))
            return stirred(IsicVQModel(config))

    return make


@pytest.fixture(scope="session")
def composite(make_composite: Callable[[], IsicVQModel]) -> IsicVQModel:
    """The shared composite: not to be changed."""
    return make_composite()


@pytest.fixture(scope="session")
def var_composite(make_composite: Callable[..., IsicVQModel]) -> IsicVQModel:
    """The shared composite with a VAR: not to be changed."""
    return make_composite(scales=True)


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
