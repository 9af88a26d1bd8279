"""The page of an evaluation: every number of the report, text that cannot become code, pictures that are there."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import rounded
from isic_vq.figures.png import png_content
from isic_vq.figures.report_page import PICTURES, Plot, write_report_page

HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags with their attributes, and the cells of all tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
        self._open = tag in ("td", "th", "span") and bool(self.cells)

    def handle_data(self, data):
        if self._open and self.cells:
            self.cells[-1] += f" {data.strip()}"

    def pictures(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def evaluation_report():
    """Two data sets, one of which was named by somebody who means harm."""
    test = MeasuredOn("test", "folder:a")
    metrics = [
        Metric("psnr", 31.25, "dB", 40, "test", "folder:a", None, [31.0, 31.5]),
        Metric("psnr", 29.5, "dB", 30, HOSTILE, "folder:b"),
        Metric("bits_per_code", 5.125, "bits per code", 40, "test", "folder:a", 0, [5.0, 5.25]),
        *(
            test.metric(
                "octave_power", value, "squared grey levels", 40, images=kind, octave=f"{low}-{2 * low} px"
            )
            for kind, values in (("real", (8.0, 16.0)), ("samples", (2.0, 0)))
            for low, value in zip((2, 4), values, strict=True)
        ),
        MeasuredOn("model", "model").metric("parameters", 1234567, "parameters", 1, part="vqvae"),
        *(
            test.metric("psnr", value, "dB", 20, None, [value - 1, value + 1], sex=sex)
            for sex, value in ((HOSTILE, 30.0), ("male", 32.5))
        ),
    ]
    counts = {"nevus": [3, 0, 5, 1], "melanoma": [1, 2, 0, 4]}
    return Report({"name": HOSTILE}, metrics, {"test": {"codebook_counts_by_diagnosis": counts}})


def atlas():
    caption = "what codes draw"
    content = png_content(np.full((20, 30, 3), 90, np.uint8), {"Comment": caption})
    return Plot(PICTURES, "atlas", caption, content, pixels=True)


@pytest.fixture
def page(tmp_path):
    picture = atlas()
    written = write_report_page(evaluation_report(), tmp_path / "out" / "report.html", [picture])
    return tmp_path / "out", written


def test_every_number_of_whole_sets_is_in_a_cell_with_its_interval_and_seed(page):
    cells = [re.sub(r"\s+", " ", cell).strip() for cell in Page((page[0] / "report.html").read_text()).cells]
    for metric in evaluation_report().metrics:
        if metric.group is None:
            parts = [text for text in rounded(metric) if text is not None]
            parts += [f"seed {metric.seed}"] if metric.seed is not None else []
            assert " ".join(parts) in cells
    assert "test (n = 40)" in cells


def test_names_of_anybody_stay_text(page):
    text = (page[0] / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not any(
        tag == "script" or any(name.startswith("on") for name in of) for tag, of in Page(text).tags
    )


def test_pictures_lie_beside_the_page_and_nothing_comes_from_elsewhere(page):
    folder, written = page
    text = (folder / "report.html").read_text()
    pictures = Page(text).pictures()
    assert sorted(folder / name for name in pictures) == sorted(written[1:])
    assert len(pictures) == 4, "plots of parts, of spectra and of codes, and the picture"
    for path in written[1:]:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 0 or path.name == "atlas.png"
    assert not re.search(r"https?:|//|url\(|@import", text)


def test_the_same_report_gives_the_same_bytes(page, tmp_path):
    picture = atlas()
    again = write_report_page(evaluation_report(), tmp_path / "again" / "report.html", [picture])
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in page[1]]


# From the command


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "eye"
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        layer_type="basic",
        id2label={0: "nevus", 1: "melanoma"},
    )
    ResNetForImageClassification(config).eval().save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_run, classifier):
    """`isic-vq evaluate` with everything on: 40 synthetic images against 200 others."""
    folder = tmp_path_factory.mktemp("evaluated")
    command = [
        *(
            "evaluate",
            tiny_run.prior / "model",
            "--data",
            "test=synthetic:40:5",
            "--data",
            "other=synthetic:12:6",
        ),
        *(
            "--train-codes",
            tiny_run.codes["train"],
            "--features",
            classifier,
            "--floor-data",
            "synthetic:400:7",
        ),
        *("--out", folder / "report.json", "--gallery", folder / "gallery"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "isic_vq", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_evaluate_measures_reconstruction_codebook_likelihood_generation_and_cost(evaluated):
    folder, stdout = evaluated
    report = Report.load(folder / "report.json")
    names = {(metric.text, metric.split) for metric in report.metrics}
    for name in ("psnr", "ssim", "perplexity", "bits_per_code", "bits_per_code_unigram", "conditioning_gain"):
        assert {(name, "test"), (name, "other")} <= names
    assert ("bits_per_code", "train") in names
    kinds = ("floor", "reconstructions", "disturbed", "samples")
    for name in ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"):
        found = [m for kind in kinds for m in report.metrics if m.text == f"{name}[{kind}, eye]"]
        assert [m.n for m in found] == [40] * 4
        assert all(m.interval is not None and m.seed == 0 for m in found)
    for kind in ("real", "reconstructions", "samples"):
        assert {(f"texture[{kind}]", "test"), (f"grid_power_median[{kind}, 4 px]", "test")} <= names
    assert (folder / "report-figures" / "spectrum-test.png").exists()
    assert ("parameters[prior]", "model") in names
    assert report.tables["generation"]["others"] == "synthetic:400:7"
    assert f"wrote {folder / 'report.json'}\nwrote {folder / 'report.html'}\n" in stdout
    assert {path.name for path in (folder / "gallery").iterdir()} == {"worst-test.png", "worst-other.png"}
    with Image.open(folder / "gallery" / "worst-test.png") as picture:
        assert "source images, not generated ones" in picture.info["Comment"]
    assert not any("worst" in path.name for path in (folder / "report-figures").iterdir())


def test_generated_images_are_compared_by_a_model_and_beside_others_or_not_at_all(
    run, tiny_run, classifier, tmp_path
):
    options = ("evaluate", tiny_run.prior / "model", "--data", "synthetic:20:5", "-o", tmp_path / "a.json")
    for more in (("--features", classifier), ("--floor-data", "synthetic:50:7")):
        code, _, err = run(*options, *more)
        assert code == 1
        assert "give both, --features and --floor-data, or neither" in err
    assert not (tmp_path / "a.json").exists()


def test_without_torchvision_lpips_says_what_to_install(run, tiny_run, tmp_path):
    try:
        import torchvision  # noqa: F401

        pytest.skip("torchvision is installed")
    except ModuleNotFoundError:
        pass
    code, _, err = run(
        "evaluate", tiny_run.prior / "model", "--data", "synthetic:20:5", "--lpips", "-o", tmp_path / "a.json"
    )
    assert code == 1
    assert "pip install 'isic-vq[lpips]'" in err


@pytest.mark.slow
def test_the_page_opens_in_a_browser_without_errors_at_any_width(evaluated):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason='pip install "isic-vq[dev]" for playwright'
    )
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium: install it, or set CHROMIUM to its path")
    errors, addresses = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width in (1280, 390):
            view = browser.new_page(viewport={"width": width, "height": 800})
            view.on("console", lambda message: errors.append(message.text))
            view.on("pageerror", lambda error: errors.append(str(error)))
            view.on("request", lambda request: addresses.append(request.url))
            view.goto((evaluated[0] / "report.html").as_uri())
            assert view.evaluate(
                "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
            )
            assert view.evaluate("document.images.length") >= 2
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            assert view.get_by_role("heading", name="Generated images").is_visible()
        browser.close()
    assert errors == []
    assert all(address.startswith("file:") for address in addresses)
