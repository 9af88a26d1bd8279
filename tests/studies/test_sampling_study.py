"""Ways of sampling compared: the numbers are those of the evaluation, and what is generated is kept."""

import json

import pytest
import torch
from coloured_images import COLOURS, write_coloured
from transformers import ResNetConfig, ResNetForImageClassification

import sampling_study
from isic_vq.data.sources import find_source
from isic_vq.evaluation.generation import Yardstick, evaluate_generation
from isic_vq.evaluation.report import Report
from isic_vq.models.sampling import Sampling
from sampling_study import combinations, evaluate_sampling, setting_name

SETTINGS = combinations([1.0, 0.5], [None], [1.0, 3.0])


def test_a_power_goes_with_guidance_alone():
    settings = combinations([1.0, 1.04], [None], [1.0, 2.0], [None, 2.0])
    names = [setting_name(setting) for setting in settings]
    assert names == [
        "plain", "guidance_scale=2", "guidance_scale=2 guidance_power=2",
        "temperature=1.04", "temperature=1.04 guidance_scale=2", "temperature=1.04 guidance_scale=2 guidance_power=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def skin(tmp_path_factory):
    """A tiny untrained classifier of diagnoses, as a user would have saved it."""
    folder = tmp_path_factory.mktemp("yardstick") / "skin"
    torch.manual_seed(0)
    labels = ["mel", "nv", "vasc"]
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(labels)), label2id={name: index for index, name in enumerate(labels)},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def study(coloured_sets, noise_generator, skin, tmp_path_factory):
    """A finished study: its folder and its lines by name."""
    folder, yardsticks = tmp_path_factory.mktemp("sampling"), [Yardstick.from_pretrained(str(skin))]
    lines = evaluate_sampling(noise_generator, yardsticks, coloured_sets[1], SETTINGS, folder, seed=3)
    return folder, {line.text: line for line in lines}


def test_settings_are_named_by_what_differs_from_the_plain_one():
    assert [setting_name(sampling) for sampling in SETTINGS] == [
        "plain", "guidance_scale=3", "temperature=0.5", "temperature=0.5 guidance_scale=3",
    ]  # fmt: skip
    assert setting_name(Sampling(top_k=5, top_p=0.25)) == "top_k=5 top_p=0.25"


def test_numbers_are_those_of_the_evaluation(study, coloured_sets, noise_generator, skin, tmp_path):
    _, found = study
    yardsticks, test = [Yardstick.from_pretrained(str(skin))], find_source(coloured_sets[1])
    others = write_coloured(tmp_path / "others", dict.fromkeys(COLOURS, 16), seed=2)  # for the floor alone
    for sampling in (SETTINGS[0], SETTINGS[3]):
        lines, _ = evaluate_generation(
            noise_generator, yardsticks, test, find_source(others), "validation", seed=3, sampling=sampling
        )
        of_samples = [line for line in lines if "[samples, skin" in line.text]
        assert len(of_samples) > 6
        for line in of_samples:
            named = found[line.text.replace("[samples, ", f"[{setting_name(sampling)}, ")]
            assert named.value == pytest.approx(line.value, rel=1e-4, abs=1e-6), line.text
            assert (named.n, named.split, named.seed) == (line.n, "validation", 3)


def test_every_setting_has_its_lines(study):
    _, found = study
    for name in map(setting_name, SETTINGS):
        for measure in (
            "frechet_distance",
            "kernel_distance",
            "precision",
            "recall",
            "coverage",
            "agreement",
        ):
            assert f"{measure}[{name}, skin]" in found
    assert "agreement[real, skin]" in found


def test_what_is_generated_is_kept_and_not_made_again(study, coloured_sets, noise_generator, skin):
    folder, found = study
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*/images-*.parquet")}
    assert {path.parent.name for path in shards} == {
        "plain", "guidance_scale=3", "temperature=0.5", "temperature=0.5,guidance_scale=3",
    }  # fmt: skip
    yardsticks = [Yardstick.from_pretrained(str(skin))]
    lines = evaluate_sampling(noise_generator, yardsticks, coloured_sets[1], SETTINGS, folder, seed=3)
    assert {line.text: line for line in lines} == found
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_another_seed_settings_alike_and_none_are_refused(
    study, coloured_sets, noise_generator, skin, tmp_path
):
    folder, _ = study
    yardsticks = [Yardstick.from_pretrained(str(skin))]
    with pytest.raises(ValueError, match="seed"):
        evaluate_sampling(noise_generator, yardsticks, coloured_sets[1], SETTINGS, folder, seed=4)
    for settings in ([], [Sampling(), Sampling(temperature=1)]):
        with pytest.raises(ValueError, match="expected at least one, each once"):
            evaluate_sampling(noise_generator, yardsticks, coloured_sets[1], settings, tmp_path)


def test_the_command_writes_a_report(capsys, coloured_sets, noise_generator, skin, tmp_path):
    noise_generator.save_pretrained(tmp_path / "model")
    sampling_study.main(
        [
            *("-m", str(tmp_path / "model"), "--data", coloured_sets[1], "--features", str(skin)),
            *(
                "--top-p",
                "1",
                "0.5",
                "--work-dir",
                str(tmp_path / "work"),
                "-o",
                str(tmp_path / "sampling.json"),
            ),
        ]
    )
    out = capsys.readouterr().out
    report = Report.load(tmp_path / "sampling.json")
    assert [setting["top_p"] for setting in report.model["settings"]] == [None, 0.5]
    assert "kernel_distance[top_p=0.5, skin]" in out
