"""No command runs code that lies in a file that it reads: a pickle is planted in each of them, one after the other."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from planted import Planted, plant

CODE = {"modeling_isic_vq.py", "pipeline.py"}  # of a repository's code files, those that stand for all


@pytest.fixture
def places(tiny_run, tmp_path):
    """Copies of a model, images and codes, for commands that read them."""
    return {
        "model": Path(shutil.copytree(tiny_run.prior / "model", tmp_path / "model")),
        "images": Path(shutil.copytree(tiny_run.images["train"], tmp_path / "images")),
        "codes": Path(shutil.copytree(tiny_run.codes["train"].parent, tmp_path / "codes", ignore=shutil.ignore_patterns(
            "vqvae", "prior", "train", "validation"
        ))),
    }  # fmt: skip


def files_of(folder):
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.suffix != ".py" or path.name in CODE)
    ]


def commands(places, output):
    model, images, codes = places["model"], f"folder:{places['images']}", places["codes"] / "train.parquet"
    return {
        "generate": ["generate", "-m", model, "-n", 1, "-o", output],
        "encode": ["encode", model, "--data", images, "-o", output / "codes.parquet", "--views", 1],
        "evaluate": [
            "evaluate",
            model,
            "--data",
            images,
            "--train-codes",
            codes,
            "-o",
            output / "report.json",
        ],
        "export": ["export", model, output / "exported", "--train-codes", codes],
        "info": ["info", model],
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "encode", "evaluate", "export", "info"])
def test_no_file_that_a_command_reads_runs_code(run, places, tmp_path, command):
    marker, failed = tmp_path / "ran", []
    assert run(*commands(places, tmp_path / "sound")[command])[0] == 0, "premise: it works"
    targets = files_of(places["model"]) + [
        places["codes"] / "train.parquet",
        places["images"] / "metadata.csv",
    ]
    targets.append(places["images"] / "000.png")
    for number, path in enumerate(targets):
        sound = path.read_bytes()
        plant(path, marker)
        code, _, stderr = run(*commands(places, tmp_path / str(number))[command])
        path.write_bytes(sound)
        assert not marker.exists(), f"{path} ran code"
        assert "Traceback" not in stderr
        if code:
            failed.append(path.name)
            assert len([line for line in stderr.splitlines() if line.startswith("error: ")]) == 1, stderr
    assert "config.json" in failed, "premise: what is read and damaged is said"


def test_weights_as_a_pickle_are_not_run_either(run, tiny_run, tmp_path):
    """transformers reads `pytorch_model.bin` where there are no safetensors."""
    marker = tmp_path / "ran"
    for part in ("", "vqvae", "prior"):
        model = Path(shutil.copytree(tiny_run.prior / "model", tmp_path / f"model-{part}"))
        for path in model.rglob("*.safetensors*"):
            path.unlink()
        torch.save({"state": Planted(marker)}, model / part / "pytorch_model.bin")
        with zipfile.ZipFile(model / part / "pytorch_model.bin") as file:
            assert any(name.endswith("data.pkl") for name in file.namelist()), "premise: a pickle"
        code, _, stderr = run("generate", "-m", model, "-n", 1, "-o", tmp_path / "out")
        assert (code, marker.exists()) == (1, False)
        assert "Traceback" not in stderr
        assert "safetensors" in stderr
