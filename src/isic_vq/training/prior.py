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
from isic_vq.data.provenance import TrainingData, read_training_data
from isic_vq.data.schema import DataError
from isic_vq.data.splits import warn_of_shared
from isic_vq.evaluation.bits_per_code import bits_per_code, likelihood_metrics
from isic_vq.evaluation.code_noise import annealed_share, disturb_context
from isic_vq.evaluation.distances import frechet_distance, precision_recall_density_coverage
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.report import Report
from isic_vq.figures.grid import image_grid
from isic_vq.files import write_tensors
from isic_vq.hub.pretrained import ModelError, load_model, resolve
from isic_vq.models.clusters import cluster_scores, code_frequencies
from isic_vq.models.configuration_isic_vq import prior_config_class
from isic_vq.models.configuration_prior import PriorConfig
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, PRIOR_MODELS, IsicVQModel
from isic_vq.models.modeling_prior import PriorModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import kmeans
from isic_vq.training.feed import RowFeed
from isic_vq.training.loop import Trainer, run_stage
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, PriorRecipe, RecipeError
from isic_vq.training.run import build_config, known_fields, save_model
from isic_vq.training.task import Task, open_features

logger = logging.getLogger(__name__)

SHOWN_SAMPLES = 16  # what trackers show at each validation
KMEANS_ITERATIONS = 50
PSEUDO_IMAGES = 8  # of all classes' frequencies, so that a class of few images draws others' clusters, too


class CodeGrids(torch.utils.data.TensorDataset):
    """Items of a code cache: (codes of all views, class id, index); a diagnosis of no class gets the unconditional id."""

    def __init__(self, cache: CodeCache, class_names: list[str]):
        self.cache, ids = cache, {name: index for index, name in enumerate(class_names)}
        self.codes = torch.from_numpy(cache.codes.astype("int64"))
        self.labels = torch.tensor([ids.get(name, len(class_names)) for name in cache.diagnoses])
        super().__init__(self.codes, self.labels, torch.arange(len(self.codes)))


class SampleQuality:
    """Compares samples with decoded validation codes `(N, *code shape)` of the same labels, which no prior can surpass.

    Bits alone mislead, see `PriorRecipe.select_by`. The feature space is never the one that the finished prior will be judged in.
    """

    def __init__(self, features: FeatureModel, codes: Tensor, labels: Tensor, seed: int):
        self.features, self.codes, self.labels, self.seed = features, codes, labels, seed
        self.reference: Tensor | None = None

    @torch.no_grad()
    def measure(self, model: IsicVQModel) -> dict[str, float]:
        """Frechet distance and recall of samples of a model as it is; its train or eval mode is kept."""
        self.features.to(model.device)
        if self.reference is None:
            blocks = self.codes.to(model.device).split(BLOCK_SIZE)
            self.reference = self._embedded([model.decode(block) for block in blocks])
        pixel_values = model.generate(len(self.labels), self.labels, seed=self.seed).pixel_values
        samples = self._embedded(pixel_values.split(BLOCK_SIZE))
        recall = precision_recall_density_coverage(self.reference, samples)["recall"]
        return {"frechet_distance": frechet_distance(self.reference, samples), "recall": recall}

    def _embedded(self, blocks: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        processor = IsicVQImageProcessor()
        rounded = [processor.postprocess(block, output_type="pt") for block in blocks]
        return torch.cat([self.features(block).cpu() for block in rounded])


class PriorTask(Task):
    """Trains a prior; validates on view 0 of the validation codes and, with a feature model, on samples."""

    averages_directly = True

    def __init__(
        self,
        model: PriorModel,
        tokenizer: VQVAEModel,
        train_set: CodeGrids,
        validation_set: CodeGrids,
        recipe: PriorRecipe,
        features: FeatureModel | None = None,
    ):
        self.model, self.recipe, self.fine_tunes = model, recipe, bool(recipe.start)
        self.whole = IsicVQModel.from_parts(tokenizer, model)
        self.train_set, self.validation_set = train_set, validation_set
        self.samples: SampleQuality | None = None
        if features is not None:
            chosen = slice(recipe.select_samples)
            codes, labels = validation_set.codes[chosen, 0], validation_set.labels[chosen]
            self.samples = SampleQuality(features, codes, labels, recipe.loop.seed)

    def compiled_parts(self) -> list[nn.Module]:
        return [*self.model.layers, self.model.head]

    def begin(self, processes: Processes) -> None:
        super().begin(processes)
        self.whole.vqvae.to(processes.device)

    def collate(self, items: list[tuple[Tensor, ...]]) -> dict[str, Any]:
        """Stack codes `(B, views, *code shape)`, labels `(B,)` and indices `(B,)`."""
        codes, labels, indices = torch.utils.data.default_collate(items)
        return {"codes": codes, "labels": labels, "indices": indices, "size": len(codes)}

    def feed(self, recipe: LoopRecipe, processes: Processes) -> RowFeed:
        return RowFeed(self.train_set, self.collate, recipe, processes)

    def before_epoch(self, epoch: int) -> None:
        self.views = random_views(len(self.train_set), self.recipe.loop.seed, epoch)

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Cross-entropy in nats per code, each image in one random view; context noise disturbs inputs, not targets."""
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

    def validate(self) -> dict[str, float]:
        """Cross-entropy given the class in nats (`loss`) and bits per code; measures of samples with a feature model."""
        codes, labels = self.validation_set.codes[:, 0], self.validation_set.labels
        bits = bits_per_code(self.whole, codes, labels).mean().item()
        quality = {} if self.samples is None else self.samples.measure(self.whole.to(self.model.device))
        return {"loss": bits * math.log(2), "bits_per_code": bits, **quality}

    def selection(self, metrics: dict[str, float]) -> float:
        """What the recipe's `select_by` names; more recall is better."""
        name = self.recipe.select_by
        return -metrics[name] if name == "recall" else metrics[name]

    def pictures(self) -> dict[str, Image.Image]:
        whole, seed = self.whole.to(self.model.device), self.recipe.loop.seed  # the same noise every time
        output = whole.generate(SHOWN_SAMPLES, cycled_classes(whole, SHOWN_SAMPLES), seed=seed)
        pixels = IsicVQImageProcessor().postprocess(output["pixel_values"], output_type="np")
        return {"samples": image_grid(pixels)}

    def save(self, folder: Path, training_data: TrainingData | None = None) -> None:
        save_model(folder, self.model, training_data=training_data)

    def conclude(self, trainer: Trainer) -> Report:
        """Join the best prior with the tokenizer; write the whole, its report and samples of every class in turn."""
        folder, recipe, tokenizer = trainer.run.folder, self.recipe, self.whole.vqvae
        prior = type(self.model).from_pretrained(folder / "best")
        model = IsicVQModel.from_parts(tokenizer, prior).to(self.processes.device)
        processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
        training_data: dict[str, Any] = {"vqvae": None, **read_training_data(Path(resolve(recipe.tokenizer)))}
        if recipe.start:
            training_data["prior_start"] = read_training_data(Path(resolve(recipe.start))).get("prior")
        training_data["prior"] = self.sources["train"]
        save_model(folder / "model", model, processor, training_data=training_data)
        labels = cycled_classes(model, recipe.num_samples)
        images = model.generate(recipe.num_samples, labels, seed=recipe.loop.seed)["pixel_values"]
        pixels = torch.from_numpy(processor.postprocess(images, output_type="np"))
        write_tensors(folder / "arrays" / "samples.safetensors", {"images": pixels, "labels": labels})
        names = {**model.config.class_names, prior.config.unconditional_id: "unconditional"}
        counts, codes = self.train_set.cache.counts(), self.validation_set.codes[:, 0]
        metrics = likelihood_metrics(model, counts, codes, self.validation_set.labels, self.validation)
        description = {"type": "isic_vq", "prior": prior.config.model_type}
        return self.write_report(
            folder, description, metrics, sample_labels=[names[y] for y in labels.tolist()]
        )


def open_task(recipe: PriorRecipe) -> PriorTask:
    """The codes of a recipe, and a new prior; DataError, ModelError or RecipeError if they are not named or do not fit."""
    for name in ("tokenizer", "train_codes", "validation_codes"):
        if not getattr(recipe, name):
            raise DataError(f"{name} is not set: name it in the recipe or as {name}=PATH")
    tokenizer = load_model(VQVAEModel, recipe.tokenizer)
    train, validation = (read_code_cache(Path(p)) for p in (recipe.train_codes, recipe.validation_codes))
    check_tokenizer(train, tokenizer, "train_codes")
    check_tokenizer(validation, tokenizer, "validation_codes")
    warn_of_shared({"isic_id": train.isic_ids}, {"isic_id": validation.isic_ids})
    class_names = train.class_names()
    validation = known_to_training(validation, class_names, recipe.drop_other_classes)
    for name, cache in (("train", train), ("validation", validation)):
        without = sum(diagnosis not in class_names for diagnosis in cache.diagnoses)
        counts = len(set(cache.class_names())), without, len(cache.isic_ids)
        logger.info("%s: %d classes, %d of %d images without one", name, *counts)
    config = build_prior_config(tokenizer.config, recipe.model)
    if config.num_clusters > len(train.isic_ids):
        raise RecipeError(
            f"model.num_clusters is {config.num_clusters}: expected at most the {len(train.isic_ids)} training images"
        )
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    torch.manual_seed(recipe.loop.seed)
    prior = PRIOR_MODELS[config.model_type](config)
    trained = trained_prior(recipe.start, config) if recipe.start else None
    if trained is not None:
        take_over(prior, trained)
    prior = prior.to(memory_format=torch.channels_last)
    train_set, validation_set = (CodeGrids(cache, class_names) for cache in (train, validation))
    if trained is None or not trained.config.num_clusters:
        codebook = tokenizer.quantizer.codebook.cpu()
        fit_clusters(prior, codebook, train_set.codes, train_set.labels, recipe.loop.seed)
    features = open_features(FeatureModel, recipe.feature_model) if recipe.feature_model else None
    task = PriorTask(prior, tokenizer, train_set, validation_set, recipe, features)
    task.sources = {
        "train": train.source,
        "validation": validation.source,
        "tokenizer": train.tokenizer_hash,
    }
    task.settings = config.to_diff_dict()
    return task


def trained_prior(folder: str, config: PriorConfig) -> PriorModel:
    """Open the prior of a folder, alone or in a whole model; its config is this one, but for dropouts and added clusters."""
    try:
        prior = load_model(IsicVQModel, folder).prior
    except ModelError:
        prior = load_model(PRIOR_MODELS[config.model_type], folder)
    free = {"dropout", "class_dropout", *(() if prior.config.num_clusters else ("num_clusters",))}
    fields = {*known_fields(type(config)), "model_type", "id2label"} - free
    for name in sorted(fields):
        old, new = getattr(prior.config, name, None), getattr(config, name)
        if (list(old) if isinstance(old, tuple) else old) != (list(new) if isinstance(new, tuple) else new):
            raise RecipeError(f"start has {name} {old!r}, and this run {new!r}: expected the same")
    return prior.cpu()


@torch.no_grad()
def take_over(prior: PriorModel, trained: PriorModel) -> None:
    """Load a trained prior's weights; clusters that it did not have start without effect."""
    missing, _ = prior.load_state_dict(trained.state_dict(), strict=False)
    for name, parameter in prior.named_parameters():
        if name in missing:
            parameter.zero_()


@torch.no_grad()
def fit_clusters(prior: PriorModel, codebook: Tensor, codes: Tensor, labels: Tensor, seed: int) -> None:
    """Fit a prior's cluster scores, and the clusters' frequencies given each class and without one, if it has clusters.

    They are k-means of the training images' mean code vectors, the tokenizer's own, never features that samples are judged by.
    All views of an image count.

    The codebook is `(K, D)`, the training images' codes `(N, views, ...)` and labels `(N,)` are int64, N is at least C.
    """
    config = prior.config
    if not config.num_clusters:
        return
    views = codes.shape[1]
    frequencies = code_frequencies(codes.flatten(0, 1), config.sizes, config.num_codes)
    means = frequencies @ codebook.double()
    generator = torch.Generator().manual_seed(seed)
    centres = kmeans(means, config.num_clusters, generator, KMEANS_ITERATIONS)
    prior.cluster_scores.copy_(cluster_scores(codebook.double(), centres))
    clusters = prior.clusters_of(codes.flatten(0, 1))
    labels, num_classes = labels.repeat_interleave(views), config.unconditional_id
    weights = cluster_frequencies(clusters, labels, num_classes, config.num_clusters, views)
    prior.cluster_weights.copy_(weights)


def cluster_frequencies(
    clusters: Tensor, labels: Tensor, num_classes: int, num_clusters: int, views: int
) -> Tensor:
    """Frequencies of clusters given each class, and last without one, `(num_classes + 1, C)` int64 of at least 1.

    In proportion to n(y, c) + PSEUDO_IMAGES n(c) / N within a row, in whole numbers, which a codec needs. Clusters and labels
    are `(N * views,)` int64; the label `num_classes` is unconditional.
    """
    pairs = labels * num_clusters + clusters
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_clusters).view(-1, num_clusters)
    total = counts.sum(0)
    counts[-1] = total
    return counts * len(clusters) + PSEUDO_IMAGES * views * total + 1


def train_prior(recipe: PriorRecipe, resume: bool = False) -> Report | None:
    """Train a prior on cached codes: writes `model/` (tokenizer and prior), `report.json` and samples; see `train_vqvae`."""
    return run_stage(open_task, recipe, resume)


def known_to_training(cache: CodeCache, class_names: list[str], drop_others: bool) -> CodeCache:
    """Select the codes of validation images whose class is one of `class_names` or missing.

    DataError if others are of declared classes and not to be dropped, or nothing else is left.
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
    """The config of a prior over a tokenizer's codes, of the type that its fields name; RecipeError as `build_config`."""
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
