"""Fine-tune a tokenizer's decoder for looks: feature matching and a patch discriminator, encoder and codebook frozen.

Codes stay what they are, so code caches and priors stay valid. BatchNorm keeps the statistics the tokenizer came with:
what is trained is exactly what is later used. The discriminator is trained in the same backward pass as the decoder;
neither sends its gradients into the other's weights.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from isic_vq.data.loading import DecodedImages
from isic_vq.data.provenance import read_training_data
from isic_vq.data.schema import DataError
from isic_vq.data.streaming import StreamedImages
from isic_vq.evaluation.features import FeatureModel, feature_distance, measure_features
from isic_vq.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from isic_vq.evaluation.report import Metric, Report, environment
from isic_vq.figures.grid import paired_grid
from isic_vq.files import write_tensors
from isic_vq.hub import ModelError, load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import Decoder, VQVAEModel
from isic_vq.training.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss
from isic_vq.training.images import ImageTask, open_images
from isic_vq.training.loop import Trainer
from isic_vq.training.losses import ssim_loss
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import DecoderRecipe
from isic_vq.training.run import open_run, save_model

logger = logging.getLogger(__name__)

UNITS = {"psnr": "dB", "ssim": "1", "feature_distance": "1", "frechet_distance": "1"}


class DecoderWithCritics(nn.Module):
    """A decoder and the discriminator that judges it, as one module with one loss.

    Args:
        decoder: trained, but for its BatchNorm statistics.
        features: frozen; not part of what is saved.
        recipe: the weights of the loss.
    """

    def __init__(self, decoder: Decoder, features: FeatureModel, recipe: DecoderRecipe):
        super().__init__()
        self.decoder, self.recipe = decoder, recipe
        self.discriminator = PatchDiscriminator() if recipe.adversarial_weight else None
        self.critics = [features]  # in a list: its parameters are not this module's

    def train(self, mode: bool = True) -> "DecoderWithCritics":
        """Keep the decoder's BatchNorm in eval mode: the statistics the tokenizer was measured with."""
        super().train(mode)
        self.decoder.eval()
        return self

    def forward(self, quantized: Tensor, images: Tensor, judged: bool) -> dict[str, Tensor]:
        """Losses of decoding `quantized` `(B, D, h, w)` against `images` `(B, 3, H, W)`.

        Args:
            quantized: codebook vectors.
            images: what they should decode to, in [0, 1].
            judged: whether the discriminator's opinion counts yet.
        """
        recipe, decoded = self.recipe, self.decoder(quantized)
        difference = decoded.float() - images.float()
        losses = {"l1_loss": difference.abs().mean(), "mse_loss": difference.square().mean()}
        loss = recipe.l1_weight * losses["l1_loss"] + recipe.mse_weight * losses["mse_loss"]
        if recipe.ssim_weight:
            losses["ssim_loss"] = ssim_loss(images, decoded)
            loss = loss + recipe.ssim_weight * losses["ssim_loss"]
        if recipe.feature_weight:
            losses["feature_loss"] = feature_distance(self.critics[0], images, decoded).mean()
            loss = loss + recipe.feature_weight * losses["feature_loss"]
        if self.discriminator is not None:
            learning = discriminator_loss(self.discriminator(images), self.discriminator(decoded.detach()))
            losses["discriminator_loss"] = learning
            if judged:
                frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
                losses["adversarial_loss"] = -functional_call(self.discriminator, frozen, decoded).mean()
                weight = adaptive_weight(loss, losses["adversarial_loss"], self.decoder.to_pixels.weight)
                losses["adaptive_weight"] = weight
                loss = loss + recipe.adversarial_weight * weight * losses["adversarial_loss"]
            loss = loss + learning
        return {"loss": loss, **losses}


class DecoderTask(ImageTask):
    """The fine-tuning stage, as the loop sees it.

    Args:
        tokenizer: its decoder is trained in place.
        features: the feature space.
        processor: saved beside the weights.
        train_set: training images.
        validation_set: validation images.
        recipe: the run's recipe.
    """

    averages_directly = True

    def __init__(
        self,
        tokenizer: VQVAEModel,
        features: FeatureModel,
        processor: IsicVQImageProcessor,
        train_set: DecodedImages | StreamedImages,
        validation_set: DecodedImages,
        recipe: DecoderRecipe,
    ):
        super().__init__(processor, train_set, validation_set, recipe)
        self.tokenizer, self.features, self.recipe = tokenizer.eval(), features, recipe
        self.model = DecoderWithCritics(tokenizer.decoder, features, recipe)

    def compiled_parts(self) -> list[nn.Module]:
        """The decoder; its critics run with frozen and with learning weights, which would compile twice."""
        return [self.tokenizer.decoder]

    def before_step(self, step: int) -> None:
        """Nothing to prepare."""

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Losses of decoding the codes of a batch."""
        images = self.pixel_values(batch)
        with torch.no_grad():
            quantized = self.tokenizer.quantizer.lookup(self.tokenizer.encode(images))
        return model(quantized, images, judged=step >= self.recipe.adversarial_start)

    def after_step(self) -> dict[str, Tensor]:
        """Everything is learned by gradient."""
        return {}

    def measure(self) -> tuple[Reconstruction, dict[str, float]]:
        """Reconstruction and feature distances on validation."""
        result = evaluate_reconstruction(self.tokenizer, self.images(self.validation_set))
        return result, measure_features(self.features, self.pairs(self.tokenizer))

    def validate(self) -> dict[str, float]:
        """Validation metrics; `loss` is what is minimised but for the discriminator's opinion."""
        recipe, (result, distances) = self.recipe, self.measure()
        feature_loss = distances["feature_distance"]
        loss = recipe.l1_weight * result.l1 + recipe.mse_weight * result.mse
        loss += recipe.ssim_weight * (1 - result.ssim)
        return {
            "loss": loss + recipe.feature_weight * feature_loss,
            "l1_loss": result.l1,
            "mse_loss": result.mse,
            "feature_loss": feature_loss,
            "psnr": result.psnr,
            "ssim": result.ssim,
            "frechet_distance": distances["frechet_distance"],
        }

    def pictures(self) -> dict[str, Image.Image]:
        """Validation images above their reconstructions."""
        pairs, _ = paired_grid(*self.shown_pairs(self.tokenizer).values())
        return {"reconstructions": pairs}

    def save(self, folder: Path) -> None:
        """Save the tokenizer with its decoder as it is, and its image processor."""
        save_model(folder, self.tokenizer, self.processor)


def train_decoder(recipe: DecoderRecipe, resume: bool = False) -> Report | None:
    """Run a recipe to `model/` (whole again if it started from a whole model) and `report.json`.

    The model of the last step is kept (averaged, unless `loop.average_decay` is 0): a discriminator moves on, and the
    lowest reconstruction error is no measure of looks.

    Returns:
        The report, before and after, in the main process.

    Raises:
        DataError, ModelError, RecipeError, TrainingError, CheckpointError, InterruptedTraining: as their
            docstrings say.
    """
    for name in ("model", "feature_model"):
        if not getattr(recipe, name):
            raise DataError(f"{name} is not set: name it in the recipe or as {name}=PATH")
    model, tokenizer = open_model(recipe.model)
    try:
        features = FeatureModel.from_pretrained(recipe.feature_model)
    except (OSError, ValueError) as error:
        raise ModelError(f"feature_model cannot be read: {error}") from error
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    train_set, validation_set, sources = open_images(recipe.data, processor)
    processes = Processes(recipe.loop, Path(recipe.output_dir))
    run = open_run(recipe, sources, resume, processes)
    torch.manual_seed(recipe.loop.seed)
    model.to(processes.device)  # the tokenizer with it; it was opened on the same GPU in every process
    task = DecoderTask(
        tokenizer.to(memory_format=torch.channels_last),
        features.to(processes.device),
        processor,
        train_set,
        validation_set,
        recipe,
    )
    trainer = Trainer(task, recipe.loop, run, processes, {"stage": recipe.stage})
    dataset = sources["validation"].name
    before = measured_metrics(task, dataset, "_before") if processes.is_main else []
    if resume:
        trainer.resume()
    trainer.train()
    if not processes.is_main:
        trainer.finish()
        return None
    if trainer.averaged is not None:
        trainer.averaged.copy_to(task.model)
    training_data = {
        "vqvae": None,
        **read_training_data(Path(resolve(recipe.model))),
        "decoder": sources["train"],
    }
    save_model(run.folder / "model", model, processor, training_data=training_data)
    report = Report(
        model={"type": model.config.model_type, "feature_model": Path(recipe.feature_model).name},
        metrics=[*measured_metrics(task, dataset), *before],
        environment=environment(),
    )
    report.save(run.folder / "report.json")
    arrays = {name: torch.from_numpy(pixels) for name, pixels in task.shown_pairs(tokenizer).items()}
    write_tensors(run.folder / "arrays" / "reconstructions.safetensors", arrays)
    trainer.finish()
    return report


def measured_metrics(task: DecoderTask, dataset: str, suffix: str = "") -> list[Metric]:
    """The report's lines for the decoder as it is, `suffix` behind their names."""
    result, distances = task.measure()
    values = {"psnr": result.psnr, "ssim": result.ssim, **distances}
    return [
        Metric(name + suffix, values[name], unit, result.num_images, "validation", dataset)
        for name, unit in UNITS.items()
    ]


def open_model(model: str) -> tuple[IsicVQModel | VQVAEModel, VQVAEModel]:
    """A whole model, or a tokenizer alone, and the tokenizer in it.

    Raises:
        ModelError: it is neither.
    """
    try:
        whole = load_model(IsicVQModel, model)
    except ModelError:
        tokenizer = load_model(VQVAEModel, model)
        return tokenizer, tokenizer
    return whole, whole.vqvae
