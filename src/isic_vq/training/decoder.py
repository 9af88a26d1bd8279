"""Fine-tune a tokenizer's decoder with perceptual and adversarial losses; encoder and codebook are frozen.

Codes stay what they are, so code caches and priors stay valid. BatchNorm keeps the statistics the tokenizer came with:
what is trained is exactly what is later used. The discriminator is trained in the same backward pass as the decoder;
neither sends its gradients into the other's weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from isic_vq.data.provenance import TrainingData, read_training_data
from isic_vq.data.schema import DataError
from isic_vq.evaluation.appearance import Appearance
from isic_vq.evaluation.code_noise import disturb_codes
from isic_vq.evaluation.features import DiagnosisClassifier, FeatureModel, feature_distance, measure_features
from isic_vq.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from isic_vq.evaluation.report import Metric, Report
from isic_vq.figures.grid import paired_grid
from isic_vq.hub.pretrained import ModelError, load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEDecoder, VQVAEModel, VQVAERefinement
from isic_vq.training.discriminator import LeCam, PatchDiscriminator, discriminator_loss
from isic_vq.training.image_losses import grid_loss, spectrum_loss, ssim_loss
from isic_vq.training.image_task import ImageTask, open_images
from isic_vq.training.loop import Trainer, run_stage
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import DecoderRecipe, RecipeError
from isic_vq.training.run import save_model
from isic_vq.training.task import open_features

UNITS = {"psnr": "dB", "ssim": "1", "feature_distance": "1", "frechet_distance": "1"}


class DecoderWithCritics(nn.Module):
    """A decoder and the discriminator that judges it, as one module with one loss; features and classifier are frozen."""

    def __init__(
        self,
        decoder: VQVAEDecoder,
        features: FeatureModel,
        classifier: DiagnosisClassifier | None,
        recipe: DecoderRecipe,
    ):
        super().__init__()
        self.decoder, self.recipe = decoder, recipe
        judged = recipe.adversarial_weight > 0
        self.discriminator = PatchDiscriminator(num_layers=recipe.discriminator_layers) if judged else None
        self.lecam = LeCam() if judged and recipe.lecam_weight else None
        self.critics = (features, classifier)  # in a tuple: their parameters are not this module's

    def train(self, mode: bool = True) -> "DecoderWithCritics":
        """Keep the decoder's BatchNorm in eval mode: the statistics the tokenizer was measured with."""
        super().train(mode)
        self.decoder.eval()
        return self

    def forward(self, quantized: Tensor, codes: Tensor, images: Tensor, step: int) -> dict[str, Tensor]:
        """Losses of decoding codebook vectors `quantized` `(B, D, h, w)` against `images` `(B, 3, H, W)` in [0, 1].

        `codes` are their finest grid. The step of training decides which part learns, and by which terms.
        """
        recipe, warming_up = self.recipe, step < self.recipe.discriminator_warmup
        with torch.set_grad_enabled(torch.is_grad_enabled() and not warming_up):
            decoded = self.decoder(quantized, codes)
        terms: dict[str, tuple[Tensor, float]] = {} if warming_up else self.compare(images, decoded)
        if self.discriminator is not None:
            real, fake = self.discriminator(images).float(), self.discriminator(decoded.detach()).float()
            terms["discriminator_loss"] = (discriminator_loss(real, fake), 1)
            if self.lecam is not None:
                terms["lecam_loss"] = (self.lecam(real, fake), recipe.lecam_weight)
            if step >= recipe.adversarial_start:
                frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
                scores = functional_call(self.discriminator, frozen, decoded).float()
                terms["adversarial_loss"] = (-scores.mean(), recipe.adversarial_weight)
        loss = torch.stack([weight * value for value, weight in terms.values()]).sum()
        return {"loss": loss, **{name: value for name, (value, _) in terms.items()}}

    def compare(self, images: Tensor, decoded: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Value and weight of each term that compares decoded images with `images`, but those of weight 0."""
        recipe, (features, classifier) = self.recipe, self.critics
        difference = decoded.float() - images.float()
        terms = {
            "l1_loss": (difference.abs().mean(), recipe.l1_weight),
            "mse_loss": (difference.square().mean(), recipe.mse_weight),
        }
        if recipe.ssim_weight:
            terms["ssim_loss"] = (ssim_loss(images, decoded), recipe.ssim_weight)
        if recipe.spectrum_weight:
            terms["spectrum_loss"] = (spectrum_loss(images, decoded), recipe.spectrum_weight)
        if recipe.grid_weight:
            period = 2 ** (len(self.decoder.up) + 1)
            terms["grid_loss"] = (grid_loss(images, decoded, period), recipe.grid_weight)
        if recipe.feature_weight:
            distance = feature_distance(features, images, decoded).mean()
            terms["feature_loss"] = (distance, recipe.feature_weight)
        if classifier is not None:
            distance = (classifier(images) - classifier(decoded)).float().square().mean()
            terms["logit_loss"] = (distance, recipe.logit_weight)
        return terms


class DecoderTask(ImageTask):
    """The fine-tuning stage: `model` is a `DecoderWithCritics`; the tokenizer's decoder is trained in place."""

    averages_directly = True

    def __init__(
        self,
        whole: IsicVQModel | VQVAEModel,
        tokenizer: VQVAEModel,
        features: FeatureModel,
        classifier: DiagnosisClassifier | None,
        *images_and_recipe: Any,
    ):
        model = DecoderWithCritics(tokenizer.decoder, features, classifier, images_and_recipe[-1])
        super().__init__(model, *images_and_recipe)
        self.whole, self.tokenizer, self.features = whole, tokenizer.eval(), features

    def compiled_parts(self) -> list[nn.Module]:
        """The decoder; its critics run with frozen and with learning weights, which would compile twice."""
        return [self.tokenizer.decoder]

    def begin(self, processes: Processes) -> None:
        super().begin(processes)
        for module in (self.whole, *self.model.critics):
            if module is not None:
                module.to(processes.device)
        self.before = self.measured_metrics(state="before") if processes.is_main else []

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        images = self.pixel_values(batch)
        noise, quantizer = self.recipe.code_noise, self.tokenizer.quantizer
        codes = self.tokenizer.encode(images)
        if noise.image_share:
            code_share = noise.code_share * (1 - step / self.loop.max_steps if noise.annealed else 1)
            generator = torch.default_generator  # checkpoints hold its state
            codes = disturb_codes(
                codes, quantizer.codebook, noise.image_share, code_share, noise.num_nearest, generator
            )
        with torch.no_grad():
            quantized = quantizer.lookup(codes)
        return model(quantized, quantizer.grids(codes)[-1], images, step)

    def measure(self) -> tuple[Reconstruction, dict[str, float], Appearance]:
        """Reconstruction, feature distances and appearance on validation."""
        result = evaluate_reconstruction(self.tokenizer, self.images(self.validation_set))
        appearance = Appearance(self.tokenizer.config.downsampling)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for images, reconstructions in self.pairs(self.tokenizer):
                appearance.add(reconstructions)
                yield images, reconstructions

        return result, measure_features(self.features, pairs()), appearance

    def validate(self) -> dict[str, float]:
        """Validation metrics; `loss` is what is minimised without the terms of discriminator, logits and spectra."""
        recipe, (result, distances, _) = self.recipe, self.measure()
        feature_loss = distances["feature_distance"]
        loss = recipe.l1_weight * result.l1 + recipe.mse_weight * result.mse
        loss += recipe.ssim_weight * (1 - result.ssim)
        losses = {"l1_loss": result.l1, "mse_loss": result.mse, "feature_loss": feature_loss}
        measures = {
            "psnr": result.psnr,
            "ssim": result.ssim,
            "frechet_distance": distances["frechet_distance"],
        }
        return {"loss": loss + recipe.feature_weight * feature_loss, **losses, **measures}

    def pictures(self) -> dict[str, Image.Image]:
        pairs, _ = paired_grid(*self.shown_pairs(self.tokenizer).values())
        return {"reconstructions": pairs}

    def measured_metrics(self, **labels: str) -> list[Metric]:
        """The report's lines for the decoder as it is, with these labels."""
        on, (result, distances, appearance) = self.validation, self.measure()
        values = {"psnr": result.psnr, "ssim": result.ssim, **distances}
        lines = [
            on.metric(name, values[name], unit, result.num_images, **labels) for name, unit in UNITS.items()
        ]
        return lines + appearance.metrics(on, self.loop.seed, images="reconstructions", **labels)

    def save(self, folder: Path, training_data: TrainingData | None = None) -> None:
        save_model(folder, self.tokenizer, self.processor, training_data=training_data)

    def conclude(self, trainer: Trainer) -> Report:
        """Keep the model of the last step, averaged unless `loop.average_decay` is 0.

        The discriminator changes, and the lowest reconstruction error is no measure of looks.
        """
        if trainer.averaged is not None:
            trainer.averaged.copy_to(self.model)
        folder, before = trainer.run.folder, read_training_data(Path(resolve(self.recipe.model)))
        training_data = {"vqvae": None, **before, "decoder": self.sources["train"]}
        save_model(folder / "model", self.whole, self.processor, training_data=training_data)
        description = {
            "type": self.whole.config.model_type,
            "feature_model": Path(self.recipe.feature_model).name,
        }
        report = self.write_report(folder, description, [*self.measured_metrics(), *self.before])
        self.write_shown_pairs(self.tokenizer, folder)
        return report


def open_task(recipe: DecoderRecipe) -> DecoderTask:
    """The model whose decoder is trained, its critics, and the images of a recipe."""
    torch.manual_seed(recipe.loop.seed)
    for name in ("model", "feature_model"):
        if not getattr(recipe, name):
            raise DataError(f"{name} is not set: name it in the recipe or as {name}=PATH")
    whole, tokenizer = open_model(recipe.model)
    features = open_features(FeatureModel, recipe.feature_model)
    classifier = open_features(DiagnosisClassifier, recipe.feature_model) if recipe.logit_weight else None
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    *sets, sources = open_images(recipe.data, processor)
    noise, num_codes = recipe.code_noise, tokenizer.config.num_codes
    if noise.image_share and noise.num_nearest >= num_codes:
        raise RecipeError(
            f"code_noise.num_nearest is {noise.num_nearest}: expected fewer than the tokenizer's {num_codes} codes"
        )
    if recipe.refinement_size:
        add_refinement(tokenizer, recipe.refinement_size)
    tokenizer.to(memory_format=torch.channels_last)
    task = DecoderTask(whole, tokenizer, features, classifier, processor, *sets, recipe)
    task.sources = sources
    task.idle_parameters = recipe.discriminator_warmup > 0
    return task


def train_decoder(recipe: DecoderRecipe, resume: bool = False) -> Report | None:
    """Fine-tune a decoder: writes `model/`, a whole model if it started from one, and `report.json`; see `train_vqvae`."""
    return run_stage(open_task, recipe, resume)


def add_refinement(tokenizer: VQVAEModel, size: int) -> None:
    """Add a refinement, which changes nothing before it is trained; ModelError for a model with one of another size."""
    config, decoder = tokenizer.config, tokenizer.decoder
    if config.refinement_size == size:
        return
    if config.refinement_size:
        raise ModelError(f"refinement_size is {size}: the model's is {config.refinement_size}")
    config.refinement_size = size
    refinement = VQVAERefinement(config.num_channels, size).apply(tokenizer._init_weights)
    decoder.refinement = refinement.to(tokenizer.device, tokenizer.dtype)


def open_model(model: str) -> tuple[IsicVQModel | VQVAEModel, VQVAEModel]:
    """A whole model, or a tokenizer alone, and the tokenizer in it; ModelError if it is neither."""
    try:
        whole = load_model(IsicVQModel, model)
    except ModelError:
        tokenizer = load_model(VQVAEModel, model)
        return tokenizer, tokenizer
    return whole, whole.vqvae
