"""A run's folder: its recipe, where it was run, and on what data."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.configuration_utils import PreTrainedConfig

from isic_vq.evaluation.report import environment
from isic_vq.files import write_atomically
from isic_vq.models.configuration_vqvae import PRESETS
from isic_vq.training.loop import TrainingError
from isic_vq.training.recipe import PriorRecipe, RecipeError, VQVAERecipe, public_recipe

Config = TypeVar("Config", bound=PreTrainedConfig)


def build_config(config_class: type[Config], fields: dict[str, Any]) -> Config:
    """Construct a model config from a recipe's `model` section, refusing keys the class does not have.

    Raises:
        RecipeError: an unknown key (transformers would store it silently) or a value that does not fit.
    """
    fields = dict(fields)
    preset = fields.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise RecipeError(f"model.preset is {preset!r}: expected one of {sorted(PRESETS)}")
        fields = {**PRESETS[preset], **fields}
    known = {field.name for field in dataclasses.fields(config_class)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }
    unknown = sorted(set(fields) - known)
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        hint = f"; did you mean model.{close[0]}?" if close else "."
        raise RecipeError(f"unknown recipe key model.{unknown[0]}{hint} Known: {', '.join(sorted(known))}")
    try:
        return config_class(**fields)
    except Exception as error:  # strict raises its own family, not ValueError
        raise RecipeError(f"recipe model: {error}") from error


def open_run(recipe: VQVAERecipe | PriorRecipe, sources: dict[str, Any], resume: bool) -> Path:
    """Create the run's folder, or check that the one to resume was begun with the same data.

    Raises:
        TrainingError: the folder holds a run and `resume` is off, or the data have changed since it began.
    """
    run_dir = Path(recipe.output_dir)
    data = {name: dataclasses.asdict(info) for name, info in sources.items()}
    if (
        not resume and (run_dir / "metrics.jsonl").exists()
    ):  # a run that failed before its first step may start anew
        raise TrainingError(
            f"{run_dir.name} already holds a run: continue it with --resume, or choose another output_dir"
        )
    if resume and (run_dir / "run.json").exists():
        began = json.loads((run_dir / "run.json").read_text())["data"]
        for name, info in data.items():
            if began.get(name, {}).get("fingerprint") != info["fingerprint"]:
                raise TrainingError(
                    f"the {name} data differ from those the run began with: choose another output_dir"
                )
    write_atomically(run_dir / "recipe.yaml", yaml.safe_dump(public_recipe(recipe), sort_keys=False).encode())
    write_atomically(
        run_dir / "run.json", json.dumps({"data": data, "environment": environment()}, indent=2).encode()
    )
    return run_dir
