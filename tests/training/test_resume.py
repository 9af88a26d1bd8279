"""A resumed run is the same run, or it is refused before anything is written; and nothing that it reads runs code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from run_folder import digests, records, untimed

from isic_vq.data.code_cache import read_code_cache, write_code_cache
from isic_vq.training.checkpoints import CheckpointError
from isic_vq.training.load import load_recipe
from isic_vq.training.prior import train_prior
from isic_vq.training.processes import TrainingError
from isic_vq.training.recipe import PriorRecipe, RecipeError, VQVAERecipe
from isic_vq.training.vqvae import train_vqvae
from planted import plant


@pytest.fixture
def vqvae_run(tiny_run, tmp_path):
    """A copy of the finished tokenizer's run, with its checkpoints."""
    return Path(shutil.copytree(tiny_run.vqvae, tmp_path / "run"))


def recipe_of(tiny_run, folder, *overrides):
    return load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], [f"output_dir={folder}", *overrides])


def test_another_run_is_refused_by_key_before_anything_is_written(tiny_run, vqvae_run):
    validation = f"folder:{tiny_run.images['validation']}"
    before = digests(vqvae_run)
    for change, said in (
        (["loop.learning_rate=0.5"], "loop.learning_rate = 0.002, and this is 0.5"),
        (["loop.batch_size=8"], "loop.batch_size = 4, and this is 8"),
        (["model.num_codes=16"], "model.num_codes = 8, and this is 16"),
        (["model.beta=1.0"], "model.beta = None, and this is 1.0"),
        (["loop.seed=7", "augment=false"], "loop.seed = 0, and this is 7; augment = True, and this is False"),
        ([f"data.train={validation}"], "the train data differ from those of before"),
        (["data.stream=true", "loop.max_steps=9"], "data.stream = False, and this is True: resume"),
    ):
        with pytest.raises(TrainingError, match="choose another output_dir") as error:
            train_vqvae(recipe_of(tiny_run, vqvae_run, *change), resume=True)
        assert said in str(error.value)
        assert digests(vqvae_run) == before, change


def test_what_may_change_is_recorded_and_the_run_goes_on(tiny_run, vqvae_run, tmp_path):
    identifier = json.loads((vqvae_run / "run.json").read_text())["identifier"]
    moved = shutil.copytree(tiny_run.images["train"], tmp_path / "elsewhere" / "train")
    changes = ["loop.max_steps=9", "loop.save_every=3", f"data.train=folder:{moved}"]
    train_vqvae(recipe_of(tiny_run, vqvae_run, *changes), resume=True)
    run = json.loads((vqvae_run / "run.json").read_text())
    assert run["identifier"] == identifier
    assert run["changes"] == [
        {"after": "step-00000006", "key": "loop.max_steps", "from": 6, "to": 9},
        {"after": "step-00000006", "key": "loop.save_every", "from": 2, "to": 3},
    ]
    assert yaml.safe_load((vqvae_run / "recipe.yaml").read_text())["loop"]["max_steps"] == 9
    assert [record["step"] for record in records(vqvae_run, "batch")] == list(range(1, 10))
    train_vqvae(recipe_of(tiny_run, vqvae_run, "loop.max_steps=10", *changes[1:]), resume=True)
    keys = [change["key"] for change in json.loads((vqvae_run / "run.json").read_text())["changes"]]
    assert keys == ["loop.max_steps", "loop.save_every", "loop.max_steps"]


def test_a_recipe_of_an_older_version_lacks_keys_that_are_at_their_default(tiny_run, vqvae_run):
    recorded = yaml.safe_load((vqvae_run / "recipe.yaml").read_text())
    del recorded["ssim_weight"], recorded["loop"]["patience"]
    (vqvae_run / "recipe.yaml").write_text(yaml.safe_dump(recorded))
    with pytest.raises(TrainingError, match="begun with ssim_weight = 0.0, and this is 0.5: resume"):
        train_vqvae(recipe_of(tiny_run, vqvae_run, "ssim_weight=0.5"), resume=True)
    train_vqvae(recipe_of(tiny_run, vqvae_run), resume=True)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json"])
def test_a_run_that_does_not_say_what_it_is_is_refused(tiny_run, vqvae_run, name):
    for content in ("{", "[]", None):
        (vqvae_run / name).unlink() if content is None else (vqvae_run / name).write_text(content)
        with pytest.raises(TrainingError, match="run does not say how its run was begun"):
            train_vqvae(recipe_of(tiny_run, vqvae_run), resume=True)


def test_codes_of_another_tokenizer_are_other_data(tiny_run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_run.prior, tmp_path / "prior"))
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["data"]["tokenizer"]["sha256"] == read_code_cache(tiny_run.codes["train"]).tokenizer_hash
    recorded["data"]["tokenizer"]["sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(recorded))
    recipe = load_recipe(PriorRecipe, tiny_run.configs["prior"], [f"output_dir={folder}"])
    with pytest.raises(TrainingError, match="the tokenizer data differ from those of before"):
        train_prior(recipe, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_starts_again(tiny_run, vqvae_run, resume, caplog):
    """As one that was killed before its first checkpoint, with records of steps that are lost."""
    shutil.rmtree(vqvae_run / "checkpoints")
    (vqvae_run / "report.json").unlink()
    shutil.rmtree(vqvae_run / "model")
    torch.manual_seed(99)
    train_vqvae(recipe_of(tiny_run, vqvae_run), resume=resume)
    assert ("holds no checkpoint yet: the run starts at step 0" in caplog.text) == resume
    for part in ("best", "model", "arrays"):
        assert digests(vqvae_run / part) == digests(tiny_run.vqvae / part), part
    assert untimed(records(vqvae_run)) == untimed(records(tiny_run.vqvae))


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_without_checkpoints_is_not_overwritten(tiny_run, vqvae_run, resume):
    shutil.rmtree(vqvae_run / "checkpoints")
    before = digests(vqvae_run)
    with pytest.raises(TrainingError, match="holds a finished run: choose another"):
        train_vqvae(recipe_of(tiny_run, vqvae_run), resume=resume)
    assert digests(vqvae_run) == before


MEANINGLESS = """
    loop.max_grad_norm=-1 loop.max_grad_norm=0 loop.weight_decay=-0.1 loop.warmup_steps=-5 loop.seed=-1 loop.patience=-1
    loop.num_workers=-1 loop.learning_rate=.nan loop.learning_rate=.inf loop.average_decay=.nan ssim_weight=-1 ssim_weight=.nan
    data.validation_share=.nan data.max_corrupt_share=-1 model.beta=-1 model.beta=.nan model.l1_weight=.inf model.mse_weight=-2
    model.dead_code_threshold=.nan model.residual_size=0 model.hidden_sizes=[4,-8] model.ema_decay=.nan
"""


def test_numbers_without_a_meaning_are_refused_before_a_run_folder_exists(tiny_run, tmp_path):
    for override in MEANINGLESS.split():
        key = override.partition("=")[0].rpartition(".")[2]
        with pytest.raises(RecipeError, match=key):
            train_vqvae(recipe_of(tiny_run, tmp_path / "run", override))
        assert not (tmp_path / "run").exists(), override


# Nothing that is read runs code


def test_the_planted_pickle_would_run(tmp_path):
    plant(tmp_path / "file", tmp_path / "ran")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_resume_runs_no_pickle_in_any_file_of_the_run(tiny_run, vqvae_run, tmp_path):
    files = sorted(path.relative_to(vqvae_run) for path in vqvae_run.rglob("*") if path.is_file())
    newest = [name for name in files if "step-00000006" in name.parts]
    assert len(newest) >= 6
    assert all(name.suffix in (".json", ".safetensors") for name in newest), "nothing else is read"
    reference = digests(tiny_run.vqvae / "model")
    for name in [name for name in files if "step-00000004" not in name.parts]:
        folder = Path(shutil.copytree(vqvae_run, tmp_path / "planted"))
        plant(folder / name, tmp_path / "ran")
        for old_name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin"):
            plant(folder / "checkpoints" / "step-00000006" / old_name, tmp_path / "ran")
        said = {"run.json": "does not say", "recipe.yaml": "does not say", "metrics.jsonl": "is damaged"}.get(
            name.name
        )
        if said:
            with pytest.raises(TrainingError, match=said):
                train_vqvae(recipe_of(tiny_run, folder), resume=True)
        elif name.as_posix() in ("best/config.json", "best/model.safetensors"):
            with pytest.raises(OSError, match="best"):  # transformers names the file
                train_vqvae(recipe_of(tiny_run, folder), resume=True)
        else:
            train_vqvae(recipe_of(tiny_run, folder), resume=True)
            assert digests(folder / "model") == reference, f"{name}: another run"
        assert not (tmp_path / "ran").exists(), name
        shutil.rmtree(folder)


def test_a_checkpoint_of_pickles_is_refused_and_said_so(tiny_run, vqvae_run, tmp_path):
    plant(vqvae_run / "checkpoints" / "step-00000006" / "optimizer.bin", tmp_path / "ran")
    with pytest.raises(CheckpointError, match="step-00000006 holds pickles, which may run code"):
        train_vqvae(recipe_of(tiny_run, vqvae_run), resume=True)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_codes_is_no_cache(tiny_run, tmp_path):
    cache = tmp_path / "codes.parquet"
    write_code_cache(read_code_cache(tiny_run.codes["train"]), cache)
    plant(cache, tmp_path / "ran")
    overrides = [f"output_dir={tmp_path / 'run'}", f"train_codes={cache}"]
    with pytest.raises(ValueError, match="codes.parquet"):
        train_prior(load_recipe(PriorRecipe, tiny_run.configs["prior"], overrides))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
