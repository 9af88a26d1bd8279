"""What every test gets: no network, no download, one thread, fixed seeds; and small data to work on."""

import atexit
import os
import shutil
import socket
import sys
import tempfile

# Before any import of a Hugging Face library or of torch: they read these once.
os.environ.update(
    HF_HOME=tempfile.mkdtemp(prefix="isic-vq-tests-"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    WANDB_MODE="offline",
    OMP_NUM_THREADS="1",  # pytest-xdist's workers fill the cores, and tiny models gain nothing from threads
)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import csv  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("isic-vq", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("isic-vq")
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Let sockets connect to this machine only."""

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise RuntimeError(f"a test reached for the network: {address}")
            return connect(self, address)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; returns exit code, stdout and stderr."""
    from isic_vq import cli

    def invoke(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isic-vq", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return invoke


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder of the real images."""
    if not os.environ.get("ISIC_VQ_DATA"):
        pytest.skip("ISIC_VQ_DATA is not set")
    return Path(os.environ["ISIC_VQ_DATA"])


def write_images(folder: Path, seed: int, size: int) -> Path:
    """Write sixteen synthetic images, two of each diagnosis, with a metadata.csv."""
    from isic_vq.data.synthetic_images import synthetic_image, synthetic_metadata

    folder.mkdir()
    rows = [{"file_name": f"{i:03d}.png", **synthetic_metadata(i, seed)} for i in range(16)]
    for index, row in enumerate(rows):
        synthetic_image(index, seed, size).save(folder / row["file_name"])
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Sixteen synthetic images of 48 x 48 pixels, two of each diagnosis, with a metadata.csv."""
    return write_images(tmp_path / "images", seed=0, size=48)


TINY_LOOP = {
    "max_steps": 6,  # an epoch is 4 steps
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "average_decay": 0.5,
    "precision": "fp32",
    "save_every": 2,
}
TINY_VQVAE = {
    "image_size": 16,
    "hidden_sizes": [4, 8],
    "num_residual_blocks": 1,
    "residual_size": 4,
    "refinement_size": 2,
    "num_codes": 8,
    "code_dim": 4,
}
TINY_PRIOR = {"hidden_size": 8, "num_layers": 1, "first_kernel_size": 3, "head_size": 8}


TINY_SCALES = {"scales": [1, 2, 4], "num_phi": 2}
TINY_VAR = {"model_type": "isic_var", "hidden_size": 8, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tokenizer, its codes and a prior, each as its command leaves it: shared, so not to be changed.

    Paths: `images` and `codes` by part ("train", "validation"), `configs` (the recipes) by stage, and the run
    folders `vqvae` and `prior`.
    """
    return train_chain(tmp_path_factory.mktemp("tiny"), TINY_VQVAE, TINY_PRIOR)


@pytest.fixture(scope="session")
def var_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """As `tiny_run`, of a tokenizer with scales and a VAR."""
    return train_chain(tmp_path_factory.mktemp("var"), {**TINY_VQVAE, **TINY_SCALES}, TINY_VAR)


def train_chain(folder: Path, vqvae: dict[str, Any], prior: dict[str, Any]) -> SimpleNamespace:
    """Train a tokenizer and a prior on its codes; see `tiny_run`."""
    from isic_vq.data.code_cache import write_code_cache
    from isic_vq.data.encoding import encode_source
    from isic_vq.data.parts import open_part
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel
    from isic_vq.training.load import load_recipe
    from isic_vq.training.prior import train_prior
    from isic_vq.training.recipe import PriorRecipe, VQVAERecipe
    from isic_vq.training.vqvae import train_vqvae

    parts = {"train": 0, "validation": 1}
    run = SimpleNamespace(
        images={part: write_images(folder / part, seed, size=32) for part, seed in parts.items()},
        codes={part: folder / f"{part}.parquet" for part in parts},
        configs={stage: folder / f"{stage}.yaml" for stage in ("vqvae", "prior")},
        vqvae=folder / "vqvae",
        prior=folder / "prior",
    )
    recipes: dict[str, dict[str, Any]] = {
        "vqvae": {
            "output_dir": str(run.vqvae),
            "data": {part: f"folder:{images}" for part, images in run.images.items()},
            "loop": TINY_LOOP,
            "model": vqvae,
            "codebook_warmup_steps": 2,
        },
        "prior": {
            "output_dir": str(run.prior),
            "tokenizer": str(run.vqvae / "model"),
            "train_codes": str(run.codes["train"]),
            "validation_codes": str(run.codes["validation"]),
            "loop": TINY_LOOP,
            "model": prior,
            "num_samples": 10,
        },
    }
    for stage, recipe in recipes.items():
        run.configs[stage].write_text(yaml.safe_dump({"stage": stage, **recipe}))
    train_vqvae(load_recipe(VQVAERecipe, run.configs["vqvae"], []))
    tokenizer = load_model(VQVAEModel, str(run.vqvae / "model"))
    for part, images in run.images.items():
        records, source = open_part(f"folder:{images}")
        cache = encode_source(tokenizer, IsicVQImageProcessor(size=16), records, source)
        write_code_cache(cache, run.codes[part])
    train_prior(load_recipe(PriorRecipe, run.configs["prior"], []))
    return run
