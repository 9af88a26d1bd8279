"""The commands on files: what goes in comes out, and what is wrong is said in one line."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from isic_vq.codec.codec import compress
from isic_vq.codec.container import Block, read_container, write_container
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def nested_images(image_folder):
    """The sixteen images, four of them in a folder below."""
    (image_folder / "metadata.csv").unlink()
    (image_folder / "below").mkdir()
    for index in range(4):
        shutil.move(image_folder / f"{index:03d}.png", image_folder / "below")
    return image_folder


@pytest.mark.parametrize("options", [[], ["--portable"], ["--label", "melanoma"]], ids=str)
def test_a_folder_comes_back_as_the_reconstructions_of_its_images(
    nested_images, model, model_folder, tmp_path, run, options
):
    file, out = tmp_path / "images.ivq", tmp_path / "out"
    code, stdout, stderr = run("compress", nested_images, file, "-m", model_folder, *options)
    assert code == 0, stderr
    size = file.stat().st_size
    assert f"wrote 16 images in 1 blocks to {file}: {size:,} bytes, {size / 16:.1f} per image" in stdout
    code, stdout, stderr = run("decompress", file, out, "-m", model_folder)
    assert code == 0, stderr
    assert f"wrote 16 images to {out}; 1 of 1 blocks are intact\n{size / 16:.1f} bytes per image" in stdout
    expected = sorted(path.relative_to(nested_images) for path in nested_images.rglob("*.png"))
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == expected
    processor = IsicVQImageProcessor(size=16)
    for name in expected[:6]:
        pixels = processor(str(nested_images / name), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            (picture,) = processor.postprocess(model.decode(model.encode(pixels)), output_type="np")
        found = np.asarray(Image.open(out / name), dtype=int)
        assert np.abs(found - picture).max() <= 1, name


def test_a_portable_file_says_so_in_its_header(nested_images, model_folder, tmp_path, run):
    run("compress", nested_images, tmp_path / "a.ivq", "-m", model_folder, "--portable")
    settings, entries, _ = read_container((tmp_path / "a.ivq").read_bytes())
    assert settings.layout is None
    assert {entry.coder for entry in entries} == {"static"}


def test_images_of_a_uri_are_named_by_their_ids(model_folder, tmp_path, run):
    code, _, stderr = run("compress", "synthetic:3:0", tmp_path / "a.ivq", "-m", model_folder)
    assert code == 0, stderr
    _, _, (block,) = read_container((tmp_path / "a.ivq").read_bytes())
    assert len(set(block.names)) == 3
    assert run("decompress", tmp_path / "a.ivq", tmp_path / "out", "-m", model_folder)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.png" for name in block.names}


def test_a_damaged_file_gives_its_intact_images_and_an_error(
    model, model_folder, codes, names, tmp_path, run
):
    file = compress(model, codes, names, lanes=4)
    content = bytearray(file.content)
    content[file.content.index(read_container(file.content)[2][0].payload)] ^= 1
    (tmp_path / "a.ivq").write_bytes(content)
    code, stdout, stderr = run("decompress", tmp_path / "a.ivq", tmp_path / "out", "-m", model_folder)
    assert code == 1
    assert "wrote 7 images" in stdout
    assert "2 of 3 blocks are intact" in stdout
    assert stderr.startswith(
        "error: a.ivq is damaged, and the images of these blocks are lost: block 1 of 3 (images 1 to 4)"
    )
    assert len(list((tmp_path / "out").rglob("*.png"))) == 7


def test_a_file_whose_names_lead_elsewhere_writes_nothing(model, model_folder, codes, names, tmp_path, run):
    settings, _, (block,) = read_container(compress(model, codes, names).content)
    evil = Block(["../evil", *block.names[1:]], block.coder, block.payload, block.codes_crc)
    (tmp_path / "a.ivq").write_bytes(write_container(settings, [evil]))
    before = set(tmp_path.rglob("*"))
    code, _, stderr = run("decompress", tmp_path / "a.ivq", tmp_path / "out", "-m", model_folder)
    assert code == 1
    assert "'../evil'" in stderr
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_without_images_is_refused(model_folder, tmp_path, run):
    (tmp_path / "empty").mkdir()
    code, _, stderr = run("compress", tmp_path / "empty", tmp_path / "a.ivq", "-m", model_folder)
    assert code == 1
    assert "No images in the folder" in stderr
    assert not (tmp_path / "a.ivq").exists()


def test_a_corrupt_image_is_named_and_left_out_if_so_many_may_be(nested_images, model_folder, tmp_path, run):
    (nested_images / "007.png").write_bytes(b"no image")
    arguments = ("compress", nested_images, tmp_path / "a.ivq", "-m", model_folder)
    code, _, stderr = run(*arguments)
    assert code == 1
    assert "1 of 16 images are corrupt" in stderr
    assert not (tmp_path / "a.ivq").exists()
    assert run(*arguments, "--max-corrupt-share", "0.1")[0] == 0
    _, _, (block,) = read_container((tmp_path / "a.ivq").read_bytes())
    assert len(block.names) == 15
    assert "007.png" not in block.names
    assert "008.png" in block.names


def test_another_file_is_refused(model_folder, tmp_path, run):
    (tmp_path / "a.ivq").write_bytes(b"something else")
    code, _, stderr = run("decompress", tmp_path / "a.ivq", tmp_path / "out", "-m", model_folder)
    assert code == 1
    assert "not an .ivq file" in stderr


def test_a_failed_run_leaves_the_old_file_as_it_was(model_folder, tmp_path, run):
    (tmp_path / "a.ivq").write_bytes(b"old")
    code, _, stderr = run(
        "compress", "synthetic:3:0", tmp_path / "a.ivq", "-m", model_folder, "--label", "flu"
    )
    assert code == 1
    assert "flu" in stderr
    assert (tmp_path / "a.ivq").read_bytes() == b"old"


@pytest.mark.slow
def test_a_processor_without_vector_instructions_never_gives_other_images(model_folder, tmp_path, run):
    """It rounds otherwise, as another machine does: it may read the file alike or refuse it, and nothing else."""
    file = tmp_path / "a.ivq"
    assert run("compress", "synthetic:5:0", file, "-m", model_folder)[0] == 0
    assert run("decompress", file, tmp_path / "here", "-m", model_folder)[0] == 0
    done = subprocess.run(
        [sys.executable, "-m", "isic_vq", "decompress", file, tmp_path / "there", "-m", model_folder],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 1:
        assert "--portable" in done.stderr
        assert not (tmp_path / "there").exists()
        return
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "here").iterdir():
        here, there = (
            np.asarray(Image.open(folder / path.name), dtype=int)
            for folder in (path.parent, tmp_path / "there")
        )
        assert np.abs(here - there).max() <= 1
