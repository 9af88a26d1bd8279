"""The granularity study: what it says follows from its numbers, and a try is marked as one."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny_study import PRIOR, VQVAE

import granularity
from granularity import Measured, by_setting, findings
from granularity_recipe import GranularityRecipe, chains
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.training.load import load_recipe
from isic_vq.training.recipe import RecipeError
from page import SMOKE, StudyPage

RECIPE = GranularityRecipe(
    train="a", validation="b", grids={"f8": {}, "f4": {}}, num_codes=[4, 8, 16], vqvae=VQVAE, prior=PRIOR
)


def measured(psnr, coded_bytes):
    """Models of every setting and seed, from functions of (grid, codes, seed)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, generator=generator, dtype=torch.float64) * 0.01
    models = []
    for grid, num_codes, chain in all_settings():
        values = {
            "psnr": psnr(grid, num_codes, chain.seed) + noise * (1 + num_codes),
            "coded_bytes": coded_bytes(grid, num_codes, chain.seed) + noise * num_codes,
        }
        operations = {"sampling_flops": 100.0 * (4 if grid == "f4" else 1)}
        models.append(Measured(chain, values, operations, torch.ones(50, num_codes)))
    return by_setting(models)


def all_settings():
    """Grid, codes and chain of every model."""
    return [(c.labels["grid"], c.vqvae["model"]["num_codes"], c) for c in chains(RECIPE)]


def test_the_settings_are_all_grids_codes_and_seeds_first_seed_first():
    found = all_settings()
    assert [(grid, codes, chain.seed) for grid, codes, chain in found] == [
        (grid, codes, seed) for seed in (0, 1) for grid in ("f8", "f4") for codes in (4, 8, 16)
    ]
    assert len({chain.folder for *_, chain in found}) == 12
    assert all(chain.label == f"{grid}, {codes} codes" for grid, codes, chain in found)


def test_a_rising_quality_at_rising_cost_is_told_with_its_size():
    said = findings(
        measured(
            lambda g, k, s: 28 + k / 4 + (g == "f4"), lambda g, k, s: 10.0 * k * (4 if g == "f4" else 1)
        ),
        RECIPE,
    )
    assert (
        "On f8, from 4 to 8 codes: PSNR rises by 1.00 (1.00, 1.00) dB; the coded size rises by 40 (40, 40) bytes; "
        in said[0]
    )
    assert "With 4 codes, from f8 to f4: PSNR rises by 1.00" in said[4]
    assert "drawing an image takes 4.0 times the operations" in said[4]
    assert not any("gets dearer" in line for line in said), "each byte buys as much"


def test_seeds_that_disagree_are_not_averaged_into_a_finding():
    said = findings(
        measured(lambda g, k, s: 28 + (k / 4 if s == 0 else -k / 8), lambda g, k, s: 10.0 * k), RECIPE
    )
    assert "the seeds do not agree on PSNR (+0.25 (+1.00, -0.50))" in said[0]
    assert not any("is beaten by f" in line or "dearer" in line for line in said)


def test_a_setting_that_costs_more_and_shows_less_is_named():
    said = findings(
        measured(
            lambda g, k, s: 28 + k / 100 + (g == "f4"), lambda g, k, s: 10.0 * k * (0.5 if g == "f4" else 1)
        ),
        RECIPE,
    )
    assert any(line.startswith("f8 with 16 codes is beaten by f4 with 16:") for line in said)
    assert not any(line.startswith("f4 with") for line in said)


def test_diminishing_returns_are_told_where_every_seed_has_them():
    said = findings(measured(lambda g, k, s: 28 + 4 * (1 - 4 / k), lambda g, k, s: 10.0 * k), RECIPE)
    assert any(
        "On f8 detail gets dearer: a byte buys 50.0 thousandths of a dB from 4 to 8 codes and 12.5 from 8 to 16"
        in s
        for s in said
    )


@pytest.mark.slow
def test_the_command_trains_measures_and_writes_a_try_that_says_so(capsys, two_sources, tmp_path):
    recipe = {
        "stage": "granularity", "output_dir": str(tmp_path / "study"), **two_sources, "grids": {"f4": {"hidden_sizes": [4, 8]}},
        "num_codes": [4, 8], "seeds": [0, 1], "vqvae": VQVAE, "prior": PRIOR,
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(recipe))
    granularity.main([str(tmp_path / "study.yaml"), "--smoke", "-o", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert not (tmp_path / "study").exists(), "a try has a folder of its own"
    report, page = Report.load(tmp_path / "out" / "report.json"), (tmp_path / "out" / "README.md").read_text()
    assert report.model["smoke"] is True
    assert SMOKE in page.splitlines()[0]
    assert {(m.seed, m.text.partition("[")[2]) for m in report.metrics} == {
        (seed, f"f4, {k} codes]") for seed in (0, 1) for k in (4, 8)
    }
    model = load_model(IsicVQModel, str(tmp_path / "study-smoke" / "f4-4-seed0" / "prior" / "model"))
    flat = report.metrics[[m.text for m in report.metrics].index("flat_bytes[f4, 4 codes]")].value
    assert flat == model.config.vqvae_config.grid_size**2 * 2 / 8
    bits = {m.text: m.value for m in report.metrics if m.seed == 0}
    assert bits["coded_bytes[f4, 8 codes]"] == pytest.approx(16 * bits["bits_per_code[f4, 8 codes]"] / 8)
    for finding in report.tables["findings"]:
        assert finding in page
        assert finding in out
    of = report.tables["differences"]["psnr[f4, 4 codes -> f4, 8 codes]"]
    assert of["means"][0] == pytest.approx(bits["psnr[f4, 8 codes]"] - bits["psnr[f4, 4 codes]"])
    assert all(low < mean < high for mean, (low, high) in zip(of["means"], of["intervals"], strict=True))


def test_a_try_is_refused_before_anything_is_trained(two_sources, tmp_path):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({"output_dir": str(tmp_path / "study"), **two_sources})
    )
    with pytest.raises(SystemExit, match="error: .*a smoke run is no result"):
        granularity.main([str(tmp_path / "study.yaml"), "--smoke", "-o", str(tmp_path / "docs" / "x")])
    assert not list(tmp_path.rglob("model*")), "nothing was trained"


def test_a_try_is_refused_among_the_documentation(tmp_path):
    page = StudyPage("granularity", "t", "q", smoke=True)
    with pytest.raises(ValueError, match="a smoke run is no result"):
        page.write(tmp_path / "docs" / "studies")
    assert not (tmp_path / "docs").exists()


def test_an_unknown_key_of_a_recipe_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("stage: granularity\nnum_code: [4]\n")
    with pytest.raises(RecipeError, match="num_code"):
        load_recipe(GranularityRecipe, Path(tmp_path / "a.yaml"), [])
