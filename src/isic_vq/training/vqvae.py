"""Train a VQ-VAE tokenizer: its loss, the codebook's k-means start, validation, and the averaged model.

The last step of a run compares two models on validation: the best raw one, and the averaged parameters with
BatchNorm statistics and codebook re-estimated under them. The better one becomes `model/`.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from isic_vq.data.schema import DataError
from isic_vq.evaluation.reconstruction import Reconstruction, evaluate_reconstruction, reconstruction_metrics
from isic_vq.figures.grid import paired_grid
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import VQVAEVectorQuantizer, assignment_sums, kmeans, nearest_codes
from isic_vq.training.image_losses import ssim_loss
from isic_vq.training.image_task import ImageTask, open_images
from isic_vq.training.loop import Trainer, run_stage
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import RecipeError, VQVAERecipe
from isic_vq.training.run import build_config

KMEANS_BATCHES = 8  # batches whose latents start the codebook
REFIT_BATCHES = 64  # batches that re-estimate statistics under averaged parameters


class SharedRows:
    """Numbers the rows of tensors `(N_i, D)`, one per micro-batch and spread over processes, in sample order.

    That is micro-batch by micro-batch, and within one process by process, as `EpochBatches` cuts a batch: a run in two
    processes draws the latents that a run in one draws.
    """

    def __init__(self, parts: list[Tensor], processes: Processes):
        self.parts, self.processes = parts, processes
        sizes = torch.zeros(len(parts), processes.world, dtype=torch.float64)
        sizes[:, processes.rank] = torch.tensor([len(part) for part in parts], dtype=torch.float64)
        sizes = processes.sum(sizes).cpu().long()
        ends = sizes.flatten().cumsum(0)
        self.total = int(ends[-1])
        self.starts = (ends - sizes.flatten()).view_as(sizes)[:, processes.rank].tolist()

    def at(self, rows: Tensor) -> Tensor:
        """The rows `(R, D)` at numbers `(R,)`, int64 in [0, total); the same in every process."""
        values = self.parts[0].new_zeros(len(rows), self.parts[0].shape[1])  # 0 where another process has it
        for start, part in zip(self.starts, self.parts, strict=True):
            local = rows.to(part.device) - start
            here = (local >= 0) & (local < len(part))
            values[here] = part[local[here]]
        return self.processes.sum(values)


class SharedCodebook:
    """Updates a quantizer's codebook once per optimizer step, from the latents of all processes.

    The quantizer records its training passes from now on, and does not learn from them by itself.
    """

    def __init__(self, quantizer: VQVAEVectorQuantizer, processes: Processes):
        self.quantizer, self.processes = quantizer, processes
        quantizer.defer()

    @torch.no_grad()
    def update(self) -> Tensor | None:
        """Update the codebook; returns the perplexity of the step's codes, None if nothing was quantized."""
        passes = self.quantizer.take_deferred()
        if not passes:
            return None
        parts = [assignment_sums(latents, codes, self.quantizer.num_codes) for latents, codes in passes]
        counts, sums = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        totals = self.processes.sum(torch.cat([counts[:, None], sums], dim=1))
        counts, sums = totals[:, 0], totals[:, 1:]
        latents = [latents for latents, _ in passes]
        self.quantizer.update(counts, sums, lambda rows: SharedRows(latents, self.processes).at(rows))
        shares = counts / counts.sum()
        return torch.special.entr(shares).sum().exp()


class VQVAETask(ImageTask):
    """The tokenizer stage: `model` is a `VQVAEModel`, `recipe` a `VQVAERecipe`."""

    def compiled_parts(self) -> list[nn.Module]:
        return [self.model.encoder, self.model.decoder]

    def begin(self, processes: Processes) -> None:
        super().begin(processes)
        self.codebook = SharedCodebook(self.model.quantizer, processes)

    def before_step(self, step: int) -> None:
        if step >= self.recipe.loop.max_steps - self.recipe.frozen_norm_steps:
            freeze_batch_norm(self.model)
        if step == self.recipe.codebook_warmup_steps and self.recipe.codebook_start == "kmeans":
            self.start_codebook()

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        pixel_values = self.pixel_values(batch)
        output = model(pixel_values, quantize=step >= self.recipe.codebook_warmup_steps)
        losses = {name: output[name] for name in ("loss", "l1_loss", "mse_loss", "commitment_loss")}
        if self.model.quantizer.learns_by_loss:  # else it is the commitment loss's twin
            losses["codebook_loss"] = output.codebook_loss
        if self.recipe.ssim_weight:
            losses["ssim_loss"] = ssim_loss(pixel_values, output.reconstruction)
            losses["loss"] = losses["loss"] + self.recipe.ssim_weight * losses["ssim_loss"]
        return losses

    def after_step(self) -> dict[str, Tensor]:
        """Update the codebook from the step's latents; its perplexity is over all processes."""
        perplexity = self.codebook.update()
        return {} if perplexity is None else {"perplexity": perplexity}

    def validate(self) -> dict[str, float]:
        result = self.validated = evaluate_reconstruction(self.model, self.images(self.validation_set))
        config = self.model.config
        loss = config.l1_weight * result.l1 + config.mse_weight * result.mse
        measures = {name: getattr(result, name) for name in ("psnr", "ssim", "usage", "perplexity")}
        return {"loss": loss, "l1_loss": result.l1, "mse_loss": result.mse, **measures}

    def pictures(self) -> dict[str, Image.Image]:
        from isic_vq.figures.numbers import CodebookUse
        from isic_vq.figures.plots import codebook_usage, png_bytes

        pairs, _ = paired_grid(*self.shown_pairs(self.model).values())
        histogram = png_bytes(codebook_usage(CodebookUse(tuple(self.validated.codebook_counts))))
        return {"reconstructions": pairs, "codebook": Image.open(io.BytesIO(histogram)).convert("RGB")}

    def conclude(self, trainer: Trainer) -> Reconstruction:
        description = {"type": "isic_vqvae", "weights": self.choose_best(trainer, "mse_loss", "vqvae")}
        metrics = reconstruction_metrics(self.validated, self.validation)
        counts = self.validated.codebook_counts
        self.write_report(trainer.run.folder, description, metrics, codebook_counts=counts)
        self.write_shown_pairs(self.model, trainer.run.folder)
        return self.validated

    @torch.no_grad()
    def start_codebook(self) -> None:
        """Put the codebook at the k-means centroids of latents of the first training images of all processes."""
        config, loop, processes = self.model.config, self.recipe.loop, self.processes
        sample = self.train_set.sample(KMEANS_BATCHES * loop.batch_size, loop.seed)
        whole = len(sample) // loop.batch_size * loop.batch_size  # every process has as many batches
        batches = torch.arange(whole).split(loop.batch_size // loop.accumulation_steps)
        rows_here = torch.cat([batch[processes.part(len(batch))] for batch in batches])
        size = loop.batch_size // (loop.accumulation_steps * processes.world)
        images = list(self.images(torch.utils.data.Subset(sample, rows_here.tolist()), size))
        if processes.agree(len(images) < len(batches)):
            raise DataError("every image of a batch is corrupt: replace these, or raise loop.batch_size")
        with quantizer_frozen(self.model):
            parts = [rows_to_learn(self.model, batch, quantized=False) for batch in images]
        rows = SharedRows(parts, processes)
        generator = torch.Generator().manual_seed(loop.seed)
        latents = rows.at(torch.randperm(rows.total, generator=generator)[: 64 * config.num_codes])
        centroids = kmeans(latents, config.num_codes, generator)
        counts, _ = assignment_sums(latents, nearest_codes(latents, centroids), config.num_codes)
        # Devices may round differently; all take the main process's.
        start = torch.cat([centroids, counts[:, None]], dim=1)
        start = processes.sum(start if processes.is_main else torch.zeros_like(start))
        per_step = loop.batch_size * config.num_positions / len(latents)
        self.model.quantizer.start_from(start[:, :-1], start[:, -1] * per_step)

    @torch.no_grad()
    def refit_statistics(self) -> None:
        """Re-estimate BatchNorm statistics, unless they were frozen, and codebook under the model's present parameters."""
        loop, frozen = self.recipe.loop, self.recipe.frozen_norm_steps > 0
        chosen = self.train_set.sample(REFIT_BATCHES * loop.batch_size, loop.seed + 1)
        if not frozen:
            refit_batch_norm(self.model, self.images(chosen))
        if self.model.config.codebook_update == "ema":
            refit_codebook(self.model, self.images(chosen))
            if not frozen:
                refit_batch_norm(self.model, self.images(chosen))  # the decoder sees new vectors


def rows_to_learn(model: VQVAEModel, pixel_values: Tensor, quantized: bool = True) -> Tensor:
    """What the codebook must represent of a batch, as rows `(N, D)`; see `VQVAEVectorQuantizer.rows_to_learn`."""
    return model.quantizer.rows_to_learn(model.embed(pixel_values.to(model.device, model.dtype)), quantized)


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


def freeze_batch_norm(model: nn.Module) -> None:
    """Let BatchNorm normalize by its running statistics and leave them as they are, until the next `train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # with SyncBatchNorm
            module.eval()


class _Normalized(nn.Module):
    """The layers with BatchNorm, called as the whole model; `update_bn` leaves the quantizer's mode alone."""

    def __init__(self, model: VQVAEModel):
        super().__init__()
        self.encoder, self.decoder, self.whole = model.encoder, model.decoder, (model,)

    def forward(self, pixel_values: Tensor) -> None:
        self.whole[0](pixel_values)


def refit_batch_norm(model: VQVAEModel, batches: Iterator[Tensor]) -> None:
    """Replace BatchNorm's running statistics by plain averages over `batches`; the model is left in eval mode."""
    model.eval()  # a quantizer in train mode would learn
    update_bn(batches, _Normalized(model), model.device)
    model.eval()


def refit_codebook(model: VQVAEModel, batches: Iterator[Tensor]) -> None:
    """Move each codebook vector to the mean of the latents assigned to it; unused ones stay."""
    model.eval()
    quantizer = model.quantizer
    counts, sums = torch.zeros_like(quantizer.cluster_size), torch.zeros_like(quantizer.code_sums)
    num_batches = 0
    for batch in batches:
        latents = rows_to_learn(model, batch)
        new = assignment_sums(latents, nearest_codes(latents, quantizer.codebook), quantizer.num_codes)
        counts, sums, num_batches = counts + new[0], sums + new[1], num_batches + 1
    means = sums / counts.clamp(min=1)[:, None]
    codebook = torch.where((counts > 0)[:, None], means, quantizer.codebook)
    quantizer.start_from(codebook, counts / num_batches)


def check_kmeans(recipe: VQVAERecipe, config: VQVAEConfig, num_images: int) -> None:
    """Raise RecipeError if the codebook is to start at more centroids than the images for it have latents."""
    num_images = min(KMEANS_BATCHES, num_images // recipe.loop.batch_size) * recipe.loop.batch_size
    latents = num_images * config.num_positions
    if recipe.codebook_start == "kmeans" and 0 < latents < config.num_codes:
        raise RecipeError(
            f"model.num_codes is {config.num_codes}: expected at most {latents}, the latents of the {num_images} images that its "
            "k-means start takes; lower it, raise loop.batch_size, give more images, or set codebook_start=random"
        )


def open_task(recipe: VQVAERecipe) -> VQVAETask:
    """The images of a recipe, and a new tokenizer."""
    config = build_config(VQVAEConfig, recipe.model)
    processor = IsicVQImageProcessor(size=config.image_size)
    train_set, validation_set, sources = open_images(recipe.data, processor)
    check_kmeans(recipe, config, train_set.num_images)
    torch.manual_seed(recipe.loop.seed)
    model = VQVAEModel(config).to(memory_format=torch.channels_last)
    task = VQVAETask(model, processor, train_set, validation_set, recipe)
    task.idle_parameters = model.quantizer.learns_by_loss and recipe.codebook_warmup_steps > 0
    task.sources, task.settings = sources, config.to_diff_dict()
    return task


def train_vqvae(recipe: VQVAERecipe, resume: bool = False) -> Reconstruction | None:
    """Train a tokenizer: writes `model/`, `report.json` and the arrays of the figures; the main process returns its measures.

    Raises:
        DataError, ModelError, RecipeError, TrainingError, CheckpointError, InterruptedTraining: as their docstrings say.
    """
    return run_stage(open_task, recipe, resume)
