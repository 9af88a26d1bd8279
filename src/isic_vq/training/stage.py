"""A training stage from its recipe to its report: what all stages do alike."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from isic_vq.locks import hold
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import Recipe
from isic_vq.training.run import open_run
from isic_vq.training.task import Task

logger = logging.getLogger(__name__)

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def run_stage(open_task: Callable[[AnyRecipe], Task], recipe: AnyRecipe, resume: bool) -> Any:
    """Train what a recipe asks for. The main process holds the run's folder for all: two runs never write to one.

    Returns:
        What `Task.conclude` returns, in the main process; None in the others.

    Raises:
        InUseError: another run is in the folder.
        TrainingError, CheckpointError, InterruptedTraining: as `open_run` and `Trainer` have them.
    """
    folder = Path(recipe.output_dir)
    with hold(folder) if os.environ.get("RANK", "0") == "0" else nullcontext():
        task = open_task(recipe)
        processes = Processes(recipe.loop, folder, task.idle_parameters)
        run = open_run(recipe, task.sources, resume, processes)
        trainer = Trainer(task, recipe.loop, run, processes, {"stage": recipe.stage, **task.settings})
        if run.resumes:
            trainer.resume()
        trainer.train()
        result = task.conclude(trainer) if processes.is_main else None
        trainer.finish()
        return result


def choose_best(task: Task, trainer: Trainer, by: str, part: str) -> str:
    """Load the better of best raw and averaged parameters into `task.model`, and save it as `model/`.

    Args:
        task: measures; afterwards `task.validated` is of the model chosen.
        trainer: has trained.
        by: metric of `Task.validate` that is to be small.
        part: what `training_data.json` calls what was trained.

    Returns:
        "raw" or "averaged".
    """
    model_class, config, trained = type(task.model), task.model.config, task.model.state_dict()
    # A new model: the trained one may hold SyncBatchNorm, which waits for processes that are not here.
    task.model = model_class(config).to(trainer.processes.device, memory_format=torch.channels_last)
    task.model.load_state_dict(trained)
    best = model_class.from_pretrained(trainer.run.folder / "best", use_safetensors=True)
    candidates = {"raw": best.state_dict()}
    if trainer.averaged is not None:
        trainer.averaged.copy_to(task.model)
        task.refit_statistics()
        candidates["averaged"] = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    measured = {}
    for name, state in candidates.items():
        task.model.load_state_dict(state)
        measured[name] = task.validate()[by], task.validated
        logger.info("%s model: %s %.6g on validation", name, by, measured[name][0])
    chosen = min(measured, key=lambda name: measured[name][0])
    task.model.load_state_dict(candidates[chosen])
    task.validated = measured[chosen][1]
    task.save(trainer.run.folder / "model", {part: task.sources["train"]})
    return chosen
