import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import isic_vq
from isic_vq import (
    IsicVQConfig,
    IsicVQImageProcessor,
    IsicVQModel,
    PixelCNNConfig,
    PixelCNNModel,
    VQVAEConfig,
    VQVAEModel,
)
from isic_vq.hub.registration import HOOKS, install

TASK = "unconditional-image-generation"


def modules_loaded_by(*statements):
    """Top-level packages that each statement imports, one after the other, in a fresh process that warns of nothing."""
    script = "import json, sys\n"
    for statement in statements:
        script += (
            f"before = set(sys.modules)\n{statement}\n"
            "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))\n"
        )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A composite with an image processor, as a Hub repository has it."""
    folder = tmp_path_factory.mktemp("repository")
    config = IsicVQConfig(
        vqvae_config={"image_size": 8, "hidden_sizes": (4, 4), "num_codes": 5, "code_dim": 2},
        prior_config={"num_codes": 5, "grid_size": 2, "hidden_size": 4, "num_layers": 1, "head_size": 4},
    )
    IsicVQModel(config).save_pretrained(folder)
    for place in (folder, folder / "vqvae"):
        IsicVQImageProcessor(size=8).save_pretrained(place)
    return folder


# --- price of the import -------------------------------------------------------------------------------------------


def test_importing_the_package_reports_or_data_loads_nothing_heavy():
    package, reports, data = modules_loaded_by(
        "import isic_vq", "import isic_vq.evaluation.report, isic_vq.figures", "import isic_vq.data"
    )
    assert package.isdisjoint({"torch", "transformers", "numpy", "huggingface_hub"})
    assert (package | reports).isdisjoint({"torch", "matplotlib"})
    assert "datasets" not in package | reports | data


def test_importing_the_package_after_transformers_pipelines_registers_and_loads_nothing_optional():
    _, loaded = modules_loaded_by("from transformers import pipeline", "import isic_vq")
    assert "isic_vq" in loaded
    assert loaded.isdisjoint({"diffusers", "datasets", "accelerate", "matplotlib", "torchvision", "pandas"})


def test_public_names_are_listed_and_resolve():
    assert set(isic_vq.__all__) <= set(dir(isic_vq))
    for name in isic_vq.__all__:
        assert getattr(isic_vq, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'isic_vq' has no attribute 'VQGAN'"):
        _ = isic_vq.VQGAN


# --- what transformers knows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "config_class", "model_class"),
    [
        ("", IsicVQConfig, IsicVQModel),
        ("vqvae", VQVAEConfig, VQVAEModel),
        ("prior", PixelCNNConfig, PixelCNNModel),
    ],
)
def test_auto_classes_open_the_whole_and_its_parts(folder, place, config_class, model_class):
    assert type(AutoConfig.from_pretrained(folder / place)) is config_class
    assert type(AutoModel.from_pretrained(folder / place)) is model_class
    assert type(AutoModel.from_pretrained(folder, subfolder=place)) is model_class


@pytest.mark.parametrize("place", ["", "vqvae"])
def test_auto_image_processor_opens_the_processor(folder, place):
    processor = AutoImageProcessor.from_pretrained(folder / place)
    assert type(processor) is IsicVQImageProcessor
    assert processor.size["height"] == 8


def test_auto_model_builds_from_a_config():
    config = VQVAEConfig(image_size=8, hidden_sizes=(4,), num_codes=3, code_dim=2)
    assert type(AutoModel.from_config(config)) is VQVAEModel


def test_pipelines_know_the_task():
    from transformers.pipelines import PIPELINE_REGISTRY

    from isic_vq import UnconditionalImageGenerationPipeline

    assert TASK in PIPELINE_REGISTRY.get_supported_tasks()
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is UnconditionalImageGenerationPipeline


# --- the hook ------------------------------------------------------------------------------------------------------


def test_installing_again_changes_nothing(folder):
    before = list(sys.meta_path)
    install()
    install()
    assert sys.meta_path == before, "each call adds a finder that every later import must pass"
    assert type(AutoModel.from_pretrained(folder)) is IsicVQModel


@pytest.mark.parametrize("name", HOOKS)
def test_hooked_modules_keep_their_own_loader(name):
    from importlib import import_module

    module = import_module(name)
    for loader in (module.__spec__.loader, module.__loader__):
        assert not type(loader).__module__.startswith("isic_vq"), "the wrapper stayed behind in the module"


def test_other_imports_pass_the_finder_by():
    finder = next(finder for finder in sys.meta_path if type(finder).__module__ == "isic_vq.hub.registration")
    assert finder.find_spec("transformers.pipelines.base") is None
    assert finder.find_spec("json") is None


def test_registration_needs_no_trust_for_a_repository_that_ships_code(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "x.Y", "AutoModel": "x.Z"}
    config["custom_pipelines"] = {TASK: {"impl": "x.P", "pt": ["AutoModel"], "type": "image"}}
    (copy / "config.json").write_text(json.dumps(config))
    from transformers import pipeline

    images = pipeline(TASK, model=copy)(seed=0, output_type="pt")
    assert torch.isfinite(images).all()
