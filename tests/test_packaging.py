"""The wheel carries the shipped checkpoint, and the resolver finds it there and in a clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from isic_vq.hub.pretrained import DEFAULT_CHECKPOINT, default_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MAX_CHECKPOINT_BYTES = 13_000_000
MAX_TRACKED_WEIGHTS_BYTES = 30_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_clone_resolves_the_default_checkpoint_to_model_cards():
    assert default_checkpoint() == ROOT / "model_cards" / DEFAULT_CHECKPOINT


@pytest.mark.slow
def test_the_wheel_holds_the_checkpoint_byte_for_byte(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for part in ("vqvae", "prior"):
            name = f"{part}/model.safetensors"
            shipped = archive.read(f"isic_vq/checkpoints/{DEFAULT_CHECKPOINT}/{name}")
            assert shipped == (default_checkpoint() / name).read_bytes()


@pytest.mark.slow
def test_the_wheel_states_both_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0 AND CC-BY-NC-4.0" in text
    assert "License-File: LICENSE-WEIGHTS" in text


@pytest.mark.slow
def test_an_installed_wheel_resolves_to_the_checkpoint_inside_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from isic_vq.hub.pretrained import default_checkpoint; print(default_checkpoint())"
    # -S -E keeps the editable install out; hub/pretrained.py needs the standard library only.
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert Path(done.stdout.strip()) == tmp_path / "isic_vq" / "checkpoints" / DEFAULT_CHECKPOINT


def test_the_checkpoints_are_small_enough_to_ship():
    for index in (ROOT / "model_cards").glob("*/model_index.json"):
        weights = list(index.parent.rglob("*.safetensors"))
        assert 0 < sum(path.stat().st_size for path in weights) <= MAX_CHECKPOINT_BYTES
    every = list((ROOT / "model_cards").rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in every) <= MAX_TRACKED_WEIGHTS_BYTES


OF_EXTRAS = (
    *("accelerate", "constriction", "datasets", "diffusers", "gradio", "imagehash", "jinja2", "matplotlib"),
    *("numba", "onnx", "onnxruntime", "pandas", "psutil", "pyarrow", "scipy", "sklearn", "torchmetrics"),
)


def test_generate_and_edit_need_no_extra(tiny_run, tmp_path):
    model = str(tiny_run.prior / "model")
    commands = [
        ["generate", "-m", model, "-n", "2", "-o", str(tmp_path)],
        ["generate", "-m", model, "-n", "2", "-o", str(tmp_path)],  # a folder that holds images
        ["edit", str(tmp_path / "grid.png"), "-m", model, "--lower-half", "-o", str(tmp_path / "edited")],
    ]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OF_EXTRAS}))  # an import of them fails
from isic_vq import cli
for command in {commands}:
    sys.argv = ["isic-vq", *command]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()
