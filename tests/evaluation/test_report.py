import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from isic_vq.evaluation.report import Metric, Report, cpu_model, environment, git_state


def psnr(**changes):
    fields = {"name": "psnr", "value": 27.125, "unit": "dB", "n": 200, "split": "test", "dataset": "ham10000"}
    return Metric(**(fields | changes))


@pytest.fixture
def report():
    return Report(
        model={
            "name": "isic-vq-128",
            "config": {"num_codes": 4, "scales": [1, 2], "norm": None, "ema": True},
        },
        metrics=[
            psnr(),
            psnr(split="train", value=30.0),
            psnr(name="fid", value=0.1 + 0.2, unit="1", seed=7, interval=[0.25, 0.5]),
        ],
        tables={"codebook_counts": [3, 0, 1, 4]},
        environment={"torch": "2.13.0+cpu", "device": "a CPU @ 2.0GHz"},
    )


def test_a_saved_report_reads_back_equal(report, tmp_path):
    path = tmp_path / "new" / "report.json"
    report.save(path)
    assert Report.load(path) == report
    first = path.read_bytes()
    Report.load(path).save(path)
    assert path.read_bytes() == first


def test_the_file_is_indented_json_in_the_order_of_the_report(report, tmp_path):
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2) + "\n"
    assert list(content) == ["model", "metrics", "tables", "environment"]
    assert content["metrics"][2] == {
        "dataset": "ham10000",
        "interval": [0.25, 0.5],
        "labels": {},
        "n": 200,
        "name": "fid",
        "seed": 7,
        "split": "test",
        "unit": "1",
        "value": 0.30000000000000004,
    }


def test_value_finds_the_metric_of_a_split(report):
    assert report.value("fid") == 0.1 + 0.2
    assert report.value("psnr", split="test") == 27.125
    assert report.value("psnr", "train") == 30.0


def test_value_of_an_unknown_metric_names_what_exists(report):
    with pytest.raises(KeyError, match="no metric matches name='ssim'.*psnr.*split test.*fid"):
        report.value("ssim")
    with pytest.raises(KeyError, match="no metric matches name='fid', split='train'"):
        report.value("fid", "train")


def test_value_refuses_to_choose_between_metrics(report):
    with pytest.raises(KeyError, match="2 metrics match name='psnr'.*split test.*split train"):
        report.value("psnr")


def test_value_distinguishes_data_sets(report):
    report.metrics.append(psnr(dataset="pad-ufes", value=21.0))
    with pytest.raises(KeyError, match="2 metrics match"):
        report.value("psnr", "test")
    assert report.value("psnr", "test", dataset="pad-ufes") == 21.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": float("nan")}, "value must be finite, got nan"),
        ({"value": float("inf")}, "value must be finite, got inf"),
        ({"value": np.float64(1.0)}, "got numpy.float64"),
        ({"value": torch.tensor(1.0)}, "got torch.Tensor"),
        ({"value": True}, "got bool"),
        ({"n": 0}, "at least 1, got 0"),
        ({"n": 2.0}, "n must be an int"),
        ({"name": "psnr[sex=female]"}, "has brackets: expected labels beside it.*measure it again"),
        ({"labels": {"sex": ""}}, "labels must be non-empty str by str"),
        ({"labels": {"batch": 1}}, "labels must be non-empty str by str"),
        ({"unit": ""}, "Metric.unit must be a non-empty str"),
        ({"split": None}, "Metric.split must be"),
        ({"seed": np.int64(1)}, "seed must be an int or None, got numpy.int64"),
        ({"interval": (1.0, 2.0)}, r"interval must be \[low, high\]"),
        ({"interval": [2.0, 1.0]}, r"interval must be \[low, high\]"),
        ({"interval": [1.0, float("nan")]}, r"interval must be \[low, high\]"),
        ({"interval": [1.0, np.float64(2)]}, r"interval must be \[low, high\]"),
    ],
)
def test_a_metric_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        psnr(**changes)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"a": [1.0, float("nan")]}, r"tables.a\[1\] must be finite, got nan"),
        ({"a": {"b": np.float32(1)}}, r"tables.a.b .* numpy.float32.*\.item\(\)"),
        ({"a": np.float64(1)}, r"tables.a .* numpy.float64"),
        ({"a": torch.ones(2)}, r"tables.a .* torch.Tensor.*\.tolist\(\)"),
        ({"a": (1, 2)}, "tables.a .* got tuple"),
        ({3: "three"}, "tables: key 3 must be a str"),
    ],
)
def test_a_table_that_json_would_change_is_refused(report, tmp_path, content, place):
    with pytest.raises(ValueError, match=place):
        dataclasses.replace(report, tables=content).save(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "/home/someone/data",
        "/data",
        "read from /mnt/isic",
        "~/isic",
        "~someone/isic",
        r"C:\data",
        "D:/data",
        r"\\server\share",
        "file:///data",
        "--out=/runs/1",
        "host:/export",
    ],
)
@pytest.mark.parametrize("as_key", [False, True])
def test_an_absolute_path_is_refused_anywhere(report, tmp_path, text, as_key):
    model = {"config": {text: 1} if as_key else {"x": ["fine", text]}}
    with pytest.raises(ValueError, match="looks like an absolute path"):
        dataclasses.replace(report, model=model).save(tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"metrics\[0\].dataset looks like"):
        dataclasses.replace(report, metrics=[psnr(dataset=text)]).save(tmp_path / "report.json")


@pytest.mark.parametrize(
    "text",
    [
        "https://arxiv.org/abs/2404.02905",
        "kaggle/isic-2019",
        "n/a",
        "images / s",
        "1/255",
        "a: b",
        "~5/10",
        "f8",
    ],
)
def test_text_that_is_no_absolute_path_is_kept(report, tmp_path, text):
    dataclasses.replace(report, tables={text: [text]}).save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").tables == {text: [text]}


def edited(report, tmp_path, edit):
    path = tmp_path / "report.json"
    report.save(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c.pop("model"),
            r"report.json is not a report: the report must have.*missing \['model'\]",
        ),
        (lambda c: c.update(extra=1), r"unknown \['extra'\]"),
        (lambda c: c["metrics"][1].pop("n"), r"metrics\[1\] must have.*missing \['n'\]"),
        (
            lambda c: c["metrics"][1].update(value="27"),
            "metric 'psnr': value must be an int or float, got str",
        ),
        (lambda c: c["metrics"][1].update(value=float("nan")), "NaN is not finite"),
        (lambda c: c.update(metrics={}), "metrics must be a list, got dict"),
        (lambda c: c.update(tables=[]), "tables must be a dict, got list"),
        (lambda c: c["environment"].update(home="/root/x"), "environment.home looks like an absolute path"),
    ],
)
def test_loading_something_else_says_what_is_wrong(report, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        Report.load(edited(report, tmp_path, edit))


@pytest.mark.parametrize("content", [b'{"metrics": [', b"\xff\xfe{", b"[]", b""])
def test_loading_what_is_no_report_names_the_file(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        Report.load(path)


def test_a_number_beyond_float_range_is_refused(report, tmp_path):
    path = edited(report, tmp_path, lambda content: None)
    path.write_text(path.read_text().replace("27.125", "1e999"))
    with pytest.raises(ValueError, match="must be finite, got inf"):
        Report.load(path)


def test_a_missing_report_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "report.json")


def test_a_failing_replace_leaves_the_old_file_alone(report, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report.save(path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(report, metrics=[]).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path], "the temporary file must be gone"


def test_the_environment_can_be_published(report, tmp_path):
    found = environment(device="cpu")
    dataclasses.replace(report, environment=found).save(tmp_path / "report.json")
    assert set(found) == {
        *("isic_vq", "python", "torch", "transformers"),
        *("device", "cores", "threads", "git_commit", "git_dirty"),
    }
    assert found["torch"] == str(torch.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["device"] == cpu_model()
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert str(Path.home()) not in json.dumps(found)


def test_the_cpu_model_is_read_from_cpuinfo(tmp_path):
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC: 9\nmodel name\t: B\n"
    )
    assert cpu_model(tmp_path / "cpuinfo") == "AMD EPYC: 9"
    assert cpu_model(tmp_path / "absent")


def git(folder, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    clean = {key: text for key, text in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=clean).stdout.strip()


def test_the_commit_is_reported_only_for_a_tracked_file(tmp_path):
    tracked, ignored = tmp_path / "package.py", tmp_path / "installed.py"
    tracked.write_text("a = 1\n")
    ignored.write_text("b = 1\n")
    assert git_state(tracked) == (None, None), "there is no checkout yet"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tracked) == (commit, False)
    assert git_state(ignored) == (None, None), "an installed copy must not report its surroundings' commit"
    tracked.write_text("a = 2\n")
    assert git_state(tracked) == (commit, True)
