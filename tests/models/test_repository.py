"""What `save_pretrained` adds to configs and weights: code, the maps that name it, diffusers' index, a plain card."""

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_import_files

import isic_vq.models
from isic_vq import IsicVQModel
from isic_vq.models.repository import plain_card

CODE = Path(isic_vq.models.__file__).parent
MODULES = {path.name for path in CODE.glob("*.py")} - {"__init__.py"}
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
SHIPPED = sorted(path.parent for path in CARDS.glob("*/model_index.json"))


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_saved_folder_holds_configs_weights_and_code_and_nothing_else(composite_folder):
    assert files_of(composite_folder) == MODULES | {
        "config.json",
        "model.safetensors.index.json",
        "model_index.json",
        "preprocessor_config.json",
        "prior/config.json",
        "prior/isic_vq.py",
        "prior/model.safetensors",
        "vqvae/config.json",
        "vqvae/isic_vq.py",
        "vqvae/model.safetensors",
    }


def test_shipped_code_is_the_packages_byte_for_byte(composite_folder):
    for name in MODULES:
        assert (composite_folder / name).read_bytes() == (CODE / name).read_bytes(), name
    for part in ("vqvae", "prior"):
        assert (composite_folder / part / "isic_vq.py").read_bytes() == (CODE / "component.py").read_bytes()


def test_the_module_that_transformers_enters_names_all_of_the_code(composite_folder):
    """transformers downloads what that file names, directly or not; the rest would be missing on a Hub."""
    entry = composite_folder / "auto_map.py"
    named = {Path(path).name for path in get_relative_import_files(entry)}
    assert named | {entry.name} == MODULES


@pytest.mark.parametrize("name", ["pipeline.py", "component.py"])
def test_what_diffusers_runs_under_a_shared_name_imports_no_sibling_and_has_no_global_state(name):
    tree = ast.parse((CODE / name).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Try, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body), "another repository would overwrite it"


def test_every_name_in_the_maps_exists_in_the_file_it_names(composite_folder):
    maps = [
        json.loads((composite_folder / name).read_text())["auto_map"]
        for name in ("config.json", "vqvae/config.json", "prior/config.json", "preprocessor_config.json")
    ]
    config = json.loads((composite_folder / "config.json").read_text())
    names = [name for auto_map in maps for name in auto_map.values()]
    names += [pipeline["impl"] for pipeline in config["custom_pipelines"].values()]
    index = json.loads((composite_folder / "model_index.json").read_text())
    names.append(".".join(index["_class_name"]))
    names += [f"component.{index[part][1]}" for part in ("vqvae", "prior")]
    for module, name in (entry.split(".") for entry in names):
        assert hasattr(getattr(__import__(f"isic_vq.models.{module}").models, module), name), (module, name)


def test_the_maps_do_not_stay_in_a_config_that_the_package_has_read(composite_folder):
    config = IsicVQModel.from_pretrained(composite_folder).config
    assert not hasattr(config, "custom_pipelines")
    assert not hasattr(config, "auto_map")


@pytest.mark.slow
def test_without_the_package_a_model_is_saved_as_with_it(composite_folder, tmp_path, run_python):
    script = """
import sys
sys.modules["isic_vq"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
model.save_pretrained(sys.argv[2])
"""
    run_python(script, composite_folder, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(composite_folder)
    for name in files_of(composite_folder):
        assert (tmp_path / "again" / name).read_bytes() == (composite_folder / name).read_bytes(), name


def test_a_save_that_fails_leaves_the_old_folder_as_it_was(make_composite, tmp_path):
    model = make_composite()
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_of(tmp_path)}
    model.prior.code_embedding.weight = torch.nn.Parameter(torch.empty(7, 6, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files_of(tmp_path)} == before


def test_other_files_of_the_folder_stay(composite, tmp_path):
    (tmp_path / "README.md").write_text("my card")
    composite.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my card"


# --- the shipped repository ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_repository_is_laid_out_as_save_pretrained_does(shipped, tmp_path):
    model = IsicVQModel.from_pretrained(shipped)
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) <= files_of(shipped)
    for name in files_of(tmp_path):
        if name.endswith(".json"):
            assert json.loads((shipped / name).read_text()) == json.loads((tmp_path / name).read_text()), name
        if name.endswith(".py"):
            assert (shipped / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_repository_holds_no_code_but_the_packages(shipped):
    assert {path.name for path in shipped.rglob("*.py")} == MODULES | {"isic_vq.py"}


# --- the plain card ------------------------------------------------------------------------------------------------


def test_plain_card_states_licence_task_and_tags_and_measures_nothing(composite):
    config = composite.config.__class__.from_dict({**composite.config.to_dict(), "license": "cc-by-nc-4.0"})
    card = ModelCard(plain_card("user/tiny", config, ["my-tag"]))
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.library_name == "transformers"
    assert "my-tag" in card.data.tags
    assert card.data.eval_results is None
    assert "not a diagnostic device" in card.text


def test_plain_card_of_weights_without_a_licence_states_none(composite):
    assert "license" not in ModelCard(plain_card("user/tiny", composite.config)).data.to_dict()


# --- saving ---------------------------------------------------------------------------------------------------------


def test_a_save_that_is_interrupted_between_the_parts_leaves_a_folder_that_is_refused(
    make_composite, tmp_path, monkeypatch
):
    model = make_composite()
    model.save_pretrained(tmp_path)
    move = os.replace

    def interrupted(source, target):
        if Path(target).parent.name == "vqvae":
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        IsicVQModel.from_pretrained(tmp_path)


def test_a_variant_and_other_weights_with_a_push_are_refused(composite, tmp_path):
    with pytest.raises(ValueError, match="variant is 'fp16'"):
        composite.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="state_dict and push_to_hub"):
        composite.save_pretrained(tmp_path, state_dict=composite.state_dict(), push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_may_be_saved(composite, tmp_path):
    weights = {name: tensor + 1 for name, tensor in composite.state_dict().items()}
    composite.save_pretrained(tmp_path, state_dict=weights)
    codebook = IsicVQModel.from_pretrained(tmp_path).vqvae.quantizer.codebook
    assert torch.equal(codebook, composite.vqvae.quantizer.codebook + 1)


def test_another_process_than_the_main_one_saves_nothing(composite, tmp_path):
    composite.save_pretrained(tmp_path / "folder", False)
    assert not (tmp_path / "folder").exists()
