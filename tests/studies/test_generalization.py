"""The generalization study: domains hold what they should, and what it says follows from its numbers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny_study import PRIOR, VQVAE

import generalization
from generalization import Measured, findings, shift_metric, webp_psnr
from generalization_recipe import GeneralizationRecipe, chains, domain_file, write_domains
from isic_vq.data.schema import DataError
from isic_vq.data.sources import open_source
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Report
from isic_vq.training.recipe import RecipeError

DOMAINS = {
    "north": {"sources": ["north_*"], "num_images": 8},
    "south": {"sources": ["south"], "num_images": 8},
    "all": {},
}


def recipe_in(folder, uris=None, **changes):
    uris = uris or {"train": "a", "validation": "b"}
    return GeneralizationRecipe(
        output_dir=str(folder), **uris, **{"domains": DOMAINS, "vqvae": VQVAE, "prior": PRIOR, **changes}
    )


def ids(path):
    return set(open_source(f"parquet:{path}")["isic_id"])


def test_domains_hold_their_sources_and_share_nothing(two_sources, tmp_path):
    recipe = recipe_in(tmp_path, two_sources)
    write_domains(recipe)
    found = {
        (name, part): ids(domain_file(recipe, name, part))
        for name in DOMAINS
        for part in ("train", "validation")
    }
    assert {key: len(of) for key, of in found.items()} == {
        ("north", "train"): 8, ("north", "validation"): 10, ("south", "train"): 8, ("south", "validation"): 10,
        ("all", "train"): 24, ("all", "validation"): 20,
    }  # fmt: skip
    assert all("north" in name for name in found["north", "train"] | found["north", "validation"])
    assert not found["north", "train"] & found["south", "train"]
    assert found["north", "train"] < found["all", "train"]
    images = pq.read_table(domain_file(recipe, "north", "train"))["image"].to_pylist()
    assert all(image["bytes"] for image in images), "files of images that may go away"
    before = domain_file(recipe, "north", "train").read_bytes()
    write_domains(recipe)
    assert domain_file(recipe, "north", "train").read_bytes() == before


def test_a_domain_without_enough_images_is_refused(two_sources, tmp_path):
    for fields, message in (
        ({"sources": ["west"]}, "has 0 images of train"),
        ({"num_images": 99}, "has 24 images of train and wants 99"),
    ):
        with pytest.raises(DataError, match=message):
            write_domains(recipe_in(tmp_path, two_sources, domains={"x": fields}))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_recipe_without_domains_or_with_unknown_fields_is_refused(tmp_path):
    with pytest.raises(Exception, match="domains is empty"):
        recipe_in(tmp_path, domains={})
    with pytest.raises((RecipeError, Exception), match="source"):
        recipe_in(tmp_path, domains={"x": {"source": ["a"]}})


def test_augmented_models_see_all_views_in_both_stages():
    for chain in chains(recipe_in("x")):
        augmented = chain.labels["augmentation"] == "augmented"
        assert chain.vqvae["augment"] is augmented
        assert chain.views == (8 if augmented else 1)


def made(psnr, bits):
    """Models of every setting, from functions of (domain, augment, data set, seed)."""
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    groups = {}
    for chain in chains(recipe_in("x")):
        domain, augment = chain.labels["domain"], chain.views > 1
        values = {
            name: {
                "psnr": psnr(domain, augment, name, chain.seed) + noise * (1 + augment + len(domain)),
                "ssim": noise,
                "bits_per_code": bits(domain, augment, name, chain.seed) + noise,
            }
            for name in ("north", "south", "all", "clinic")
        }
        measured = Measured(chain, values, frozenset(values) - {domain})
        groups.setdefault(chain.label, []).append(measured)
    return groups


def say(psnr, bits):
    recipe = recipe_in("x", tests={"clinic": "c"})
    webp = {
        name: torch.full((60,), 30.0 - (name == "clinic"), dtype=torch.float64)
        for name in ("north", "south", "all", "clinic")
    }
    return findings(made(psnr, bits), webp, recipe, {})


@pytest.mark.slow
def test_what_it_costs_to_train_elsewhere_is_told_on_the_same_images():
    said = say(lambda d, a, n, s: 30.0 - (d != n), lambda d, a, n, s: 4.0 + (d != n) * 0.5)
    assert said[0].startswith(
        "On north images, a tokenizer trained on south instead of north: PSNR falls by 1.00"
    )
    assert "bits per code rises by 0.50 (0.50, 0.50)" in said[0]
    assert any("clinic images are dearer than its own (AUROC 1.00, 1.00)" in line for line in said)


@pytest.mark.slow
def test_the_gap_to_another_data_set_stands_beside_that_of_an_untrained_codec():
    said = say(lambda d, a, n, s: 30.0 - 3 * (n == "clinic"), lambda d, a, n, s: 4.0)
    (line,) = [line for line in said if line.startswith("From held-out all images to clinic")]
    assert "PSNR falls by 3.00 (3.00, 3.00) dB" in line
    assert (
        "WebP's PSNR, which tells how much of that is in the images, changes by -1.00 dB (-1.00 to -1.00)"
        in line
    )
    assert any("not told from its own by all seeds" in line for line in said)


@pytest.mark.slow
def test_seeds_that_disagree_on_augmentation_say_so():
    said = say(lambda d, a, n, s: 30.0 + a * (1 if s else -1), lambda d, a, n, s: 4.0 - a * 0.25)
    (line,) = [line for line in said if line.startswith("Augmentation, trained on north")]
    assert "on south the seeds do not agree on PSNR" in line
    assert "bits per code falls by 0.25 (0.25, 0.25)" in line


def test_the_shift_is_scikit_learns_auroc_within_its_interval():
    generator = np.random.default_rng(0)
    own, other = generator.normal(0, 1, 80), generator.normal(0.7, 1, 60)
    metric = shift_metric(torch.from_numpy(own), torch.from_numpy(other), MeasuredOn("clinic", "clinic"), 0)
    assert metric.value == pytest.approx(roc_auc_score([0] * 80 + [1] * 60, np.concatenate([own, other])))
    low, high = metric.interval
    assert 0.5 < low < metric.value < high < 0.9


def test_webp_is_measured_image_by_image(two_sources):
    found = webp_psnr(two_sources["validation"])
    assert len(found) == 20
    assert 5 < found.min() < found.max() < 40


@pytest.mark.slow
def test_the_command_writes_report_plots_and_page(capsys, two_sources, tmp_path):
    # Every other set is a part of all images: likelihood has nothing to tell them by.
    few = {
        "all": {"num_images": 8},
        "north": {"sources": ["north_*"], "num_images": 8},
        "south": {"sources": ["south"], "num_images": 8},
    }
    vqvae = {**VQVAE, "model": {**VQVAE["model"], "hidden_sizes": [4, 8]}}
    recipe = {
        "stage": "generalization", "output_dir": str(tmp_path / "study"), **two_sources, "domains": few,
        "tests": {"clinic": "synthetic:10:5"}, "seeds": [0], "vqvae": vqvae, "prior": PRIOR,
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(recipe))
    generalization.main([str(tmp_path / "study.yaml")])
    out = capsys.readouterr().out
    folder = tmp_path / "study" / "results"
    report, page = Report.load(folder / "report.json"), (folder / "README.md").read_text()
    assert report.model == {"study": "generalization", "smoke": False}
    assert report.tables["findings"]
    assert any(
        name.startswith("psnr[on north, north, plain -> south, plain")
        for name in report.tables["differences"]
    )
    assert all(f"- {finding}" in page and finding in out for finding in report.tables["findings"])
    names = {(m.text, m.dataset) for m in report.metrics}
    assert ("shift_auroc[north, plain]", "south") in names
    assert {data for name, data in names if name == "shift_auroc[all, plain]"} == {"clinic"}
    assert {data for name, data in names if name == "shift_auroc[north, plain]"} == {"south", "clinic"}
    assert ("psnr[south, augmented]", "clinic") in names
    for picture in ("psnr.png", "bits-per-code.png"):
        assert f"]({picture})" in page
        with Image.open(folder / picture) as shown:
            assert shown.size[0] > 300
