import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import isic_vq
from isic_vq import IsicVQModel, PixelCNNConfig, PixelCNNModel, VQVAEConfig, VQVAEModel
from isic_vq.hub.pretrained import (
    DEFAULT_CHECKPOINT,
    KINDS,
    ModelError,
    default_checkpoint,
    load_model,
    resolve,
)

VQVAE = {"image_size": 8, "hidden_sizes": (4,), "num_residual_blocks": 0, "num_codes": 5, "code_dim": 2}
PRIOR = {
    "num_codes": 5,
    "grid_size": 4,
    "hidden_size": 4,
    "num_layers": 1,
    "head_size": 4,
    "first_kernel_size": 3,
}
CLASSES = {"vqvae": VQVAEModel, "prior": PixelCNNModel, "composite": IsicVQModel}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder per kind of model; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    vqvae, prior = VQVAEModel(VQVAEConfig(**VQVAE)), PixelCNNModel(PixelCNNConfig(**PRIOR))
    vqvae.save_pretrained(root / "vqvae")
    prior.save_pretrained(root / "prior")
    IsicVQModel.from_parts(vqvae, prior).save_pretrained(root / "composite")
    return root


@pytest.fixture
def copied(saved, tmp_path):
    """Folder of the tokenizer, to be damaged."""
    return shutil.copytree(saved / "vqvae", tmp_path / "vqvae")


def rewrite_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_opens_as_its_class_in_eval_mode(saved, kind):
    model = load_model(CLASSES[kind], str(saved / kind))
    assert type(model) is CLASSES[kind]
    assert not model.training


@pytest.mark.parametrize("kind", ["vqvae", "prior"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_part_opens_from_the_whole_and_from_its_subfolder(saved, kind, inside):
    folder = saved / "composite" / kind if inside else saved / "composite"
    opened, alone = load_model(CLASSES[kind], str(folder)), load_model(CLASSES[kind], str(saved / kind))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wanted", "found", "expected"),
    [
        ("vqvae", "prior", "isic_vqvae", "isic_pixelcnn"),
        ("prior", "vqvae", "isic_pixelcnn", "isic_vqvae"),
        ("vqvae", "composite", "isic_vqvae", "isic_vq"),
        ("prior", "composite", "isic_pixelcnn", "isic_vq"),
    ],
)
def test_a_checkpoint_of_another_class_is_refused_by_name(saved, kind, wanted, found, expected):
    text = f"{kind} is {KINDS[found]}: expected {KINDS[expected]}"
    with pytest.raises(ModelError, match=text):
        load_model(CLASSES[wanted], str(saved / kind))


def test_missing_tensors_are_refused_by_name(copied):
    rewrite_tensors(copied, lambda tensors: tensors.pop("quantizer.codebook"))
    text = r"not a whole isic_vqvae: it has 1 missing keys, such as \['quantizer.codebook'\]"
    with pytest.raises(ModelError, match=text):
        load_model(VQVAEModel, str(copied))


def test_foreign_tensors_are_refused_by_name(copied):
    rewrite_tensors(copied, lambda tensors: tensors.update({"discriminator.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"1 unexpected keys, such as \['discriminator.weight'\]"):
        load_model(VQVAEModel, str(copied))


def test_tensors_of_another_shape_are_refused(copied):
    rewrite_tensors(copied, lambda tensors: tensors.update({"quantizer.codebook": torch.zeros(6, 2)}))
    with pytest.raises(ModelError, match="vqvae cannot be read as a tokenizer"):
        load_model(VQVAEModel, str(copied))


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_truncated_weights_file_is_refused(copied, kept):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ModelError, match="vqvae cannot be read as a tokenizer: a weights file of .* is damaged"
    ):
        load_model(VQVAEModel, str(copied))


def test_a_folder_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match="cannot be read as a tokenizer: Error no file named model.safetensors"
    ):
        load_model(VQVAEModel, str(copied))


def test_a_whole_without_one_parts_weights_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved / "composite", tmp_path / "whole")
    (folder / "prior" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="whole cannot be read as a whole model.*prior/model.safetensors"):
        load_model(IsicVQModel, str(folder))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "vqvae/config.json is not JSON"),
        ("[]", "vqvae/config.json is not a JSON object"),
        ("{}", "vqvae is a None checkpoint: expected a tokenizer"),
        ('{"model_type": "isic_vq", "vqvae_config": null}', "vqvae is a whole model"),
        (
            '{"model_type": "isic_vqvae", "image_size": 9}',
            "image_size is 9: expected a positive multiple of 8",
        ),
        ('{"model_type": "isic_vqvae", "image_size": "9"}', "Field 'image_size' expected int, got str"),
    ],
)
def test_a_config_that_makes_no_tokenizer_is_refused(copied, config, text):
    (copied / "config.json").write_text(config)
    with pytest.raises(ModelError, match=text):
        load_model(VQVAEModel, str(copied))


# --- naming a model ------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is_called(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert resolve("vqvae") == "vqvae"


def test_a_hub_id_is_passed_on():
    assert resolve("some-user/isic-vq.128") == "some-user/isic-vq.128"


def test_a_hub_id_without_a_network_is_an_os_error():
    with pytest.raises(OSError, match="offline mode"):
        load_model(VQVAEModel, "some-user/isic-vq-128")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match="holds no config.json: expected a model folder, such as a run's model/"
    ):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["not there", "a/b/c", "./missing/folder", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name):
    with pytest.raises(ModelError, match="is neither a model folder nor a Hub id|holds no config.json"):
        resolve(name)


def test_a_file_is_no_model(saved):
    with pytest.raises(ModelError, match="model.safetensors is neither a model folder nor a Hub id"):
        resolve(str(saved / "vqvae" / "model.safetensors"))


# --- the shipped checkpoint ----------------------------------------------------------------------------------------


def lay_out(site, checkpoints):
    """Copy the modules that find checkpoints to `site`, and a checkpoint to `checkpoints`."""
    source = Path(isic_vq.__file__).parent
    (site / "isic_vq" / "hub").mkdir(parents=True)
    for name in ("__init__.py", "hub/__init__.py", "hub/pretrained.py", "hub/registration.py"):
        shutil.copy(source / name, site / "isic_vq" / name)
    if checkpoints is not None:
        (checkpoints / DEFAULT_CHECKPOINT).mkdir(parents=True)
        (checkpoints / DEFAULT_CHECKPOINT / "config.json").write_text(json.dumps({"model_type": "isic_vq"}))


def default_checkpoint_of(site):
    script = "import isic_vq.hub.pretrained as hub; print(hub.__file__); print(hub.default_checkpoint())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert str(site) in done.stdout or "ModelError" in done.stderr, (
        "premise: the copied package is the one that ran"
    )
    return done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr


def test_default_checkpoint_of_a_clone_lies_in_model_cards(tmp_path):
    lay_out(tmp_path / "src", tmp_path / "model_cards")
    assert default_checkpoint_of(tmp_path / "src") == str(tmp_path / "model_cards" / DEFAULT_CHECKPOINT)


def test_default_checkpoint_of_a_wheel_lies_in_the_package(tmp_path):
    site = tmp_path / "lib" / "site-packages"
    lay_out(site, site / "isic_vq" / "checkpoints")
    assert default_checkpoint_of(site) == str(site / "isic_vq" / "checkpoints" / DEFAULT_CHECKPOINT)


def test_an_installation_without_a_checkpoint_says_so(tmp_path):
    lay_out(tmp_path / "src", None)
    assert f"the checkpoint {DEFAULT_CHECKPOINT} is not part of this installation: name a model" in (
        default_checkpoint_of(tmp_path / "src")
    )


def test_wheel_and_resolver_agree_on_where_the_checkpoint_goes():
    import tomllib

    root = Path(__file__).parents[1]
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    assert included == {f"model_cards/{DEFAULT_CHECKPOINT}": f"isic_vq/checkpoints/{DEFAULT_CHECKPOINT}"}


def test_no_name_means_the_shipped_checkpoint():
    try:
        expected = str(default_checkpoint())
    except ModelError:
        with pytest.raises(ModelError, match="is not part of this installation"):
            resolve(None)
    else:
        assert resolve(None) == expected
