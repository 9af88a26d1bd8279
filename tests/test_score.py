"""The commands `score` and `ood` on a tiny run, the pictures they draw."""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isic_vq.data.synthetic_images import synthetic_image
from isic_vq.evaluation.report import Report
from isic_vq.evaluation.scores import SCORES
from isic_vq.figures.score_plots import Gallery
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "examples" / "reports" / "ood-isic-vq-128.json"


@pytest.fixture
def score(tiny_run, tmp_path, run):
    """Score what is named, with the tiny model, into tmp_path / "out"; returns the rows of the table."""

    def invoke(data, *options):
        code, stdout, stderr = run(
            "score", data, "-m", tiny_run.prior / "model", "-o", tmp_path / "out", *options
        )
        assert code == 0, stderr
        rows = read_table(tmp_path / "out" / "scores.csv")
        assert stdout.startswith(f"{len(rows)} images: ")
        return rows

    return invoke


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# score


def test_the_table_holds_what_the_model_says_of_each_image(score, tiny_run):
    rows = score(tiny_run.images["validation"], "--limit", 0)
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    paths = sorted(tiny_run.images["validation"].glob("*.png"))
    images = IsicVQImageProcessor(size=16)(paths, return_tensors="pt")["pixel_values"]
    expected = model.score(images).bits_per_code
    assert [row["name"] for row in rows] == [f"SYNTHETIC_1_{index:07d}" for index in range(16)]
    assert {row["label"] for row in rows} == {"unconditional"}
    for row, bits in zip(rows, expected.tolist(), strict=True):
        assert float(row["bits_per_code"]) == pytest.approx(bits, rel=1e-6)
        assert float(row["bits_per_pixel"]) == pytest.approx(bits / 16, rel=1e-6)
    assert "typicality" not in rows[0]


def test_training_codes_add_two_scores(score, tiny_run):
    rows = score(f"folder:{tiny_run.images['train']}", "--train-codes", tiny_run.codes["train"], "--limit", 0)
    assert list(rows[0]) == ["name", "label", *SCORES, "bits_per_pixel"]
    bits = np.array([float(row["bits_per_code"]) for row in rows])
    typicality = np.array([float(row["typicality"]) for row in rows])
    np.testing.assert_allclose(typicality, np.abs(bits - bits.mean()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("option", "label"),
    [(["--label", "mel"], "melanoma"), (["--marginalize"], "marginal")],
    ids=["label", "marginal"],
)
def test_the_label_that_was_used_is_in_the_table(score, tiny_run, option, label):
    rows = score(tiny_run.images["validation"], "--limit", 0, *option)
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    path = sorted(tiny_run.images["validation"].glob("*.png"))[0]
    pixels = IsicVQImageProcessor(size=16)(path, return_tensors="pt")["pixel_values"]
    settings = {"marginalize": True} if label == "marginal" else {"labels": label}
    assert {row["label"] for row in rows} == {label}
    assert float(rows[0]["bits_per_code"]) == pytest.approx(
        model.score(pixels, **settings).bits_per_code.item(), rel=1e-5
    )


def test_heat_maps_of_the_first_images_and_an_overview_are_written(score, tiny_run, tmp_path):
    score(tiny_run.images["validation"], "--limit", 2)
    assert files(tmp_path / "out") == ["heat-00000.png", "heat-00001.png", "overview.png", "scores.csv"]
    for path in (tmp_path / "out").glob("*.png"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_one_file_has_a_row_and_a_heat_map_but_no_overview(score, tmp_path):
    synthetic_image(0, seed=0).save(tmp_path / "mole $x_1.jpg")
    (row,) = score(tmp_path / "mole $x_1.jpg")
    assert row["name"] == "mole $x_1.jpg"
    assert files(tmp_path / "out") == ["heat-00000.png", "scores.csv"]


def test_the_same_command_writes_the_same_bytes(score, tiny_run, tmp_path):
    contents = []
    for _ in range(2):
        score(tiny_run.images["validation"], "--limit", 1)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]


def test_corrupt_images_are_skipped_named_and_counted(score, run, tiny_run, tmp_path, caplog):
    images = shutil.copytree(tiny_run.images["train"], tmp_path / "images")
    (images / "003.png").write_text("this is no image")
    rows = score(images, "--limit", 0, "--max-corrupt-share", 0.1)
    assert len(rows) == 15
    assert "SYNTHETIC_0_0000003" not in {row["name"] for row in rows}
    assert "Skipped a corrupt image: SYNTHETIC_0_0000003" in caplog.text
    shutil.rmtree(tmp_path / "out")
    code, _, stderr = run("score", images, "-m", tiny_run.prior / "model", "-o", tmp_path / "out")
    assert (code, "1 of 16 images are corrupt" in stderr) == (1, True)
    assert not (tmp_path / "out").exists(), "nothing is written of a source that failed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "mel", "--marginalize"], "labels and marginalize are both given"),
        (["--label", "mellanoma"], "label 'mellanoma' is not a class of this model"),
        (["--train-codes", "missing.parquet"], "missing.parquet is not a file"),
    ],
)
def test_settings_without_a_meaning_are_refused(run, tiny_run, tmp_path, options, message):
    data, output = tiny_run.images["train"], tmp_path / "out"
    code, _, stderr = run("score", data, "-m", tiny_run.prior / "model", "-o", output, *options)
    assert code == 1
    assert message in stderr
    assert not output.exists()


def test_a_source_without_a_readable_image_is_refused(run, tiny_run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("this is no image")
    options = ["-m", tiny_run.prior / "model", "-o", tmp_path / "out", "--max-corrupt-share", 1]
    code, _, stderr = run("score", tmp_path / "images", *options)
    assert (code, "images holds no readable image" in stderr) == (1, True)


def test_pictures_need_matplotlib_and_the_table_does_not(run, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = [tiny_run.images["train"], "-m", tiny_run.prior / "model", "-o", tmp_path / "out"]
    code, _, stderr = run("score", *options)
    assert (code, "pip install 'isic-vq[figures]'" in stderr) == (1, True)
    assert run("score", *options, "--limit", 0)[0] == 0


def test_the_gallery_keeps_the_first_and_the_extremes():
    bits = torch.randperm(40).double()
    gallery = Gallery(num_codes=8, limit=3)
    for index, value in enumerate(bits.tolist()):
        gallery.add(f"image {index}", np.zeros((4, 4, 3), np.uint8), np.full((2, 2), value), value)
    assert [shown.name for shown in gallery.first] == ["image 0", "image 1", "image 2"]
    assert [shown.bits_per_code for shown in gallery.likely] == list(range(8))
    assert [shown.bits_per_code for shown in gallery.unlikely] == list(range(39, 31, -1))


# ood


def test_ood_writes_its_report_and_the_histograms_beside_it(run, tiny_run, tmp_path):
    output = tmp_path / "reports" / "ood.json"
    options = [tiny_run.prior / "model", "--train-codes", tiny_run.codes["train"], "-o", output]
    data = f"test=folder:{tiny_run.images['validation']}"
    code, stdout, stderr = run("evaluate", "--only", "ood", "--data", data, *options, "--limit", 5)
    assert code == 0, stderr
    assert files(tmp_path / "reports") == ["ood.json", "ood.png"]
    report = Report.load(output)
    assert {metric.n for metric in report.metrics if metric.text.startswith("auroc[bits")} == {10, 35}
    assert {metric.split for metric in report.metrics} == {"train", "test"}
    assert "auroc[complexity_corrected, non_skin]" in stdout
    with Image.open(tmp_path / "reports" / "ood.png") as picture:
        assert picture.width > 1000
