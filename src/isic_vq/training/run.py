"""A run's folder: its recipe, its name, where it was run, on what data, and the models it leaves for others."""

import dataclasses
import difflib
import json
import secrets
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_utils import PreTrainedModel

from isic_vq.data.provenance import TrainingData, write_training_data
from isic_vq.evaluation.report import environment
from isic_vq.files import replaced_directory, write_atomically
from isic_vq.models.configuration_vqvae import PRESETS
from isic_vq.models.strict_loading import share_weights
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import Recipe, RecipeError, public_recipe

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


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's place.

    Attributes:
        folder: holds everything the run writes.
        identifier: eight hexadecimal digits; a resumed run keeps them, and so the trackers' run.
    """

    folder: Path
    identifier: str


def open_run(recipe: Recipe, sources: dict[str, Any], resume: bool, processes: Processes) -> Run:
    """Create the run's folder, or check that the one to resume was begun with the same data.

    Raises:
        TrainingError: the folder holds a run and `resume` is off, or the data have changed since it began.
    """
    folder = Path(recipe.output_dir)
    data = {name: dataclasses.asdict(info) for name, info in sources.items()}
    identifier = secrets.token_hex(4)
    # A run that failed before its first step may start anew.
    if not resume and (folder / "metrics.jsonl").exists():
        raise TrainingError(
            f"{folder.name} already holds a run: continue it with --resume, or choose another output_dir"
        )
    if resume and (folder / "run.json").exists():
        began = json.loads((folder / "run.json").read_text())
        identifier = began["identifier"]
        for name, info in data.items():
            before = began["data"].get(name, {})
            # Runs of older versions did not record the ids.
            same_images = before.get("ids_sha256") in (None, info["ids_sha256"])
            if before.get("fingerprint") != info["fingerprint"] or not same_images:
                raise TrainingError(
                    f"the {name} data differ from those the run began with: choose another output_dir"
                )
    processes.wait()  # every process has looked before one writes
    identifier = processes.from_main(identifier)
    if processes.is_main:
        began = {"identifier": identifier, "data": data, "environment": environment()}
        settings = yaml.safe_dump(public_recipe(recipe), sort_keys=False)
        write_atomically(folder / "recipe.yaml", settings.encode())
        write_atomically(folder / "run.json", json.dumps(began, indent=2).encode())
    return Run(folder, identifier)


def save_model(
    folder: Path, *parts: PreTrainedModel | ImageProcessingMixin, training_data: TrainingData | None = None
) -> None:
    """Save a model, and its image processor where it has one, for others to load: whole or not at all.

    Args:
        folder: replaced.
        parts: what is saved in it.
        training_data: what the weights were trained on, to lie beside them.
    """
    with replaced_directory(folder) as temporary:
        for part in parts:
            part.save_pretrained(temporary)
        share_weights(temporary)
        if training_data is not None:
            write_training_data(temporary, training_data)
