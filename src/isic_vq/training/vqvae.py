"""Train a VQ-VAE tokenizer: its loss, the codebook's k-means start, validation, and the averaged model.

The last step of a run compares two models on validation: the best raw one, and the averaged parameters with
BatchNorm statistics and codebook re-estimated under them. The better one becomes `model/`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from isic_vq.data.augmentation import dihedral, random_views
from isic_vq.data.loading import Batch, DecodedImages, SkipCounter, collate
from isic_vq.data.schema import DataError
from isic_vq.data.sources import SourceInfo
from isic_vq.data.splits import open_part
from isic_vq.evaluation.reconstruction import Reconstruction, evaluate_reconstruction, reconstruction_metrics
from isic_vq.evaluation.report import Report, environment
from isic_vq.files import replaced_directory
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import assignment_sums, kmeans, nearest_codes
from isic_vq.training.loop import Trainer
from isic_vq.training.recipe import DataRecipe, VQVAERecipe
from isic_vq.training.run import build_config, open_run

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

KMEANS_BATCHES = 8  # batches whose latents start the codebook
REFIT_BATCHES = 64  # batches that re-estimate statistics under averaged parameters
SHOWN_IMAGES = 12  # validation images kept for the reconstruction figure


class VQVAETask:
    """The tokenizer stage, as the loop sees it.

    Args:
        model: the tokenizer, on its device after the trainer was built.
        processor: saved beside the weights.
        train_set: training images.
        validation_set: validation images.
        recipe: the run's recipe.
    """

    averages_directly = False

    def __init__(
        self,
        model: VQVAEModel,
        processor: IsicVQImageProcessor,
        train_set: DecodedImages,
        validation_set: DecodedImages,
        recipe: VQVAERecipe,
    ):
        self.model, self.processor, self.recipe = model, processor, recipe
        self.train_set, self.validation_set = train_set, validation_set
        self.skipped = SkipCounter(recipe.data.max_corrupt_share, len(train_set) + len(validation_set))

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Join decoded images; corrupt ones are left out."""
        batch = collate(items)
        return {**batch, "size": len(batch["indices"])}

    def before_step(self, step: int) -> None:
        """Start the codebook at k-means centroids once the warm-up is over."""
        if step == self.recipe.codebook_warmup_steps:
            self.start_codebook()

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Reconstruction and quantizer losses of a batch."""
        self.skipped.count(cast(Batch, batch))
        if not len(batch["indices"]):
            raise DataError(
                f"every image of a batch is corrupt ({batch['skipped'][0]}): replace these, or raise loop.batch_size"
            )
        pixel_values = batch["pixel_values"].to(self.model.device)
        if self.recipe.augment:
            views = random_views(len(pixel_values), self.recipe.loop.seed, step).to(pixel_values.device)
            pixel_values = dihedral(pixel_values, views)
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        output = model(pixel_values, quantize=step >= self.recipe.codebook_warmup_steps)
        losses = {
            "loss": output.loss,
            "l1_loss": output.l1_loss,
            "mse_loss": output.mse_loss,
            "commitment_loss": output.commitment_loss,
        }
        if self.model.config.codebook_update == "gradient":  # else it is the commitment loss's twin
            losses["codebook_loss"] = output.codebook_loss
        if self.recipe.ssim_weight:
            similarity = structural_similarity_index_measure(
                output.reconstruction.float(), pixel_values, data_range=1.0
            )
            losses["ssim_loss"] = 1 - similarity
            losses["loss"] = losses["loss"] + self.recipe.ssim_weight * losses["ssim_loss"]
        return losses

    def images(self, dataset: torch.utils.data.Dataset) -> Iterator[Tensor]:
        """Pixel values of a data set in order, in batches; corrupt images are left out and counted."""
        loader = torch.utils.data.DataLoader(
            dataset, self.recipe.loop.batch_size, collate_fn=collate, generator=torch.Generator()
        )
        for batch in loader:
            self.skipped.count(batch)
            if len(batch["indices"]):
                yield batch["pixel_values"]

    def validate(self) -> dict[str, float]:
        """Metrics of the model on the validation images; `loss` weighs L1 and MSE as training does."""
        result = evaluate_reconstruction(self.model, self.images(self.validation_set))
        loss = self.model.config.l1_weight * result.l1 + self.model.config.mse_weight * result.mse
        return {
            "loss": loss,
            "l1_loss": result.l1,
            "mse_loss": result.mse,
            "psnr": result.psnr,
            "ssim": result.ssim,
            "usage": result.usage,
            "perplexity": result.perplexity,
        }

    def save(self, folder: Path) -> None:
        """Save the tokenizer and its image processor, whole or not at all."""
        with replaced_directory(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.processor.save_pretrained(temporary)

    @torch.no_grad()
    def start_codebook(self) -> None:
        """Put the codebook at the k-means centroids of latents of the first training images."""
        config, loop = self.model.config, self.recipe.loop
        order = torch.randperm(len(self.train_set), generator=torch.Generator().manual_seed(loop.seed))
        chosen = torch.utils.data.Subset(self.train_set, order[: KMEANS_BATCHES * loop.batch_size].tolist())
        with quantizer_frozen(self.model):
            latents = torch.cat([flat_latents(self.model, batch) for batch in self.images(chosen)])
        generator = torch.Generator().manual_seed(loop.seed)
        latents = latents[torch.randperm(len(latents), generator=generator)[: 64 * config.num_codes]]
        centroids = kmeans(latents, config.num_codes, generator)
        counts, _ = assignment_sums(latents, nearest_codes(latents, centroids), config.num_codes)
        per_step = loop.batch_size * config.grid_size**2 / len(latents)
        self.model.quantizer.start_from(centroids, counts * per_step)

    @torch.no_grad()
    def refit_statistics(self) -> None:
        """Re-estimate BatchNorm statistics and codebook under the model's present parameters."""
        loop = self.recipe.loop
        order = torch.randperm(len(self.train_set), generator=torch.Generator().manual_seed(loop.seed + 1))
        chosen = torch.utils.data.Subset(self.train_set, order[: REFIT_BATCHES * loop.batch_size].tolist())
        refit_batch_norm(self.model, self.images(chosen))
        if self.model.config.codebook_update == "ema":
            refit_codebook(self.model, self.images(chosen))
            refit_batch_norm(self.model, self.images(chosen))  # the decoder sees new vectors


def flat_latents(model: VQVAEModel, pixel_values: Tensor) -> Tensor:
    """Encoder outputs of a batch as rows `(B*h*w, D)`, float32."""
    latents = model.embed(pixel_values.to(model.device))
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()


@contextmanager
def quantizer_frozen(model: VQVAEModel) -> Iterator[None]:
    """Train mode for every module but the quantizer, which must not learn from these passes."""
    was_training = model.training
    model.train()
    model.quantizer.eval()
    try:
        yield
    finally:
        model.train(was_training)


def refit_batch_norm(model: VQVAEModel, batches: Iterator[Tensor]) -> None:
    """Replace BatchNorm's running statistics by plain averages over `batches`."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch: a cumulative average
    with quantizer_frozen(model):
        for batch in batches:
            model(batch.to(model.device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def refit_codebook(model: VQVAEModel, batches: Iterator[Tensor]) -> None:
    """Move each codebook vector to the mean of the latents assigned to it; unused ones stay."""
    model.eval()
    quantizer = model.quantizer
    counts, sums = torch.zeros_like(quantizer.cluster_size), torch.zeros_like(quantizer.code_sums)
    num_batches = 0
    for batch in batches:
        latents = flat_latents(model, batch)
        new = assignment_sums(latents, nearest_codes(latents, quantizer.codebook), quantizer.num_codes)
        counts, sums, num_batches = counts + new[0], sums + new[1], num_batches + 1
    means = sums / counts.clamp(min=1)[:, None]
    codebook = torch.where((counts > 0)[:, None], means, quantizer.codebook)
    quantizer.start_from(codebook, counts / num_batches)


def open_data(recipe: DataRecipe) -> "tuple[Dataset, Dataset, dict[str, SourceInfo]]":
    """Training and validation records, and what may be published about their sources."""
    if not recipe.train:
        raise DataError("data.train is not set: name your images, for example data.train=folder:my_images")
    if recipe.validation:
        train, train_info = open_part(recipe.train)
        validation, validation_info = open_part(recipe.validation)
    else:
        train, train_info = open_part(recipe.train, "train", recipe.validation_share)
        validation, validation_info = open_part(recipe.train, "validation", recipe.validation_share)
    return train, validation, {"train": train_info, "validation": validation_info}


def train_vqvae(recipe: VQVAERecipe, resume: bool = False) -> Reconstruction:
    """Run a recipe from its images to `model/`, `report.json` and the arrays of the figures.

    Raises:
        DataError, RecipeError, TrainingError, CheckpointError, InterruptedTraining: as their docstrings say.
    """
    config = build_config(VQVAEConfig, recipe.model)
    train_records, validation_records, sources = open_data(recipe.data)
    run_dir = open_run(recipe, sources, resume)
    torch.manual_seed(recipe.loop.seed)
    processor = IsicVQImageProcessor(size=config.image_size)
    task = VQVAETask(
        VQVAEModel(config).to(memory_format=torch.channels_last),
        processor,
        DecodedImages(train_records, processor, cache=recipe.data.cache),
        DecodedImages(validation_records, processor, cache=recipe.data.cache),
        recipe,
    )
    trainer = Trainer(task, recipe.loop, run_dir, settings={"stage": recipe.stage, **config.to_diff_dict()})
    if resume:
        trainer.resume()
    trainer.train()
    variant, result = choose_model(task, trainer, run_dir)
    write_results(task, result, variant, sources, run_dir)
    trainer.finish()
    return result


def choose_model(task: VQVAETask, trainer: Trainer, run_dir: Path) -> tuple[str, Reconstruction]:
    """Load the better of best raw and re-estimated averaged parameters into `task.model` and save it as `model/`."""
    best = VQVAEModel.from_pretrained(run_dir / "best").state_dict()
    candidates = {"raw": best}
    if trainer.averaged is not None:
        trainer.averaged.copy_to(task.model)
        task.refit_statistics()
        candidates["averaged"] = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    results = {}
    for name, state in candidates.items():
        task.model.load_state_dict(state)
        results[name] = evaluate_reconstruction(task.model, task.images(task.validation_set))
        logger.info("%s model: %.2f dB on %d images", name, results[name].psnr, results[name].num_images)
    chosen = min(results, key=lambda name: results[name].mse)
    task.model.load_state_dict(candidates[chosen])
    task.save(run_dir / "model")
    return chosen, results[chosen]


def write_results(
    task: VQVAETask, result: Reconstruction, variant: str, sources: dict[str, SourceInfo], run_dir: Path
) -> None:
    """Write `report.json` and `arrays/reconstructions.safetensors`."""
    dataset = sources["validation"].name
    Report(
        model={"type": "isic_vqvae", "weights": variant},
        metrics=reconstruction_metrics(result, "validation", dataset),
        tables={"codebook_counts": result.codebook_counts},
        environment=environment(),
    ).save(run_dir / "report.json")
    shown = torch.utils.data.Subset(task.validation_set, range(min(SHOWN_IMAGES, len(task.validation_set))))
    originals = torch.cat(list(task.images(shown))).to(task.model.device)
    reconstructions = task.model.decode(task.model.encode(originals))
    arrays = {"originals": originals, "reconstructions": reconstructions}
    folder = run_dir / "arrays"
    folder.mkdir(exist_ok=True)
    save_file(
        {
            name: torch.from_numpy(task.processor.postprocess(value, output_type="np"))
            for name, value in arrays.items()
        },
        folder / "reconstructions.safetensors",
    )
