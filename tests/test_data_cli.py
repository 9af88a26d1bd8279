"""`isic-vq data`: what it prints and writes."""

import json

from PIL import Image

from isic_vq.data.summary import summarise


def test_summary_counts_and_shows_a_sample(run, tmp_path):
    code, out, _ = run(
        "data",
        "summary",
        "synthetic:20:0",
        "-o",
        str(tmp_path / "sample.png"),
        "--json",
        str(tmp_path / "counts.json"),
    )
    assert code == 0
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["num_images"] == 20
    assert sum(counts["diagnosis"].values()) == 20
    assert "synthetic:20:0: 20 images" in out
    with Image.open(tmp_path / "sample.png") as sample:
        assert (
            "20 images of synthetic:20:0, seed 0: source images, not generated ones" in sample.info["Comment"]
        )
        assert sample.size[0] > 8 * 128


def test_summary_by_hand():
    row = {
        "isic_id": "a",
        "lesion_id": "l",
        "patient_id": None,
        "diagnosis": "nevus",
        "age": 45.0,
        "sex": "male",
        "site": "torso",
        "source": "s",
        "license": None,
        "attribution": None,
    }
    found = summarise(
        [row, {**row, "diagnosis": "unknown", "age": 40.0, "site": "left heel"}, {**row, "age": None}]
    )
    assert found["num_images"] == 3
    assert found["diagnosis"] == {"nevus": 2, "unknown": 1}
    assert found["age"] == {"40 to 49": 2}
    assert found["missing"] == {"patient_id": 3, "diagnosis": 1, "age": 1, "license": 3, "attribution": 3}
    assert found["groups"] == {"lesion_id": 1, "patient_id": 0}
    assert found["other_sites"] == ["left heel"]


def test_prepare_verify_and_train_sources(run, tmp_path):
    out = tmp_path / "prepared"
    command = (
        "data",
        "prepare",
        str(out),
        "--data",
        "synthetic:40:0",
        "--data",
        "test=synthetic:6:5",
        "--size",
        "32",
    )
    code, printed, _ = run(*command)
    assert code == 0
    assert f"train with data.train=prepared:{out}:train" in printed
    code, printed, _ = run("data", "verify", str(out))
    assert (code, printed.strip()) == (0, "prepared is complete: 3 shards, 46 images, splits disjoint")
    shard = next(out.glob("test-*.parquet"))
    shard.unlink()
    code, printed, error = run("data", "verify", str(out))
    assert code == 1
    assert f"{shard.name} is missing" in printed
    assert "prepared: " in error
    assert "problems found: " in error
    code, _, error = run("data", "prepare", str(out), "--data", "synthetic:41:0", "--size", "32")
    assert code == 1
    assert "choose another, or --extend it" in error
