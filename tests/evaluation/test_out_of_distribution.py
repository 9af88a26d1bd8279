"""AUROC by counting pairs, the report on a tiny run, and the shipped checkpoint on a few real images."""

import itertools
import sys

import numpy as np
import pytest
import torch

from isic_vq.data.code_cache import read_code_cache, write_code_cache
from isic_vq.data.encoding import encode_source
from isic_vq.data.schema import DataError
from isic_vq.data.sources import describe_source, open_source
from isic_vq.evaluation import measured_images as evaluation_images
from isic_vq.evaluation.out_of_distribution import (
    CORRUPTIONS,
    NUM_BINS,
    auroc,
    corrupt,
    evaluate_out_of_distribution,
    photograph_tiles,
    score_histograms,
)
from isic_vq.evaluation.report import Report
from isic_vq.evaluation.scores import SCORES
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.likelihood import score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel

KINDS = (*CORRUPTIONS, "non_skin")


def auroc_by_hand(usual, unusual):
    """Share of pairs in which the unusual one scores higher; a tie is half a pair."""
    pairs = list(itertools.product(usual.tolist(), unusual.tolist()))
    return sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("scale", [1.0, 0.01, 1000.0])
def test_auroc_is_the_share_of_pairs_in_the_right_order(scale):
    usual = scale * torch.randint(5, (13,)).double()
    unusual = scale * (torch.randint(5, (7,)).double() + 1)
    assert auroc(usual, unusual) == pytest.approx(auroc_by_hand(usual, unusual), abs=1e-6)
    assert auroc(unusual, usual) == pytest.approx(1 - auroc_by_hand(usual, unusual), abs=1e-6)


def test_auroc_tells_large_scores_apart():
    """Where a sigmoid of the scores, which torchmetrics takes, would be 1 for all of them."""
    large = torch.tensor([140.0, 139.0], dtype=torch.float64)
    assert auroc(large, large + 2) == 1.0
    assert auroc(large + 2, large) == 0.0
    assert auroc(large, large) == 0.5


def test_histograms_count_every_image_once():
    scores = {kind: {name: torch.randn(n) for name in SCORES} for kind, n in (("clean", 40), ("blur", 7))}
    for name, histogram in score_histograms(scores).items():
        assert len(histogram["edges"]) == NUM_BINS + 1
        for kind, counts in histogram["counts"].items():
            assert sum(counts) == len(scores[kind][name])
            expected = np.histogram(scores[kind][name].numpy(), histogram["edges"])[0]
            assert counts == expected.tolist()


def test_photographs_are_cut_into_tiles_that_differ():
    tiles = photograph_tiles()
    assert len(tiles) == len({tile.tobytes() for tile in tiles}) == 30
    assert {(tile.shape, tile.dtype.name) for tile in tiles} == {((128, 128, 3), "uint8")}


def test_without_scikit_learn_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        photograph_tiles()


@pytest.fixture(scope="module")
def tiny_report(tiny_run):
    """Of fifteen of sixteen synthetic images, with the training images of the run as what shows no skin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_images, "BATCH_SIZE", 4)  # so that there are several
        return evaluate_out_of_distribution(
            str(tiny_run.prior / "model"),
            f"folder:{tiny_run.images['validation']}",
            tiny_run.codes["train"],
            non_skin=f"folder:{tiny_run.images['train']}",
            limit=15,
            seed=4,
        )


def test_the_report_has_one_line_per_score_and_kind(tiny_report, tmp_path):
    found = {metric.text: metric for metric in tiny_report.metrics}
    areas = {f"auroc[{score}, {kind}]" for score in SCORES for kind in KINDS}
    means = {f"bits_per_code[{kind}]" for kind in ("training", "clean", *KINDS)}
    assert len(found) == len(tiny_report.metrics)
    assert set(found) == areas | means
    for name in areas:
        assert (found[name].unit, found[name].n, found[name].split) == ("AUROC", 30, "validation")
        assert 0 <= found[name].value <= 1
        assert (found[name].dataset, found[name].seed) == ("folder:validation", 4)
    assert (found["bits_per_code[training]"].split, found["bits_per_code[training]"].n) == ("train", 16)
    tiny_report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == tiny_report
    assert set(tiny_report.tables["unusual_images"]) == set(KINDS)
    assert tiny_report.tables["unusual_images"]["non_skin"] == "folder:train"


def test_the_report_measures_what_can_be_measured_by_hand(tiny_run, tiny_report):
    """The seeded subset, the seeded noise and the raw bits, put together again."""
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    chosen = torch.randperm(16, generator=torch.Generator().manual_seed(4))[:15].sort().values
    paths = sorted(tiny_run.images["validation"].glob("*.png"))
    images = IsicVQImageProcessor(size=16)([paths[i] for i in chosen], return_tensors="pt")["pixel_values"]
    clean, noisy = (
        score_codes(model, model.encode(pixels)).flatten(1).mean(1)
        for pixels in (images, corrupt("noise", images, seed=4))
    )
    assert tiny_report.value("bits_per_code", images="clean") == pytest.approx(clean.mean().item(), rel=1e-6)
    assert tiny_report.value("bits_per_code", images="noise") == pytest.approx(noisy.mean().item(), rel=1e-6)
    area = tiny_report.value("auroc", score="bits_per_code", images="noise")
    assert area == pytest.approx(auroc_by_hand(clean, noisy), abs=1e-6)


def test_a_source_without_a_readable_image_is_named(tiny_run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("this is no image")
    for data, non_skin in (("broken", "synthetic:2"), ("sound", "broken")):
        uris = [f"folder:{tmp_path / name}" if name == "broken" else name for name in (data, non_skin)]
        with pytest.raises(DataError, match="folder:broken holds no readable image"):
            evaluate_out_of_distribution(
                str(tiny_run.prior / "model"),
                uris[0].replace("sound", "synthetic:2"),
                tiny_run.codes["train"],
                non_skin=uris[1],
                max_corrupt_share=1.0,
            )


@pytest.mark.real_data
@pytest.mark.slow
def test_the_shipped_checkpoint_tells_real_images_from_shuffled_inverted_and_noisy_ones(data_dir, tmp_path):
    """Blur is left out on purpose: smooth images cost fewer bits, and no score here finds them reliably."""
    model = load_model(IsicVQModel)
    training = f"parquet:{data_dir}/ham10000/train-*.parquet"
    cache = encode_source(
        model.vqvae,
        IsicVQImageProcessor(size=128),
        open_source(training).select(range(24)),
        describe_source(training),
        num_views=1,
    )
    write_code_cache(cache, tmp_path / "codes.parquet")
    assert len(read_code_cache(tmp_path / "codes.parquet").isic_ids) == 24
    report = evaluate_out_of_distribution(
        None, f"parquet:{data_dir}/ham10000/validation-*.parquet", tmp_path / "codes.parquet", limit=24
    )
    assert report.value("auroc", score="bits_per_code", images="shuffled") > 0.9
    assert report.value("auroc", score="complexity_corrected", images="shuffled") > 0.95
    assert report.value("auroc", score="complexity_corrected", images="inverted") > 0.95
    assert report.value("auroc", score="bits_per_code", images="inverted") < 0.4, (
        "inverted images cost fewer bits, not more"
    )
    assert report.value("auroc", score="bits_per_code", images="noise") > 0.7
    assert report.value("auroc", score="complexity_corrected", images="noise") > 0.7
