"""Train a prior on cached codes, and join it with its tokenizer into the model that generates images."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from isic_vq.data.augmentation import random_views
from isic_vq.data.classes import counted, new_classes
from isic_vq.data.code_cache import CodeCache, check_tokenizer, read_code_cache
from isic_vq.data.provenance import read_training_data
from isic_vq.data.schema import DataError
from isic_vq.evaluation.likelihood import bits_per_code, likelihood_metrics
from isic_vq.evaluation.report import Report, environment
from isic_vq.figures.grid import image_grid
from isic_vq.files import write_tensors
from isic_vq.hub import load_model, resolve
from isic_vq.models.configuration_isic_vq import prior_config_class
from isic_vq.models.configuration_prior import PriorConfig
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import PRIOR_MODELS, IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.prior import PriorModel
from isic_vq.training.context_noise import annealed_share, disturb_context
from isic_vq.training.feed import RowFeed
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, PriorRecipe, RecipeError
from isic_vq.training.run import build_config, holds_output_dir, open_run, save_model

logger = logging.getLogger(__name__)

SAMPLE_BATCH = 16
SHOWN_SAMPLES = 16  # what trackers show at each validation


class CodeGrids(torch.utils.data.Dataset):
    """Items of a code cache: (codes of all views, class id, index).

    Args:
        cache: the codes.
        class_names: the prior's classes; any other diagnosis gets the unconditional id.
    """

    def __init__(self, cache: CodeCache, class_names: list[str]):
        ids = {name: index for index, name in enumerate(class_names)}
        self.codes = torch.from_numpy(cache.codes.astype("int64"))
        self.labels = torch.tensor([ids.get(name, len(class_names)) for name in cache.diagnoses])

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.codes[index], self.labels[index], index


class PriorTask:
    """The prior stage, as the loop sees it.

    Args:
        model: the prior.
        tokenizer: tells the prior of coarser scales, and decodes the samples that trackers show.
        train_set: training codes, all views.
        validation_set: validation codes; the first view is measured.
        recipe: the run's recipe.
    """

    averages_directly = True

    def __init__(
        self,
        model: PriorModel,
        tokenizer: VQVAEModel,
        train_set: CodeGrids,
        validation_set: CodeGrids,
        recipe: PriorRecipe,
    ):
        self.model, self.recipe = model, recipe
        self.whole = IsicVQModel.from_parts(tokenizer, model)
        self.train_set, self.validation_set = train_set, validation_set

    def compiled_parts(self) -> list[nn.Module]:
        """Every layer, and the head."""
        return [*self.model.layers, self.model.head]

    def begin(self, processes: Processes) -> None:
        """Bring the tokenizer to where the prior is."""
        self.whole.vqvae.to(processes.device)

    def collate(self, items: list[tuple[Tensor, Tensor, int]]) -> dict[str, Any]:
        """Stack codes `(B, views, *code shape)`, labels `(B,)` and indices `(B,)`."""
        codes, labels, indices = zip(*items, strict=True)
        return {
            "codes": torch.stack(codes),
            "labels": torch.stack(labels),
            "indices": torch.tensor(indices),
            "size": len(codes),
        }

    def feed(self, recipe: LoopRecipe, processes: Processes) -> RowFeed:
        """Training codes, in a new order each epoch."""
        return RowFeed(self.train_set, self.collate, recipe, processes)

    def check(self, batch: dict[str, Any]) -> None:
        """Codes were checked when the cache was read."""

    def before_epoch(self, epoch: int) -> None:
        """Draw the epoch's views."""
        self.views = random_views(len(self.train_set), self.recipe.loop.seed, epoch)

    def before_step(self, step: int) -> None:
        """Nothing to prepare."""

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Cross-entropy in nats per code, each image in one random view; inputs may be disturbed, targets are not."""
        codes, device = batch["codes"], self.model.device
        views = self.views[batch["indices"]] % codes.shape[1]
        chosen = codes[torch.arange(len(codes)), views].to(device, non_blocking=True)
        recipe, inputs = self.recipe, chosen
        progress = step / recipe.loop.max_steps
        if share := annealed_share(recipe.context_noise, recipe.context_noise_until, progress):
            num_codes, indices = self.model.config.num_codes, batch["indices"].tolist()
            inputs = disturb_context(chosen, num_codes, share, recipe.loop.seed, step, indices)
        context = self.whole.vqvae.context(inputs)
        return {"loss": model(inputs, batch["labels"].to(device), context, targets=chosen).loss}

    def after_step(self) -> dict[str, Tensor]:
        """Everything is learned by gradient."""
        return {}

    def validate(self) -> dict[str, float]:
        """Conditional validation loss: `loss` in nats per code, and the same in bits."""
        bits = (
            bits_per_code(self.whole, self.validation_set.codes[:, 0], self.validation_set.labels)
            .mean()
            .item()
        )
        return {"loss": bits * math.log(2), "bits_per_code": bits}

    def pictures(self) -> dict[str, Image.Image]:
        """Samples of the prior as it is, the same noise every time."""
        whole = self.whole.to(self.model.device)
        pixels = whole.generate(
            SHOWN_SAMPLES, cycled_classes(whole, SHOWN_SAMPLES), seed=self.recipe.loop.seed
        )
        processor = IsicVQImageProcessor(size=whole.config.vqvae_config.image_size)
        return {"samples": image_grid(processor.postprocess(pixels["pixel_values"], output_type="np"))}

    def save(self, folder: Path) -> None:
        """Save the prior."""
        save_model(folder, self.model)


@holds_output_dir
def train_prior(recipe: PriorRecipe, resume: bool = False) -> Report | None:
    """Run a recipe from cached codes to `model/` (tokenizer and prior), `report.json` and samples.

    Returns:
        The report, in the main process.

    Raises:
        DataError, ModelError, RecipeError, TrainingError, CheckpointError, InterruptedTraining: as their
            docstrings say.
    """
    for name in ("tokenizer", "train_codes", "validation_codes"):
        if not getattr(recipe, name):
            raise DataError(f"{name} is not set: name it in the recipe or as {name}=PATH")
    tokenizer = load_model(VQVAEModel, recipe.tokenizer)
    caches = {"train": read_code_cache(Path(recipe.train_codes))}
    caches["validation"] = read_code_cache(Path(recipe.validation_codes))
    for name, cache in caches.items():
        check_tokenizer(cache, tokenizer, f"{name}_codes")
    class_names = caches["train"].class_names()
    caches["validation"] = known_to_training(caches["validation"], class_names, recipe.drop_other_classes)
    for name, cache in caches.items():
        without = sum(diagnosis not in class_names for diagnosis in cache.diagnoses)
        logger.info(
            "%s: %d classes, %d of %d images without one",
            name,
            len(set(cache.class_names())),
            without,
            len(cache.isic_ids),
        )
    config = build_prior_config(tokenizer.config, recipe.model)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    sources = {name: cache.source for name, cache in caches.items()}
    processes = Processes(recipe.loop, Path(recipe.output_dir))
    run = open_run(recipe, sources, resume, processes, {"tokenizer": caches["train"].tokenizer_hash})
    torch.manual_seed(recipe.loop.seed)
    task = PriorTask(
        PRIOR_MODELS[config.model_type](config).to(memory_format=torch.channels_last),
        tokenizer,
        CodeGrids(caches["train"], class_names),
        CodeGrids(caches["validation"], class_names),
        recipe,
    )
    trainer = Trainer(task, recipe.loop, run, processes, {"stage": recipe.stage, **config.to_diff_dict()})
    if run.resumes:
        trainer.resume()
    trainer.train()
    if not processes.is_main:
        trainer.finish()
        return None
    run_dir = run.folder
    prior = PRIOR_MODELS[config.model_type].from_pretrained(run_dir / "best")
    model = IsicVQModel.from_parts(tokenizer, prior).to(processes.device)
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    seen_by_tokenizer = {"vqvae": None, **read_training_data(Path(resolve(recipe.tokenizer)))}
    training_data = {**seen_by_tokenizer, "prior": sources["train"]}
    save_model(run_dir / "model", model, processor, training_data=training_data)
    report = write_results(model, task, caches, recipe, run_dir)
    trainer.finish()
    return report


def known_to_training(cache: CodeCache, class_names: list[str], drop_others: bool) -> CodeCache:
    """The codes of validation images that are of the training images' classes, or of none.

    Raises:
        DataError: there are others of declared classes, and they are not to be dropped; or nothing else.
    """
    others = set(cache.class_names()).difference(class_names)
    new = Counter(name for name in cache.diagnoses if name in others)
    if not new:
        return cache
    if not drop_others:
        if cache.source.classes is not None:
            raise new_classes(new, "drop_other_classes=true")
        logger.warning(
            "validation images of classes that no training image has count as images without one: %s",
            counted(new),
        )
        return cache
    logger.info("left out, validation images of classes that no training image has: %s", counted(new))
    return cache.select([row for row, name in enumerate(cache.diagnoses) if name not in new])


def build_prior_config(tokenizer: VQVAEConfig, fields: dict[str, Any]) -> PriorConfig:
    """The config of a prior over a tokenizer's codes, of the type that the recipe's fields name.

    Raises:
        RecipeError: an unknown type, an unknown key, or a value that does not fit.
    """
    fields = dict(fields)
    try:
        config_class = prior_config_class(fields)
    except ValueError as error:
        raise RecipeError(f"recipe model: {error}") from error
    return build_config(
        config_class, {name: getattr(tokenizer, name) for name in config_class.of_tokenizer} | fields
    )


def cycled_classes(model: IsicVQModel, number: int) -> Tensor:
    """Labels `(number,)`: every class in turn, then unconditional, and so on."""
    classes = [*model.config.class_names, model.prior.config.unconditional_id]
    return torch.tensor([classes[index % len(classes)] for index in range(number)])


def write_results(
    model: IsicVQModel, task: PriorTask, caches: dict[str, CodeCache], recipe: PriorRecipe, run_dir: Path
) -> Report:
    """Write `report.json` and `arrays/samples.safetensors`: images of every class in turn, then unconditional ones."""
    validation = task.validation_set
    labels = cycled_classes(model, recipe.num_samples)
    images = [
        model.generate(len(part), part, seed=recipe.loop.seed, first_index=index * SAMPLE_BATCH)[
            "pixel_values"
        ]
        for index, part in enumerate(labels.split(SAMPLE_BATCH))
    ]
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    pixels = torch.from_numpy(processor.postprocess(torch.cat(images), output_type="np"))
    write_tensors(run_dir / "arrays" / "samples.safetensors", {"images": pixels, "labels": labels})
    names = {**model.config.class_names, model.prior.config.unconditional_id: "unconditional"}
    report = Report(
        model={"type": "isic_vq", "prior": model.prior.config.model_type},
        metrics=likelihood_metrics(
            model,
            caches["train"].counts(),
            validation.codes[:, 0],
            validation.labels,
            "validation",
            caches["validation"].source.name,
        ),
        tables={"sample_labels": [names[label] for label in labels.tolist()]},
        environment=environment(),
    )
    report.save(run_dir / "report.json")
    return report
