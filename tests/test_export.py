"""A published folder: bf16 storage, marked pictures, and a provenance that names data, recipes and machines."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from isic_vq.data.code_cache import tokenizer_hash
from isic_vq.data.schema import DataError
from isic_vq.evaluation.report import ABSOLUTE_PATH
from isic_vq.figures.png import write_png
from isic_vq.hub.card import history, training_column
from isic_vq.hub.export import export_repository, record_training, write_provenance
from isic_vq.hub.pretrained import ModelError, default_checkpoint, load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from tiny_repository import write_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def repository(model_folder):
    """The exported folder of a model that lies in no run's folder."""
    output = model_folder / "tiny"
    export_repository(str(model_folder / "model"), output, model_folder / "codes.parquet", bf16=False)
    return output


@pytest.fixture
def runs(tiny_run, tmp_path, monkeypatch):
    """The tiny runs in a folder of one's own, to which the recipe's path to the tokenizer is relative."""
    for folder in (tiny_run.vqvae, tiny_run.prior):
        shutil.copytree(folder, tmp_path / folder.name)
    rewrite_recipe(tmp_path / "prior", tokenizer="vqvae/model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_fields(path):
    with Image.open(path) as picture:
        return dict(picture.info)


def rewrite_recipe(run, **fields):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **fields}))


def export_run(tiny_run, output):
    export_repository("prior/model", output, tiny_run.codes["train"], bf16=False)
    return json.loads((output / "provenance.json").read_text())


def test_what_is_stored_as_bf16_is_computed_with_in_float32_and_codes_stay_exact(model_folder, tmp_path):
    export_repository(
        str(model_folder / "model"), tmp_path / "half", model_folder / "codes.parquet", bf16=True
    )
    loaded = load_model(IsicVQModel, str(tmp_path / "half"))
    original = load_model(IsicVQModel, str(model_folder / "model"))
    for name, parameter in original.named_parameters():
        found = loaded.get_parameter(name)
        assert found.dtype == torch.float32
        rounded = name.startswith(("prior.", "vqvae.decoder."))
        expected = parameter.bfloat16().float() if rounded else parameter
        assert torch.equal(found, expected), name
    assert tokenizer_hash(loaded.vqvae) == tokenizer_hash(original.vqvae)
    for part in ("prior", "vqvae"):
        stored = load_file(tmp_path / "half" / part / "model.safetensors")
        encoder = {tensor.dtype for name, tensor in stored.items() if name.startswith("vqvae.encoder.")}
        assert torch.bfloat16 not in encoder
        assert torch.bfloat16 in {tensor.dtype for tensor in stored.values()}


def test_provenance_carries_counts_licences_and_content_hash(repository):
    data = json.loads((repository / "provenance.json").read_text())["training_data"]
    assert data["num_images"] == 8
    assert sum(data["licenses"].values()) == 8
    assert re.fullmatch(r"[0-9a-f]{64}", data["fingerprint"])


def test_the_config_carries_the_licence_of_the_training_images(repository):
    assert json.loads((repository / "config.json").read_text())["license"] == "cc0-1.0"


def written(path, licenses):
    """A copy of training data as a file that says they are under other licences; None: they are not recorded."""
    content = json.loads(path.read_text())
    for stage, name in licenses.items():
        content[stage] = name and {**content[stage], "licenses": {name: 8}}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ({"vqvae": "CC-BY-NC"}, "cc-by-nc-4.0"),  # the prior's are CC-0
        ({"vqvae": "CC-BY-4.0"}, "cc-by-4.0"),
        ({"vqvae": None}, "unknown"),
    ],
)
def test_weights_are_under_the_licences_of_the_tokenizers_images_too(
    model_folder, tmp_path, licenses, expected
):
    model = shutil.copytree(model_folder / "model", tmp_path / "model")
    written(model / "training_data.json", licenses)
    export_repository(str(model), tmp_path / "out", model_folder / "codes.parquet", bf16=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["license"] == expected
    stages = json.loads((tmp_path / "out" / "provenance.json").read_text())["training_data_by_stage"]
    assert list(stages["prior"]["licenses"]) == ["CC0-1.0"]
    assert list((stages["vqvae"] or {}).get("licenses", [])) == [*filter(None, licenses.values())]


def test_codes_that_the_prior_was_not_trained_on_are_refused(model_folder, tmp_path):
    """Else codes of images under a free licence would wash the weights clean."""
    model = shutil.copytree(model_folder / "model", tmp_path / "model")
    written(model / "training_data.json", {"prior": "CC-BY-NC"})
    with pytest.raises(
        DataError, match=r"the codes are those of synthetic:8:0 .* name the codes that it was"
    ):
        export_repository(str(model), tmp_path / "out", model_folder / "codes.parquet", bf16=False)
    assert not (tmp_path / "out").exists()


def test_the_data_of_a_tokenizer_that_older_versions_trained_come_from_its_run(tiny_run, runs):
    for stage in ("vqvae", "prior"):
        (runs / stage / "model" / "training_data.json").unlink()
    content = export_run(tiny_run, runs / "out")
    began = json.loads((runs / "vqvae" / "run.json").read_text())
    assert content["training_data_by_stage"]["vqvae"] == began["data"]["train"]


def test_recording_later_lets_the_config_name_the_licence(tiny_run, runs):
    for stage in ("vqvae", "prior"):
        (runs / stage / "model" / "training_data.json").unlink()
    (runs / "vqvae").rename(runs / "away")
    export_run(tiny_run, runs / "out")
    before = json.loads((runs / "out" / "config.json").read_text())
    assert before["license"] == "unknown"
    (runs / "away").rename(runs / "vqvae")
    record_training(runs / "out", "prior/model")
    text = (runs / "out" / "config.json").read_text()
    assert json.loads(text) == {**before, "license": "cc0-1.0"}
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_provenance_counts_the_parameters_of_both_parts(repository):
    content = json.loads((repository / "provenance.json").read_text())
    for part, count in content["num_parameters"].items():
        tensors = load_file(repository / part / "model.safetensors")
        model = load_model(IsicVQModel, str(repository))
        names = [f"{part}.{name}" for name, _ in getattr(model, part).named_parameters()]
        assert count == sum(tensors[name].numel() for name in names)


def test_previews_exist_for_every_class_and_unconditional_and_say_what_they_are(repository):
    previews = {path.stem: text_fields(path) for path in (repository / "previews").glob("*.png")}
    assert set(previews) == {"melanoma", "nevus", "unconditional"}
    for name, info in previews.items():
        assert info["Software"].startswith("isic-vq ")
        assert info["Comment"] == "synthetic images, seed 0, temperature 1, no guidance, not selected"
        assert info["Title"] == name


def test_a_marked_png_has_the_pixels_it_was_given(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_png(pixels, tmp_path / "array.png", {"Comment": "plot"})
    write_png(Image.fromarray(pixels), tmp_path / "picture.png", {"Comment": "plot"})
    for name in ("array.png", "picture.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.array(picture), pixels)


def test_a_model_outside_a_run_has_no_training_recorded(repository):
    assert json.loads((repository / "provenance.json").read_text())["training"] == {}
    assert not (repository / "figures").exists()


def test_changes_of_a_recipe_are_recorded_with_it(tiny_run, runs):
    path = runs / "prior" / "run.json"
    changes = [{"after": "step-00000004", "key": "loop.max_steps", "from": 4, "to": 6}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "changes": changes}))
    training = export_run(tiny_run, runs / "out")["training"]
    assert training["prior"]["changes"] == changes
    assert "changes" not in training["vqvae"]


def test_both_stages_are_recorded_from_their_runs(tiny_run, runs):
    content = export_run(tiny_run, runs / "out")
    assert list(content["training"]) == ["vqvae", "prior"]
    for stage, record in content["training"].items():
        assert record["recipe"] == yaml.safe_load((runs / stage / "recipe.yaml").read_text())
        assert record["environment"] == json.loads((runs / stage / "run.json").read_text())["environment"]
        log = [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text().splitlines()]
        batches = [entry for entry in log if entry["kind"] == "batch"]
        assert record["steps"] == len(batches) == 6
        pace = np.median([entry["images_per_second"] for entry in batches])
        assert record["hours"] == pytest.approx(6 * 4 / pace / 3600)
    assert content["training"]["vqvae"]["weights"] in ("raw", "averaged")


def test_figures_of_the_runs_are_plots_and_no_source_images(tiny_run, runs):
    export_run(tiny_run, runs / "out")
    found = {path.stem: text_fields(path) for path in (runs / "out" / "figures").iterdir()}
    assert set(found) == {"vqvae_epoch_loss", "prior_epoch_loss", "codebook_usage"}
    assert {info["Comment"] for info in found.values()} == {"plot"}
    assert all(info["Software"].startswith("isic-vq ") for info in found.values())


def test_a_tokenizer_run_that_is_not_found_is_not_recorded_and_named(tiny_run, runs, caplog):
    rewrite_recipe(runs / "prior", tokenizer="gone/model")
    assert list(export_run(tiny_run, runs / "out")["training"]) == ["prior"]
    assert "gone/model is not a model in a run's folder" in caplog.text


def test_a_run_that_began_with_a_repository_takes_over_its_record_and_may_replace_it(tiny_run, runs):
    before = export_run(tiny_run, Path("out"))
    shutil.copytree("prior/model", "decoder/model")
    Path("decoder/recipe.yaml").write_text(yaml.safe_dump({"stage": "decoder", "model": "out"}))
    export_repository("decoder/model", Path("out"), tiny_run.codes["train"], bf16=False)
    after = json.loads(Path("out/provenance.json").read_text())
    assert list(after["training"]) == ["vqvae", "prior", "decoder"]
    assert {stage: after["training"][stage] for stage in before["training"]} == before["training"]
    assert after["training"]["decoder"] == {"recipe": {"stage": "decoder", "model": "out"}}
    plots = {path.stem for path in Path("out/figures").iterdir()}
    assert plots == {"vqvae_epoch_loss", "prior_epoch_loss", "codebook_usage"}


def test_a_prior_that_goes_on_from_another_records_both_trainings(tiny_run, runs, caplog):
    first = export_run(tiny_run, Path("out"))["training"]["prior"]
    shutil.copytree("prior", "second")
    for start in ("prior/model", "out"):
        rewrite_recipe(Path("second"), start=start)
        export_repository("second/model", Path("again"), tiny_run.codes["train"], bf16=False)
        record = json.loads(Path("again/provenance.json").read_text())["training"]["prior"]
        assert history(record) == [record, first], start
        steps, hours = (training_column(record)[row] for row in ("optimizer steps", "time in steps"))
        assert steps == f"{first['steps']:,} after {first['steps']:,}"
        assert hours.count(" h") == 2
    rewrite_recipe(Path("second"), start="gone/model")
    export_repository("second/model", Path("again"), tiny_run.codes["train"], bf16=False)
    assert "started_from" not in json.loads(Path("again/provenance.json").read_text())["training"]["prior"]
    assert "gone/model is not a model in a run's folder" in caplog.text


def test_the_run_of_another_tokenizer_is_not_recorded(tiny_run, runs, caplog):
    path = runs / "vqvae" / "model"
    other = load_model(IsicVQModel, "prior/model").vqvae
    with torch.no_grad():
        other.quantizer.codebook += 1
    other.save_pretrained(path)
    assert list(export_run(tiny_run, runs / "out")["training"]) == ["prior"]
    assert "another tokenizer" in caplog.text


def test_a_recipe_with_an_absolute_path_is_refused(tiny_run, runs):
    rewrite_recipe(runs / "prior", train_codes=str(runs / "codes.parquet"))
    with pytest.raises(ValueError, match=r"prior/recipe.yaml names an absolute path"):
        export_run(tiny_run, runs / "out")
    assert not (runs / "out").exists()


def test_recording_later_adds_what_an_export_records_and_leaves_the_weights_alone(tiny_run, runs):
    complete = export_run(tiny_run, runs / "out")
    weights = [runs / "out" / part / "model.safetensors" for part in ("vqvae", "prior")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in weights]
    bare = {key: complete[key] for key in complete if key not in ("training", "num_parameters")}
    (runs / "out" / "provenance.json").write_text(json.dumps(bare))
    assert record_training(runs / "out", "prior/model") == ["vqvae", "prior"]
    assert json.loads((runs / "out" / "provenance.json").read_text()) == complete
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in weights] == before


def test_recording_refuses_a_folder_with_other_weights(tiny_run, runs):
    export_run(tiny_run, runs / "out")
    other = load_model(IsicVQModel, "prior/model")
    with torch.no_grad():
        other.prior.code_embedding.weight += 1
    other.save_pretrained("other")
    with pytest.raises(
        ValueError, match=r"holds other weights than the model \(prior.code_embedding.weight\)"
    ):
        record_training(runs / "out", "other")


def test_the_shipped_provenance_records_both_stages_and_may_be_published():
    text = (default_checkpoint() / "provenance.json").read_text()
    training = json.loads(text)["training"]
    assert list(training)[:2] == ["vqvae", "prior"]
    for stages in map(history, training.values()):
        assert all({"recipe", "environment", "steps", "hours"} <= set(record) for record in stages)
    assert not ABSOLUTE_PATH.search(text)


def test_a_folder_that_is_no_repository_is_not_replaced(model_folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("text")
    with pytest.raises(
        ModelError, match="thesis exists and is not a model of isic-vq: choose another output folder"
    ):
        export_repository(
            str(model_folder / "model"), tmp_path / "thesis", model_folder / "codes.parquet", bf16=False
        )
    assert (tmp_path / "thesis" / "chapter.md").read_text() == "text"


def test_a_path_of_this_machine_does_not_reach_the_provenance(tmp_path):
    with pytest.raises(ValueError, match="provenance.json would name an absolute path"):
        write_provenance(tmp_path, {"training_data": {"name": "folder:/images/mine"}})
    assert not (tmp_path / "provenance.json").exists()
