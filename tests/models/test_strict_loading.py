"""Weights that are not exactly the model's are refused, whoever loads them."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from isic_vq import IsicVQModel, PixelCNNModel, VQVAEModel

PART_OF = {VQVAEModel: "vqvae", PixelCNNModel: "prior"}
OPENERS = [IsicVQModel.from_pretrained, AutoModel.from_pretrained]


@pytest.fixture
def damaged(composite_folder, tmp_path):
    """Change the tensors of a part of a copied folder."""
    folder = shutil.copytree(composite_folder, tmp_path / "copy")

    def change(part, edit):
        path = folder / part / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return change


@pytest.mark.parametrize("load", OPENERS)
def test_a_foreign_tensor_is_refused_by_name(damaged, load):
    folder = damaged("prior", lambda tensors: tensors.update({"prior.junk": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"1 unexpected keys, such as \['prior.junk'\]"):
        load(folder)


@pytest.mark.parametrize("load", OPENERS)
def test_a_missing_tensor_is_refused_by_name(damaged, load):
    folder = damaged("vqvae", lambda tensors: tensors.pop("vqvae.quantizer.codebook"))
    with pytest.raises((ValueError, OSError), match="codebook"):
        load(folder)


@pytest.mark.parametrize("model_class", PART_OF)
def test_a_part_refuses_what_is_wrong_in_its_own_file(damaged, model_class):
    part = PART_OF[model_class]
    folder = damaged(part, lambda tensors: tensors.update({f"{part}.junk": torch.zeros(2)}))
    with pytest.raises(ValueError, match=f"{part}.junk"):
        model_class.from_pretrained(folder, subfolder=part)


def test_who_asks_for_the_loading_info_judges_for_themselves(damaged):
    folder = damaged("prior", lambda tensors: tensors.update({"prior.junk": torch.zeros(2)}))
    model, info = IsicVQModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, IsicVQModel)
    assert set(info["unexpected_keys"]) == {"prior.junk"}


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_truncated_file_is_one_error_that_says_what_to_do(composite_folder, tmp_path, kept):
    folder = shutil.copytree(composite_folder, tmp_path / "copy")
    path = folder / "prior" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(OSError, match="a weights file of .*copy is damaged .*: download it again"):
        IsicVQModel.from_pretrained(folder)


def test_settings_of_from_pretrained_are_passed_on(composite_folder):
    model = IsicVQModel.from_pretrained(composite_folder, dtype=torch.float64)
    assert model.dtype == torch.float64


@pytest.mark.parametrize("load", OPENERS)
def test_classes_that_are_not_the_weights_are_refused_by_name(composite_folder, load):
    """transformers would put them in the composite's config, where nothing reads them."""
    for settings in ({"id2label": {0: "a", 1: "b"}}, {"label2id": {"a": 0}}, {"num_labels": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is given: .*prior_config.id2label"):
            load(composite_folder, **settings)


def test_classes_can_be_renamed_after_loading(composite_folder, tmp_path):
    model = IsicVQModel.from_pretrained(composite_folder)
    names = {index: f"class {index}" for index in model.config.class_names}
    model.config.prior_config.id2label = names
    model.save_pretrained(tmp_path)
    reopened = IsicVQModel.from_pretrained(tmp_path)
    assert reopened.config.class_names == names
    assert reopened.generate(1, "class 1", seed=0).labels.tolist() == [1]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_saved_weights_have_the_mode_that_the_umask_gives(composite, var_composite, tmp_path, mask):
    old = os.umask(mask)
    try:
        for number, model in enumerate((composite, composite.vqvae, composite.prior, var_composite.prior)):
            model.save_pretrained(tmp_path / str(number))
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
