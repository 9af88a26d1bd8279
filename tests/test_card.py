"""A card holds the numbers of its folder's files and no others, and the check names whatever is not so."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import rounded
from isic_vq.figures.png import write_png
from isic_vq.hub.card import (
    dataset_title,
    known_metrics,
    known_table,
    render_card,
    weights_license,
    write_card,
)
from isic_vq.hub.card_check import check_card
from isic_vq.hub.pretrained import DEFAULT_CHECKPOINT, default_checkpoint
from tiny_repository import write_with_card


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_with_card(tmp_path_factory.mktemp("card"))


@pytest.fixture
def repository(original, tmp_path):
    """A folder with its card, to be spoiled; without the weights, which no card reads."""
    return shutil.copytree(
        original, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors", "*.py")
    )


@pytest.fixture
def report(repository):
    return Report.load(repository / "reports" / "validation.json")


def metric(name="psnr", value=30.0, unit="dB", n=5, split="test", dataset="folder:skin", seed=None, **labels):
    return Metric(name, value, unit, n, split, dataset, seed, labels=labels)


def add_report(folder, name, metrics, **tables):
    Report(model={}, metrics=metrics, tables=tables).save(folder / "reports" / f"{name}.json")


def edit(folder, old, new):
    """Replace the first occurrence in the card."""
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new, 1))


def add_prose(folder, line):
    (folder / "README.md").write_text((folder / "README.md").read_text() + f"\n{line}\n")


# What the card holds


def test_the_model_index_has_what_people_know_of_the_main_data_set_exactly(repository, report):
    card = ModelCard.load(repository / "README.md")
    published = {(r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert published == {
        ("psnr", "PSNR of reconstructions (dB)"): report.value("psnr"),
        ("ssim", "SSIM of reconstructions"): report.value("ssim"),
        ("bits_per_code", "Bits per code"): report.value("bits_per_code", "validation"),
    }
    assert {(r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {
        ("synthetic images", "validation")
    }
    assert card.data.metrics == ["psnr", "ssim", "bits_per_code"]


def test_generated_images_stand_beside_real_ones_by_the_last_feature_model(repository):
    kinds = {"floor": 1.0, "reconstructions": 2.0, "samples": 4.0}
    metrics = [
        metric("frechet_distance", factor * value, "1", seed=0, images=kind, yardstick=eye)
        for eye, factor in (("trained-on", 0.1), ("eye", 1))
        for kind, value in kinds.items()
    ]
    melanoma = [metric("auc", 0.8, "1", real="200", arm=arm) for arm in ("flips", "same mix 3:1")]
    assert known_table(known_metrics([Report({}, metrics), Report({}, melanoma)])).splitlines() == [
        "| metric | skin, test (n = 5) |",
        "| --- | ---: |",
        "| Frechet distance of other real images, eye | 1 |",
        "| Frechet distance of reconstructions, eye | 2 |",
        "| Frechet distance of generated images, eye | 4 |",
        "| AUROC for melanoma, trained on 200 real images | 0.8 |",
        "| AUROC for melanoma, 600 generated images added | 0.8 |",
    ]


def test_numbers_of_parts_of_the_images_stay_in_the_report(repository):
    add_report(
        repository, "parts", [metric("psnr", 3.25, **{column: "x"}) for column in ("sex", "diagnosis")]
    )
    text = render_card(repository, "tiny")
    assert "3.25" not in text
    assert "psnr[sex" not in text


def test_the_table_has_a_column_per_data_set_and_seeds_stand_below(repository):
    first = [
        metric(),
        metric("fid", 12.5, "1", seed=3),
        metric("bits_per_code", 5.5, "bits per code", seed=3),
    ]
    second = Metric("psnr", 28.25, "dB", 1200, "uda1", "parquet:${D}/uda1/*.parquet", None, [28.0, 28.5])
    assert known_table(known_metrics([Report({}, first), Report({}, [second])])).splitlines() == [
        "| metric | skin, test (n = 5) | UDA-1 (n = 1,200) |",
        "| --- | ---: | ---: |",
        "| PSNR of reconstructions (dB) | 30 | 28.25 (28.00 to 28.50) |",
        "| Bits per code | 5.5 |  |",
    ]
    assert "Seed of random choices: 0." in render_card(repository, "tiny")
    add_report(repository, "random", [metric("bits_per_code", seed=3)])
    assert "Seed of random choices: 0, 3." in render_card(repository, "tiny")


def test_a_thing_measured_twice_is_refused():
    with pytest.raises(ValueError, match=r"two values of psnr of skin, test \(n = 5\)"):
        known_table([metric(), metric(value=31.0)])


@pytest.mark.parametrize(
    ("uri", "title"),
    [
        ("parquet:${ISIC_VQ_DATA}/ham10000/validation-*.parquet", "HAM10000"),
        ("parquet:${ISIC_VQ_DATA}/uda1/test-*.parquet", "UDA-1"),
        ("folder:HAM10000/test", "HAM10000"),
        ("folder:my_images", "my_images"),
        ("parquet:collections/clinic/*.parquet", "clinic"),
        ("parquet:*.parquet", "*.parquet"),
        ("synthetic:8:0", "synthetic images"),
    ],
)
def test_data_sets_have_readable_names(uri, title):
    assert dataset_title(uri) == title


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ({"CC-0": 5}, "cc0-1.0"),
        ({"CC-0": 5, "CC-BY": 1}, "cc-by-4.0"),
        ({"CC-BY": 5, "CC-BY-NC": 1}, "cc-by-nc-4.0"),
        ({"CC-BY-NC-4.0": 5387}, "cc-by-nc-4.0"),
        ({"CC0-1.0": 8}, "cc0-1.0"),
        ({"CC-BY-NC": 1, "unknown": 3}, "unknown"),
    ],
)
def test_weights_take_the_most_restrictive_licence(licenses, expected):
    assert weights_license(licenses) == expected


def test_a_licence_that_isic_does_not_use_is_refused():
    with pytest.raises(ValueError, match="images are under 'MIT'"):
        weights_license({"MIT": 3})


def test_what_was_not_recorded_is_said_to_be_so(repository):
    assert "| optimizer steps | not recorded | not recorded |" in render_card(repository, "tiny")


def test_a_recorded_recipe_is_shown(repository):
    path = repository / "provenance.json"
    loop = {"batch_size": 24, "learning_rate": 3e-4, "warmup_steps": 70, "weight_decay": 0.05}
    record = {
        "recipe": {"loop": loop},
        "steps": 12345,
        "hours": 1.24,
        "environment": {"git_commit": "0123456789abcdef", "git_dirty": True, "device": "CPU X", "cores": 3},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "training": {"prior": record}}))
    cells = dict(
        re.findall(r"^\| ([\w ]+) \| not recorded \| (.+) \|$", render_card(repository, "tiny"), re.MULTILINE)
    )
    assert cells["optimizer steps"] == "12,345"
    assert cells["batch size"] == "24 images"
    assert cells["optimizer"] == "AdamW, weight decay 0.05"
    assert cells["learning rate"] == "0.0003, 70 steps of warm-up, then cosine to zero"
    assert cells["time in steps"] == "1.2 h"
    assert cells["device"] == "CPU X, 3 cores"
    assert cells["commit"] == "`0123456789ab`, with changes"


def change_provenance(folder, **stages):
    path = folder / "provenance.json"
    content = json.loads(path.read_text())
    content["training_data_by_stage"] |= stages
    path.write_text(json.dumps(content))


def test_each_parts_images_are_described(repository):
    change_provenance(
        repository,
        vqvae={
            "name": "prepared:ham:train",
            "fingerprint": "12" * 32,
            "num_images": 1234,
            "licenses": {"CC-BY": 1200, "CC-BY-NC": 34},
            "attributions": ["Hospital A"],
            "diagnoses": {"nevus": 1234},
            "snapshot": "2026-08-21",
            "ids_sha256": "34" * 32,
            "manifest_sha256": "56" * 32,
        },
    )
    text = render_card(repository, "tiny")
    assert "| trained on | tokenizer | prior |" in text
    assert "| images | 1,234 | 8 |" in text
    assert "| by licence | CC-BY: 1,200; CC-BY-NC: 34 | CC0-1.0: 8 |" in text
    assert f"| sha256 of the manifest | `{'56' * 8}` |  |" in text
    assert "- Hospital A\n" in text
    assert "license: cc-by-nc-4.0" in text
    assert "Weights: cc-by-nc-4.0, the most restrictive of the training images' licences." in text


def test_the_images_of_every_stage_of_training_have_a_column(repository):
    change_provenance(repository, vqvae=None, prior_start=None, decoder=None)
    text = render_card(repository, "tiny")
    assert "| trained on | tokenizer | prior | prior it started from | decoder, fine-tuned |" in text


def test_images_that_were_not_recorded_are_said_to_be_so_and_no_licence_is_claimed(repository):
    change_provenance(repository, vqvae=None)
    text = render_card(repository, "tiny")
    assert "| images | not recorded | 8 |" in text
    assert "license: unknown" in text
    assert "Weights: unknown, because the licences of some training images are not recorded." in text
    assert "cc0-1.0" not in text


def test_without_an_audit_the_card_says_so(repository):
    assert "Not audited" in render_card(repository, "tiny")


def test_the_verdict_of_an_audit_is_shown_without_its_other_numbers(repository):
    nearest = metric("nearest_share", 0.0125, "share of images", seed=0)
    add_report(repository, "memorization", [nearest], verdict="1 of 80 images repeats a training image.")
    text = render_card(repository, "tiny")
    assert "1 of 80 images repeats a training image." in text
    assert "Not audited" not in text
    assert "0.0125" not in text


def test_an_audit_without_a_verdict_is_refused(repository):
    add_report(repository, "memorization", [metric()])
    with pytest.raises(ValueError, match="no table 'verdict'"):
        render_card(repository, "tiny")


def test_a_metric_of_generated_images_takes_back_the_sentence_that_there_is_none(repository):
    sentence = "No metric here compares generated images with real ones"
    assert sentence in render_card(repository, "tiny")
    add_report(
        repository,
        "generation",
        [metric("kernel_distance", 0.5, "1", seed=0, images="samples", yardstick="eye")],
    )
    assert sentence not in render_card(repository, "tiny")


def test_onnx_is_a_tag_where_there_are_such_files(repository):
    assert "- onnx" not in render_card(repository, "tiny")
    (repository / "onnx").mkdir()
    (repository / "onnx" / "encoder.onnx").write_bytes(b"")
    text = render_card(repository, "tiny")
    assert "- onnx" in text
    assert "`onnx/encoder.onnx` turns pixels into codes" in text


def test_a_folder_without_reports_or_provenance_gets_no_card(repository):
    (repository / "provenance.json").unlink()
    with pytest.raises(ValueError, match=r"tiny has no provenance.json"):
        write_card(repository)
    shutil.rmtree(repository / "reports")
    with pytest.raises(ValueError, match="reports is empty: run isic-vq evaluate"):
        write_card(repository)


# What the check finds


def test_a_fresh_card_has_no_problems(repository):
    assert check_card(repository) == []


def test_a_folder_may_be_renamed_after_its_card_was_written(repository):
    assert check_card(repository.rename(repository.with_name("model-7"))) == []


def test_prose_without_numbers_and_more_tags_may_be_added(repository):
    add_prose(repository, "Collected with care; see [the reports](reports/validation.json) and HAM10000.")
    edit(repository, "- dermoscopy", "- dermoscopy\n- melanoma")
    assert check_card(repository) == []


def test_code_may_be_added_and_its_numbers_are_numbers_too(repository):
    add_prose(repository, "```python\nimport isic_vq\n```")
    assert check_card(repository) == []
    add_prose(repository, "```\ntemperature = 0.91\n```")
    assert check_card(repository) == [unwritten("temperature = 0.91")]


def unwritten(line):
    return f"a number stands in a line that isic-vq card does not write: {line!r}"


@pytest.mark.parametrize(
    "line",
    ["FID _3.21_.", "AUC3.21", "*3.21*", "FID: 3.21", "97 % of all", "1,234", "12 images", ".5", "-3.25"],
)
def test_a_number_is_seen_in_any_dress(repository, line):
    add_prose(repository, line)
    assert check_card(repository) == [unwritten(line)]


def test_a_reports_number_in_a_sentence_of_ones_own_is_named(repository, report):
    line = f"The area under the curve is {report.value('psnr'):.5g}."
    add_prose(repository, line)
    assert check_card(repository) == [unwritten(line)]


def test_two_numbers_of_the_table_that_changed_places_are_found(repository, report):
    psnr, ssim = (rounded(report.find(name, "validation"))[0] for name in ("psnr", "ssim"))
    edit(
        repository, f"| PSNR of reconstructions (dB) | {psnr} (", f"| PSNR of reconstructions (dB) | {ssim} ("
    )
    assert "the table of measurements is not that of reports/: run isic-vq card" in check_card(repository)


def test_a_report_that_is_newer_than_the_card_is_found(repository, report):
    others = [m for m in report.metrics if m.text != "psnr"]
    psnr = metric(value=77.25, n=6, split="validation", dataset="synthetic:6:1")
    Report(model={}, metrics=[psnr, *others]).save(repository / "reports" / "validation.json")
    problems = " / ".join(check_card(repository))
    name, where = "PSNR of reconstructions (dB)", "(synthetic images, validation)"
    assert f"model-index says that {name} is {report.value('psnr')!r} {where}" in problems
    assert f"model-index lacks that {name} is 77.25 {where}" in problems
    assert "the table of measurements is not that of reports/" in problems


SPOILED = {
    "licence": ("license: cc0-1.0", "license: mit", ["license is 'mit': expected 'cc0-1.0'"]),
    "library": ("library_name: transformers\n", "", ["library_name is None: expected 'transformers'"]),
    "task": (
        "pipeline_tag: unconditional-image-generation",
        "pipeline_tag: image-classification",
        ["pipeline_tag is 'image-classification': expected 'unconditional-image-generation'"],
    ),
    "link": ("(provenance.json)", "(origin.json)", ["origin.json is linked but is not there"]),
    "outside": ("(provenance.json)", "(../LICENSE)", ["../LICENSE is linked but lies outside the folder"]),
    "image": (
        "(previews/nevus.png)",
        "(previews/naevus.png)",
        ["previews/naevus.png is linked but is not there"],
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_each_problem_is_one_clear_line(repository, name):
    old, new, lines = SPOILED[name]
    edit(repository, old, new)
    assert check_card(repository) == lines


def test_a_missing_tag_is_found(repository):
    edit(repository, "- dermoscopy\n", "")
    (problem,) = check_card(repository)
    assert re.fullmatch(r"tags is \[.*\]: expected \[.*'dermoscopy'.*\]", problem)


def test_unreadable_metadata_is_one_problem(repository):
    edit(repository, "license: cc0-1.0", "license: [")
    (problem,) = check_card(repository)
    assert "README.md has unreadable metadata (" in problem


def test_a_card_without_metadata_is_found(repository):
    text = (repository / "README.md").read_text()
    (repository / "README.md").write_text(text.split("\n---\n", 1)[1])
    assert check_card(repository) == [
        "README.md has no metadata between --- lines at its start: run isic-vq card"
    ]


def test_a_missing_card_is_a_problem(repository):
    (repository / "README.md").unlink()
    assert check_card(repository) == ["README.md is missing: run isic-vq card"]


def test_pictures_that_do_not_say_who_made_them_and_of_what_are_found(repository):
    pixels = Image.new("RGB", (4, 4))
    pixels.save(repository / "previews" / "lesion.png")
    pixels.save(repository / "previews" / "photo.jpg")
    write_png(pixels, repository / "previews" / "pairs.png", {"Comment": "originals above reconstructions"})
    lesion, pairs, jpg = check_card(repository)
    assert jpg.startswith("previews/photo.jpg is not a readable PNG")
    assert lesion.startswith("previews/lesion.png may be a data image, as its PNG field")
    assert pairs.startswith("previews/pairs.png may show a data image")


def test_a_picture_that_is_none_is_refused_by_name(repository):
    (repository / "previews" / "broken.png").write_bytes(b"no png")
    with pytest.raises(ValueError, match=r"previews/broken.png is not a readable PNG: remove it"):
        check_card(repository)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (
            "name: SSIM of reconstructions",
            "name: SSIM of many patients",
            "says that SSIM of many patients is",
        ),
        ("type: syntheticimages", "type: clinic", "says that"),
        ("    - type: psnr\n", "    - type: auc\n", "lacks that PSNR of reconstructions (dB) is"),
        (
            "    - type: psnr\n",
            "    - type: psnr\n      value: 99.0\n    - type: psnr\n",
            "says that psnr is 99.0",
        ),
    ],
)
def test_results_that_are_not_the_reports_are_found(old, new, found, repository):
    edit(repository, old, new)
    assert f"model-index {found}" in " / ".join(check_card(repository))


# The commands


def test_card_check_prints_a_line_per_problem_and_fails(repository, run):
    assert run("card", repository, "--check")[0] == 0
    add_prose(repository, "SSIM 0.91, AUC 0.99.")
    code, _, stderr = run("card", repository, "--check")
    assert code == 1
    assert stderr.splitlines() == [unwritten("SSIM 0.91, AUC 0.99.")]


def test_card_write_writes_what_is_rendered(repository, run):
    (repository / "README.md").write_text("old")
    assert run("card", repository)[0] == 0
    assert (repository / "README.md").read_text() == render_card(repository, "tiny")


# The shipped cards

SHIPPED = sorted(path.parent for path in default_checkpoint().parent.glob("*/model_index.json"))
shipped = pytest.mark.parametrize("folder", SHIPPED, ids=[path.name for path in SHIPPED])


def test_both_checkpoints_have_a_card():
    assert [path.name for path in SHIPPED] == [DEFAULT_CHECKPOINT, f"{DEFAULT_CHECKPOINT}-var"]


@shipped
def test_a_shipped_card_is_what_is_rendered_now(folder):
    assert (folder / "README.md").read_text() == render_card(folder, folder.name)


@shipped
def test_a_shipped_card_has_no_problems(folder):
    assert check_card(folder) == []


@shipped
def test_a_shipped_card_holds_the_shipped_reports_numbers_on_less_than_200_lines(folder):
    card = ModelCard.load(folder / "README.md")
    values = [
        metric.value for path in (folder / "reports").glob("*.json") for metric in Report.load(path).metrics
    ]
    assert 7 <= len(card.data.eval_results) <= 10
    for result in card.data.eval_results:
        assert result.metric_value in values
        assert (result.dataset_name, result.dataset_split) == ("HAM10000", "validation")
    assert card.data.license == "cc-by-nc-4.0"
    assert "not a diagnostic device" in card.text
    assert len((folder / "README.md").read_text().splitlines()) < 200
