"""What the documentation says of results is what the reports say, and its links lead somewhere."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from isic_vq.evaluation.report import Metric, Report
from isic_vq.hub.card import read_reports
from isic_vq.models.configuration_isic_vq import IsicVQConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STUDIES = sorted(path.name for path in (ROOT / "docs" / "studies").iterdir())


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_stands_between_marks_is_what_the_reports_say(build):
    for (name, mark), section in build.sections().items():
        assert build.marked((ROOT / name).read_text(), mark)[1].strip() == section, (
            f"run docs/build.py: {name}, {mark}"
        )


def test_the_commands_page_is_current(build):
    assert (ROOT / "docs" / "cli.md").read_text() == build.cli_page(), "run docs/build.py"


def test_the_picture_of_classes_shows_the_checkpoints_previews(build):
    with Image.open(ROOT / "docs" / "classes.png") as picture:
        assert np.array_equal(picture, build.class_picture(build.CHECKPOINT)), "run docs/build.py"


def test_blurred_images_look_more_likely_as_the_page_says(build):
    blur = Report.load(build.UNUSUAL_REPORT).value("auroc", score="bits_per_code", images="blur")
    assert blur < 0.5
    page = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    assert re.search(rf"blurred images.*{blur:.2f}", page)


def test_the_readme_has_the_models_classes_and_true_badges(build):
    text = (ROOT / "README.md").read_text()
    config = IsicVQConfig.from_pretrained(build.CHECKPOINT)
    listed = re.search(r"^Classes: (.+?)\.$", text, re.MULTILINE | re.DOTALL).group(1)
    assert re.findall(r"`(\w+)`", listed) == list(config.prior_config.id2label.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, code, weights = re.findall(r"shields\.io/badge/([^)\s]+)-\w+\)", text)
    assert unquote(python) == f"python-{project['requires-python'].removeprefix('>=')}+"
    badges = [
        unquote(badge).partition("-")[2].replace("--", "-").replace(" ", "-") for badge in (code, weights)
    ]
    assert " AND ".join(badges) == project["license"]


def test_the_readme_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "README.md").read_text()
    table = text.partition("| extra | adds |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert named == set(project["optional-dependencies"])


def test_the_card_links_the_comparison_of_the_next_scale_page(build):
    comparison = (build.VAR_CHECKPOINT / build.COMPARISON).read_text().strip()
    assert build.next_scale_section().startswith(comparison)
    assert f"]({build.COMPARISON})" in (build.VAR_CHECKPOINT / "README.md").read_text()


def test_the_comparison_names_a_winner_only_where_the_intervals_are_apart(build):
    def metric(value, half):
        return Metric("m", value, "dB", 2, "s", "d", interval=[float(value - half), float(value + half)])

    assert build.better((metric(30, 1), metric(33, 1)), most=True) == "PixelCNN"
    assert build.better((metric(30, 1), metric(33, 1)), most=False) == "VAR"
    assert build.better((metric(30, 1), metric(31, 1)), most=True) == "intervals overlap"


def test_a_var_is_five_times_as_fast_as_a_transformer_in_raster_order(build):
    races = {race["batch"]: race for race in json.loads(build.NEXT_SCALE_REPORT.read_text())["races"]}
    assert races[1]["figures"]["codes: VAR over raster transformer"]["median"] >= 5


def test_the_results_are_the_reports(build):
    reports = read_reports(build.CHECKPOINT)
    plots = [plot for report in reports.values() for plot in build.report_plots(report)]
    assert (ROOT / "docs" / "results.md").read_text() == build.results_page(reports, plots)
    assert {f"{plot.name}.png" for plot in plots} == {
        path.name for path in (ROOT / "docs" / "figures").iterdir()
    }


def test_the_utility_page_says_what_its_reports_found():
    rows = {}
    for site in ("ham10000", "rosendahl", "rosendahl-seen"):
        report = Report.load(ROOT / "docs" / "utility" / f"{site}.json")
        assert report.model["smoke"] is False
        rows |= {(site, row["test"], row["real"], row["name"]): row for row in report.tables["comparisons"]}
    verdicts = {key: row["verdict"] for key, row in rows.items()}

    def found(site, test, real, kind, ratios):
        return {verdicts[site, test, real, f"{kind} {ratio}:1"] for ratio in ratios}

    assert {key for key, row in rows.items() if row["added"] == "noise" and row["verdict"] == "gain"} == set()
    assert found("ham10000", "validation", 200, "same mix", (3, 10)) == {"gain"}
    assert found("ham10000", "uda1", 50, "same mix", (3, 10)) == {"gain"}
    for test in ("validation", "uda1"):
        for real in (50, 200):
            assert rows["ham10000", test, real, "held-out real images 10:1"]["interval"][0] > 0
    nothing = {key[2] for key in rows if key[0] == "ham10000"} - {
        key[2] for key, verdict in verdicts.items() if key[0] == "ham10000" and verdict == "gain"
    }
    assert nothing == {1000, 5387}
    # "nearly as much as the same number of other real images"
    for real, ratio in ((50, 10), (200, 10), (1000, 3)):
        for test in ("validation", "uda1"):
            gains = [
                rows["ham10000", test, real, f"{kind} {ratio}:1"]["value"]
                for kind in ("same mix", "held-out real images")
            ]
            assert abs(gains[0] - gains[1]) < 0.025
    for site in ("rosendahl", "rosendahl-seen"):
        own = {key: verdict for key, verdict in verdicts.items() if key[:2] == (site, "rosendahl")}
        assert "gain" not in own.values()
        for real in (200, 500):
            assert found(site, "rosendahl", real, "rare alone", (3, 10)) == {"loss"}
        far = {key[3] for key, verdict in verdicts.items() if key[:2] == (site, "uda1") and verdict == "gain"}
        assert far
        assert all(name.startswith("same mix") for name in far)
    baselines = ("no augmentation", "oversampling", "class weights", "longer")
    assert {verdict for key, verdict in verdicts.items() if key[3] in baselines} <= {
        "not significant",
        "loss",
    }


def test_both_studies_are_there():
    assert STUDIES == ["generalization", "granularity"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_studys_page_says_what_its_report_found(name):
    folder = ROOT / "docs" / "studies" / name
    report, page = Report.load(folder / "report.json"), (folder / "README.md").read_text()
    assert report.model == {"study": name, "smoke": False}
    assert report.tables["findings"]
    assert all(f"- {finding}\n" in page for finding in report.tables["findings"])
    assert {metric.seed for metric in report.metrics} >= {0, 1}


def test_the_architecture_page_names_files_that_are_there():
    files = re.findall(r"`(\w+/\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(files) > 10
    roots = (ROOT, ROOT / "src" / "isic_vq")
    assert [name for name in files if not any((root / name).is_file() for root in roots)] == []


def test_links_to_files_lead_somewhere():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    files = [(page, link) for page, link in links if not re.match(r"[a-z]+:|#", link)]
    assert files
    assert [link for page, link in files if not (page.parent / link.partition("#")[0]).exists()] == []


def test_measured_reports_are_of_committed_code():
    """Reports of changed files could not be measured again."""
    paths = [
        *(ROOT / "model_cards").glob("isic-vq-128*/reports/*.json"),
        *(ROOT / "docs").rglob("report.json"),
    ]
    assert len(paths) >= 7
    for path in [*paths, ROOT / "benchmarks" / "reports" / "codec.json"]:
        environment = Report.load(path).environment
        assert environment["git_dirty"] is False, path
        assert re.fullmatch("[0-9a-f]{40}", environment["git_commit"]), path
