"""Commands that measure, on images that can only be streamed: the same numbers, and each image read once."""

from collections import Counter

import pytest

from isic_vq.data import sources, uri
from isic_vq.data.schema import DataError
from isic_vq.evaluation.evaluate import evaluate_checkpoint
from isic_vq.evaluation.out_of_distribution import evaluate_out_of_distribution
from isic_vq.evaluation.scores import SCORES
from stream_only import StreamOnly

NUM_IMAGES = sum(StreamOnly.sizes)
STREAM, SAME_IMAGES = "streamonly:x", f"synthetic:{NUM_IMAGES}:0"


@pytest.fixture
def model(tiny_run):
    return str(tiny_run.prior / "model")


@pytest.fixture
def reads(monkeypatch):
    """How often each image is read; makes the scheme known."""
    counts, read = Counter(), StreamOnly.read

    def counted(self, part):
        for record in read(self, part):
            counts[record["isic_id"]] += 1
            yield record

    monkeypatch.setattr(StreamOnly, "read", counted)
    monkeypatch.setitem(sources.SOURCES, "streamonly", lambda target: StreamOnly())
    monkeypatch.setattr(uri, "SCHEMES", f"{uri.SCHEMES}, streamonly:NAME")
    return counts


def test_a_stream_is_evaluated_like_files_and_read_once(model, reads):
    streamed, stored = (evaluate_checkpoint(model, [("test", uri)]).report for uri in (STREAM, SAME_IMAGES))
    assert set(reads.values()) == {1}
    assert len(reads) == NUM_IMAGES
    lines, expected = (
        [(m.text, m.value, m.n, m.interval) for m in report.metrics if m.split == "test"]
        for report in (streamed, stored)
    )
    assert lines == expected
    assert {m.dataset for m in streamed.metrics if m.split == "test"} == {"streamonly:test"}
    for key in ("codebook_counts", "codebook_counts_by_diagnosis"):
        assert streamed.tables["test"][key] == stored.tables["test"][key]


def test_corrupt_images_of_a_stream_are_left_out_and_too_many_are_an_error(model, reads, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "streamonly", lambda target: StreamOnly(corrupt=3))
    report = evaluate_checkpoint(model, [("test", STREAM)], max_corrupt_share=0.1).report
    assert {m.n for m in report.metrics if m.split == "test" and "=" not in m.text} == {NUM_IMAGES - 1}
    with pytest.raises(DataError, match=f"1 of {NUM_IMAGES} images are corrupt"):
        evaluate_checkpoint(model, [("test", STREAM)], max_corrupt_share=0.01)


def test_a_subset_of_a_stream_is_drawn_by_seed_and_no_image_is_read_twice(tiny_run, model, reads):
    def bits(seed):
        report = evaluate_out_of_distribution(
            model, STREAM, tiny_run.codes["train"], non_skin="synthetic:4:5", limit=10, seed=seed
        )
        (clean,) = (metric for metric in report.metrics if metric.text == "bits_per_code[clean]")
        return clean.n, clean.value, {metric.text for metric in report.metrics if "auroc" in metric.text}

    number, value, areas = bits(seed=1)
    assert number == 10
    assert set(reads.values()) == {1}
    assert len(areas) % len(SCORES) == 0
    assert bits(seed=1)[1] == value
    assert bits(seed=2)[1] != value


def test_streamed_images_are_scored_in_one_pass(run, model, reads, tmp_path):
    code, stdout, stderr = run("score", STREAM, "-m", model, "-o", tmp_path, "--limit", 0)
    assert code == 0, stderr
    assert stdout.startswith(f"{NUM_IMAGES} images: ")
    assert set(reads.values()) == {1}
    assert run("score", SAME_IMAGES, "-m", model, "-o", tmp_path / "files", "--limit", 0)[0] == 0
    assert (tmp_path / "scores.csv").read_bytes() == (tmp_path / "files" / "scores.csv").read_bytes()


def test_reconstruct_reads_no_more_of_a_stream_than_it_shows(run, model, reads, monkeypatch, tmp_path):
    monkeypatch.setitem(sources.SOURCES, "streamonly", lambda target: StreamOnly(sizes=(40, 40, 40)))
    code, _, stderr = run("reconstruct", STREAM, "-m", model, "-o", tmp_path, "--limit", 5)
    assert code == 0, stderr
    assert len(list(tmp_path.glob("image-*.png"))) == 5
    assert len(reads) <= 40, "a part more than the first would be read for nothing"
