"""What the training loop asks of a stage."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from isic_vq.data.provenance import TrainingData
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Metric, Report, environment
from isic_vq.hub.pretrained import ModelError
from isic_vq.training.feed import Feed
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe

logger = logging.getLogger(__name__)

AnyFeatures = TypeVar("AnyFeatures", bound=FeatureModel)


class Task:
    """A stage: its model, its data, its loss and its metrics. The methods without a default are the stage's own."""

    model: Any  # an nn.Module
    # Averaged parameters can be validated as they are (no statistics to re-estimate)
    averages_directly = False
    idle_parameters = False  # some parameters get no gradient in some steps, which DDP has to know
    fine_tunes = False  # the model is a trained one, whose parameters belong to the average
    # By name, the `SourceInfo` of data, or the sha256 of what else it is trained on
    sources: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}  # flat settings that trackers show
    validated: Any = None  # all that the last `validate` measured

    def compiled_parts(self) -> list[nn.Module]:
        """What `loop.compile` compiles: modules without random choices of Python's or data-dependent branches."""
        return [self.model]

    def begin(self, processes: Processes) -> None:
        """Get ready; the model is on its device."""
        self.processes = processes

    def feed(self, recipe: LoopRecipe, processes: Processes) -> Feed:
        """This process's share of the training data; batch["size"] of a micro-batch is its number of images."""
        raise NotImplementedError

    def check(self, batch: dict[str, Any]) -> None:
        """Raise if a batch cannot be trained on."""

    def before_epoch(self, epoch: int) -> None:
        """Prepare for an epoch or the rest of one."""

    def before_step(self, step: int) -> None:
        """Prepare for a step."""

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Scalars of a micro-batch, means over its images; `loss` is the one that is minimised."""
        raise NotImplementedError

    def after_step(self) -> dict[str, Tensor]:
        """Learn what is not learned by gradient, once per optimizer step; returns more scalars to log."""
        return {}

    def validate(self) -> dict[str, float]:
        """Validation metrics of `model` as it is, in the main process alone."""
        raise NotImplementedError

    def selection(self, metrics: dict[str, float]) -> float:
        """The number, of those of `validate`, that selects models: the smaller, the better."""
        return metrics["loss"]

    def pictures(self) -> dict[str, Image.Image]:
        """What trackers show of the last validation."""
        return {}

    def save(self, folder: Path, training_data: TrainingData | None = None) -> None:
        """Save `model` for others to load, and beside it what it was trained on."""
        raise NotImplementedError

    def refit_statistics(self) -> None:
        """Re-estimate what averaging leaves out under the model's present parameters, before they are validated."""

    def conclude(self, trainer: Any) -> Any:
        """Choose the final model, save it as `model/`, measure it and write `report.json`; in the main process alone."""
        raise NotImplementedError

    @property
    def validation(self) -> MeasuredOn:
        return MeasuredOn("validation", self.sources["validation"].name)

    def write_report(
        self, folder: Path, model: dict[str, Any], metrics: list[Metric], **tables: Any
    ) -> Report:
        report = Report(model, metrics, tables, environment())
        report.save(folder / "report.json")
        return report

    def choose_best(self, trainer: Any, by: str, part: str) -> str:
        """Save the better, by a metric of `validate`, of best raw and averaged parameters as `model/`; returns which it is.

        Afterwards `model` and `validated` are of the one chosen. `part` is what `training_data.json` calls what was trained.
        """
        model_class, config, trained = type(self.model), self.model.config, self.model.state_dict()
        # A new model: the trained one may hold SyncBatchNorm, which waits for processes that are not here.
        self.model = model_class(config).to(trainer.processes.device, memory_format=torch.channels_last)
        self.model.load_state_dict(trained)
        best = model_class.from_pretrained(trainer.run.folder / "best", use_safetensors=True)
        candidates = {"raw": best.state_dict()}
        if trainer.averaged is not None:
            trainer.averaged.copy_to(self.model)
            self.refit_statistics()
            state = self.model.state_dict()
            candidates["averaged"] = {name: tensor.clone() for name, tensor in state.items()}
        measured = {}
        for name, state in candidates.items():
            self.model.load_state_dict(state)
            measured[name] = self.validate()[by], self.validated
            logger.info("%s model: %s %.6g on validation", name, by, measured[name][0])
        chosen = min(measured, key=lambda name: measured[name][0])
        self.model.load_state_dict(candidates[chosen])
        self.validated = measured[chosen][1]
        self.save(trainer.run.folder / "model", {part: self.sources["train"]})
        return chosen


def open_features(kind: type[AnyFeatures], folder: str) -> AnyFeatures:
    """Open the `feature_model` that a recipe names, a folder or Hub id; ModelError if it cannot be read."""
    try:
        return kind.from_pretrained(folder)  # type: ignore[return-value]
    except (OSError, ValueError) as error:
        raise ModelError(f"feature_model cannot be read: {error}") from error
