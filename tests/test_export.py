"""A published folder: bf16 storage, provenance, and a card that holds the reports' numbers and no others."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from isic_vq.data.code_cache import encode_source, tokenizer_hash, write_code_cache
from isic_vq.data.splits import open_part
from isic_vq.evaluation.evaluate import evaluate_checkpoint
from isic_vq.evaluation.report import Report
from isic_vq.export import export_repository, weights_license, write_card
from isic_vq.hub import load_model
from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny untrained whole model and the code cache of "its training images"."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = IsicVQModel(
        IsicVQConfig(
            vqvae_config={
                "image_size": 16,
                "hidden_sizes": (8, 8),
                "num_codes": 8,
                "code_dim": 4,
                "residual_size": 4,
            },
            prior_config={
                "num_codes": 8,
                "grid_size": 4,
                "hidden_size": 8,
                "num_layers": 1,
                "head_size": 8,
                "id2label": {0: "melanoma", 1: "nevus"},
            },
        )
    ).eval()
    model.save_pretrained(folder / "model")
    records, source = open_part("synthetic:8:0")
    cache = encode_source(model.vqvae, IsicVQImageProcessor(size=16), records, source, num_views=1)
    write_code_cache(cache, folder / "codes.parquet")
    return folder


@pytest.fixture(scope="module")
def repository(model_folder):
    """The exported folder with its report and card."""
    output = model_folder / "tiny"
    export_repository(str(model_folder / "model"), output, model_folder / "codes.parquet", bf16=False)
    report = evaluate_checkpoint(str(output), "synthetic:6:1", "validation", model_folder / "codes.parquet")
    report.save(output / "reports" / "validation.json")
    return output


@pytest.fixture
def card(repository):
    write_card(repository)
    return ModelCard.load(repository / "README.md")


def test_a_prior_stored_as_bf16_is_computed_with_in_float32_and_the_tokenizer_stays_exact(
    model_folder, tmp_path
):
    export_repository(
        str(model_folder / "model"), tmp_path / "half", model_folder / "codes.parquet", bf16=True
    )
    loaded = load_model(IsicVQModel, str(tmp_path / "half"))
    original = load_model(IsicVQModel, str(model_folder / "model"))
    for name, parameter in original.named_parameters():
        found = loaded.get_parameter(name)
        assert found.dtype == torch.float32
        expected = parameter.bfloat16().float() if name.startswith("prior.") else parameter
        assert torch.equal(found, expected), name
    assert tokenizer_hash(loaded.vqvae) == tokenizer_hash(original.vqvae)
    stored = load_file(tmp_path / "half" / "prior" / "model.safetensors")
    assert stored["prior.code_embedding.weight"].dtype == torch.bfloat16


def test_every_metric_of_the_report_is_in_the_model_index_exactly(repository, card):
    report = Report.load(repository / "reports" / "validation.json")
    published = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert published == {metric.name: metric.value for metric in report.metrics}


def test_the_metric_table_shows_the_reports_numbers_and_no_others(repository, card):
    report = Report.load(repository / "reports" / "validation.json")
    measured = card.text[card.text.index("## Measured") : card.text.index("PSNR and SSIM are means")]
    rows = [line.strip("| ").split(" | ") for line in measured.splitlines() if line.startswith("| ")][1:]
    shown = {name: float(value) for name, _, value in rows}
    assert shown == {metric.name: pytest.approx(metric.value, rel=1e-4) for metric in report.metrics}


def test_a_folder_without_a_report_gets_no_card(model_folder, tmp_path):
    export_repository(
        str(model_folder / "model"), tmp_path / "bare", model_folder / "codes.parquet", bf16=False
    )
    with pytest.raises(ValueError, match="reports is empty: run isic-vq evaluate"):
        write_card(tmp_path / "bare")


def test_provenance_carries_counts_licences_and_content_hash(repository):
    data = json.loads((repository / "provenance.json").read_text())["training_data"]
    assert data["num_images"] == 8
    assert sum(data["licenses"].values()) == 8
    assert re.fullmatch(r"[0-9a-f]{64}", data["fingerprint"])


def test_previews_exist_for_every_class_and_unconditional(repository):
    names = {path.stem for path in (repository / "previews").glob("*.png")}
    assert names == {"melanoma", "nevus", "unconditional"}


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ({"CC-0": 5}, "cc0-1.0"),
        ({"CC-0": 5, "CC-BY": 1}, "cc-by-4.0"),
        ({"CC-BY": 5, "CC-BY-NC": 1}, "cc-by-nc-4.0"),
        ({"CC-BY-NC-4.0": 5387}, "cc-by-nc-4.0"),
        ({"CC0-1.0": 8}, "cc0-1.0"),
    ],
)
def test_weights_take_the_most_restrictive_licence(licenses, expected):
    assert weights_license(licenses) == expected


def test_images_without_a_licence_make_weights_of_unknown_licence():
    assert weights_license({"CC-BY-NC": 1, "unknown": 3}) == "unknown"


def test_a_licence_that_isic_does_not_use_is_refused():
    with pytest.raises(ValueError, match="images are under 'MIT'"):
        weights_license({"MIT": 3})


def test_the_shipped_card_holds_exactly_the_shipped_reports():
    folder = Path(__file__).resolve().parents[1] / "model_cards" / "isic-vq-128"
    card = ModelCard.load(folder / "README.md")
    published = {(r.metric_type, r.dataset_split): r.metric_value for r in card.data.eval_results}
    reports = [Report.load(path) for path in sorted((folder / "reports").glob("*.json"))]
    assert published == {(m.name, m.split): m.value for report in reports for m in report.metrics}
    assert card.data.license == "cc-by-nc-4.0"
    assert "not a diagnostic device" in card.text
