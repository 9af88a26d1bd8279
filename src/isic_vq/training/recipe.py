"""Recipes: one run is one YAML file plus `key=value` overrides; an unknown key fails.

A recipe is a dataclass checked field by field (type and range) at construction. What is saved beside the
weights is the resolved recipe with data named by URI or data set name, never by a machine's folders.
"""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

from huggingface_hub.dataclasses import strict

from isic_vq.data.classes import Classes
from isic_vq.evaluation.report import ABSOLUTE_PATH


class RecipeError(ValueError):
    """A recipe or an override that cannot be used."""


MORE_THAN_0 = (
    "max_steps",
    "batch_size",
    "accumulation_steps",
    "learning_rate",
    "max_grad_norm",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "process_timeout",
)


def check_numbers(recipe: Any, more_than_0: Collection[str] = ()) -> None:
    """Refuse numbers of a recipe that are negative or not finite: nothing in it could be.

    Args:
        recipe: a dataclass.
        more_than_0: its fields that are not 0 either.

    Raises:
        ValueError: a number is such.
    """
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not 0 <= value < math.inf or (value == 0 and field.name in more_than_0):
            expected = "more than 0" if field.name in more_than_0 else "at least 0"
            raise ValueError(f"{field.name} is {value}: expected {expected}")


@strict
@dataclasses.dataclass
class LoopRecipe:
    """How long, how fast and how carefully to train.

    Args:
        max_steps: optimizer steps.
        batch_size: images per optimizer step, over all processes and accumulated parts.
        accumulation_steps: parts a process's share of the batch is cut into, to save memory. Gradients and codebook
            statistics are those of the whole batch; BatchNorm normalises each part by its own mean and variance.
        learning_rate: peak of the schedule (linear warm-up, then cosine to zero).
        warmup_steps: optimizer steps of the warm-up.
        beta1: AdamW's decay of the mean gradient; a discriminator is usually trained with 0.5.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        average_decay: decay per step of the averaged weights; 0 turns averaging off.
        precision: "fp32", "bf16", or "auto": bf16 where the hardware multiplies it natively (AVX512-BF16, AMX), on kinds of
            devices on which this project has trained with it (CPUs). The quantizer stays in float32.
        compile: compile the nets with torch.compile: a slower start and faster steps.
        profile: write a profiler trace of a few steps to `profile/` in the run's folder.
        seed: of weights, data order and augmentation.
        eval_every: epochs between validations.
        save_every: optimizer steps between checkpoints.
        keep_checkpoints: how many checkpoints are kept.
        patience: validations without improvement after which training stops; 0 never stops early.
        num_workers: data loader processes; 0 loads in the training process.
        trackers: any of "wandb", "tensorboard", "trackio"; the JSONL metrics are always written.
        project: the trackers' project name.
        process_timeout: seconds that a process of several waits for the others before it gives up; more than a
            validation takes.
    """

    max_steps: int = 1000
    batch_size: int = 32
    accumulation_steps: int = 1
    learning_rate: float | int = 1e-3
    warmup_steps: int = 50
    beta1: float | int = 0.9
    weight_decay: float | int = 0.0
    max_grad_norm: float | int = 1.0
    average_decay: float | int = 0.999
    precision: str = "auto"
    compile: bool = False
    profile: bool = False
    seed: int = 0
    eval_every: int = 1
    save_every: int = 500
    keep_checkpoints: int = 2
    patience: int = 0
    num_workers: int = 0
    trackers: list[str] = dataclasses.field(default_factory=list)
    project: str = "isic-vq"
    process_timeout: int = 600

    def validate_ranges(self) -> None:
        """Check what the types do not say; called by `strict`."""
        check_numbers(self, MORE_THAN_0)
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}: expected 'auto', 'fp32' or 'bf16'")
        for name in ("average_decay", "beta1"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a value in [0, 1)")
        unknown = set(self.trackers) - {"wandb", "tensorboard", "trackio"}
        if unknown:
            raise ValueError(f"trackers has {sorted(unknown)}: expected any of wandb, tensorboard, trackio")


@strict
@dataclasses.dataclass
class DataRecipe:
    """Which images.

    Args:
        train: URI of the training images (`parquet:`, `folder:`, `synthetic:`, another source's, or a path).
        validation: URI of the validation images; without it a share of `train` is split off by lesion.
        stream: read the training images as they come, rather than by random access; a source that can only be read
            so is. Wants `validation`, and keeps nothing in memory or on disk.
        validation_share: that share, in (0, 1).
        licenses: train on images under these licences alone, such as [CC-0]; [] takes all. It holds for what is split
            off for validation, too, but not for images that `validation` names: these are only measured.
        classes: your own classes, a list of names, beside which ISIC's are known; "auto" takes every name that is there,
            "none" no label at all. By default ISIC's eight. A label that is neither declared nor known stops the run.
        drop_other_classes: leave out, and count, images of classes that are not declared, and validation images of classes
            that no training image has.
        max_corrupt_share: share of unreadable images past which the run fails.
        cache: keep decoded images in memory (48 KiB each at 128 pixels).
    """

    train: str = ""
    validation: str | None = None
    stream: bool = False
    validation_share: float = 0.1
    licenses: list[str] = dataclasses.field(default_factory=list)
    classes: str | list | None = None
    drop_other_classes: bool = False
    max_corrupt_share: float | int = 0.01
    cache: bool = True

    @property
    def declared_classes(self) -> Classes | None:
        """The classes as `find_source` takes them; None leaves them to the source."""
        if self.classes is None and not self.drop_other_classes:
            return None
        return Classes.parse(self.classes, self.drop_other_classes)

    def validate_classes(self) -> None:
        """Check the names of the classes; called by `strict`."""
        _ = self.declared_classes

    def validate_shares(self) -> None:
        """Check what the types do not say; called by `strict`."""
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: expected a share between 0 and 1")
        if not 0 <= self.max_corrupt_share <= 1:
            raise ValueError(f"max_corrupt_share is {self.max_corrupt_share}: expected a share from 0 to 1")


@strict
@dataclasses.dataclass
class VQVAERecipe:
    """A tokenizer run.

    Args:
        output_dir: the run's folder.
        data: which images.
        loop: how to train.
        model: fields of `VQVAEConfig`; `preset` ("f8" or "f4") fills in the others.
        codebook_warmup_steps: steps trained without quantization before the codebook starts.
        codebook_start: "kmeans" puts the codebook at k-means centroids of latents when it starts, "random" leaves
            it at its initial normal noise, as the first VQ-VAEs had it.
        ssim_weight: weight of 1 - SSIM in the loss; 0 leaves it out.
        frozen_norm_steps: in so many last steps BatchNorm normalizes by its running statistics, which then stay: what is
            trained is what will be used (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3).
        augment: show each image in a random one of its eight dihedral views.
    """

    output_dir: str = "runs/vqvae"
    stage: str = "vqvae"
    data: DataRecipe = dataclasses.field(default_factory=DataRecipe)
    loop: LoopRecipe = dataclasses.field(default_factory=LoopRecipe)
    model: dict = dataclasses.field(default_factory=dict)
    codebook_warmup_steps: int = 100
    codebook_start: str = "kmeans"
    ssim_weight: float | int = 0.0
    frozen_norm_steps: int = 0
    augment: bool = True

    def validate_warmup(self) -> None:
        """Check that the codebook is ever used; called by `strict`."""
        check_numbers(self)
        if not 0 <= self.codebook_warmup_steps < self.loop.max_steps:
            raise ValueError(
                f"codebook_warmup_steps is {self.codebook_warmup_steps}: expected at least 0 and less than "
                f"loop.max_steps ({self.loop.max_steps}), or the codebook would never start"
            )
        if not 0 <= self.frozen_norm_steps <= self.loop.max_steps - self.codebook_warmup_steps:
            raise ValueError(
                f"frozen_norm_steps is {self.frozen_norm_steps}: expected at least 0 and no more than the steps after the "
                f"codebook's warm-up ({self.loop.max_steps - self.codebook_warmup_steps})"
            )
        if self.codebook_start not in ("kmeans", "random"):
            raise ValueError(f"codebook_start is {self.codebook_start!r}: expected 'kmeans' or 'random'")


@strict
@dataclasses.dataclass
class PriorRecipe:
    """A prior run, on codes written by `isic-vq encode`.

    Args:
        output_dir: the run's folder.
        tokenizer: folder of the tokenizer that made the codes.
        train_codes: code cache of the training images.
        validation_codes: code cache of the validation images.
        loop: how to train.
        model: fields of the prior's config, and its `model_type`: "isic_pixelcnn" where there is none, or "isic_var".
            What they share with the tokenizer's config comes from there, the classes from the code cache.
        start: folder of a prior, or of a whole model, to go on from; "" starts a new one. Clusters may be added to it. Its
            parameters belong to the average from the first step.
        context_noise: largest share of an image's input codes that are replaced by random ones while targets stay, in
            [0, 1]; see `disturb_context`. 0 leaves all as they are.
        context_noise_until: share of `loop.max_steps` over which `context_noise` falls to 0, linearly.
        select_by: what chooses among validations, raw and averaged: "bits_per_code", or "frechet_distance" or "recall" of
            samples.
        feature_model: folder or Hub id of an image model, the feature space of these; with it they are measured at each
            validation. Take one that the prior will not be judged by.
        select_samples: images that they are measured on, as many as there are validation codes at most.
        num_samples: images generated at the end, for the figures.
        drop_other_classes: leave out, and count, validation images of classes that no training image has; where own
            classes were declared, they stop the run otherwise.
    """

    output_dir: str = "runs/prior"
    stage: str = "prior"
    tokenizer: str = ""
    train_codes: str = ""
    validation_codes: str = ""
    loop: LoopRecipe = dataclasses.field(default_factory=LoopRecipe)
    model: dict = dataclasses.field(default_factory=dict)
    start: str = ""
    context_noise: float | int = 0.0
    context_noise_until: float | int = 0.75
    select_by: str = "bits_per_code"
    feature_model: str = ""
    select_samples: int = 256
    num_samples: int = 64
    drop_other_classes: bool = False

    def validate_ranges(self) -> None:
        """Check what the types do not say; called by `strict`."""
        for name in ("context_noise", "context_noise_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a value in [0, 1]")
        if self.select_by not in (choices := ("bits_per_code", "frechet_distance", "recall")):
            raise ValueError(f"select_by is {self.select_by!r}: expected one of {', '.join(choices)}")
        if self.select_by != "bits_per_code" and not self.feature_model:
            raise ValueError(
                f"select_by is {self.select_by!r} and feature_model is not set: expected the feature space of samples"
            )
        if self.select_samples < 12:
            raise ValueError(
                f"select_samples is {self.select_samples}: expected at least 12, which have neighbours"
            )
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}: expected at least 1")


@strict
@dataclasses.dataclass
class CodeNoiseRecipe:
    """Codes as a prior draws them, imitated in training: some replaced by near ones (see `disturb_codes`).

    Args:
        image_share: probability that an image's codes are disturbed; 0 leaves all as they are.
        code_share: a disturbed image has a share of its codes replaced that is drawn evenly from 0 to this.
        num_nearest: each is replaced by one of so many nearest codes.
        annealed: let `code_share` fall to 0 over the run, in proportion to the steps left.
    """

    image_share: float | int = 0.0
    code_share: float | int = 1.0
    num_nearest: int = 12
    annealed: bool = False

    def validate_ranges(self) -> None:
        """Check what the types do not say; called by `strict`."""
        for name in ("image_share", "code_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a value in [0, 1]")
        if self.num_nearest < 1:
            raise ValueError(f"num_nearest is {self.num_nearest}: expected at least 1")


@strict
@dataclasses.dataclass
class DecoderRecipe:
    """A finer decoder for a trained tokenizer; encoder and codebook, and so codes and priors, stay as they are.

    Args:
        output_dir: the run's folder.
        model: folder of the tokenizer, or of the whole model, to start from.
        feature_model: folder or Hub id of an image model of transformers, yours to choose: the feature space of the
            matching term and of the report's distances.
        data: which images.
        loop: how to train.
        l1_weight: weight of the mean absolute error.
        mse_weight: weight of the mean squared error.
        ssim_weight: weight of 1 - SSIM; 0 leaves it out.
        spectrum_weight: weight of the difference of local power spectra; 0 leaves it out.
        grid_weight: weight of the loss that a grid at the decoder's own periods costs; 0 leaves it out.
        feature_weight: weight of the distance between feature maps; 0 leaves it out.
        logit_weight: weight of the squared error of logits of `feature_model`, then a classifier of diagnoses; 0 leaves it out.
        adversarial_weight: weight of the hinge loss against the discriminator; 0 leaves both out.
        adversarial_start: step from which that loss counts.
        discriminator_warmup: first steps in which the discriminator learns and the decoder does not.
        discriminator_layers: stride-2 convolutions of the discriminator, 1 to 3: it judges patches of 16, 34 or 70 pixels.
        lecam_weight: weight of LeCam's term in the discriminator's loss; 0 leaves it out.
        code_noise: training codes that are disturbed.
        refinement_size: give the decoder a refinement of so many channels if it has none; see `VQVAEConfig`.
        augment: show each image in a random one of its eight dihedral views.
    """

    output_dir: str = "runs/decoder"
    stage: str = "decoder"
    model: str = ""
    feature_model: str = ""
    data: DataRecipe = dataclasses.field(default_factory=DataRecipe)
    loop: LoopRecipe = dataclasses.field(default_factory=LoopRecipe)
    l1_weight: float | int = 1.0
    mse_weight: float | int = 5.0
    ssim_weight: float | int = 0.0
    spectrum_weight: float | int = 0.0
    grid_weight: float | int = 0.0
    feature_weight: float | int = 0.1
    logit_weight: float | int = 0.0
    adversarial_weight: float | int = 0.02
    adversarial_start: int = 100
    discriminator_warmup: int = 0
    discriminator_layers: int = 3
    lecam_weight: float | int = 0.0
    code_noise: CodeNoiseRecipe = dataclasses.field(default_factory=CodeNoiseRecipe)
    refinement_size: int = 0
    augment: bool = True

    def validate_weights(self) -> None:
        """Check that something is left to learn; called by `strict`."""
        check_numbers(self)
        if not 1 <= self.discriminator_layers <= 3:
            raise ValueError(f"discriminator_layers is {self.discriminator_layers}: expected 1, 2 or 3")
        if self.discriminator_warmup and not self.adversarial_weight:
            raise ValueError(
                "discriminator_warmup is set and adversarial_weight is 0: there is no discriminator"
            )
        if self.discriminator_warmup > self.adversarial_start:
            raise ValueError(
                f"discriminator_warmup is {self.discriminator_warmup}: expected at most adversarial_start "
                f"({self.adversarial_start}), which counts these steps, too"
            )
        if self.l1_weight + self.mse_weight == 0:
            raise ValueError("l1_weight and mse_weight are both 0: a decoder must stay close to its images")


@strict
@dataclasses.dataclass
class ClassifierRecipe:
    """An image classifier of diagnoses; images labelled `unknown` are left out.

    Args:
        output_dir: the run's folder.
        data: which images; both parts are read by random access.
        loop: how to train.
        model: fields of transformers' `ResNetConfig`; the classes are the diagnoses of the training images.
        image_size: side of the images in pixels.
        augment: show each image in a random one of its eight dihedral views, its colours changed at random.
        colour_strength: by how much at most, in [0, 1), see `random_colours`; 0 leaves colours alone.
    """

    output_dir: str = "runs/classifier"
    stage: str = "classifier"
    data: DataRecipe = dataclasses.field(default_factory=DataRecipe)
    loop: LoopRecipe = dataclasses.field(default_factory=LoopRecipe)
    model: dict = dataclasses.field(default_factory=dict)
    image_size: int = 128
    augment: bool = True
    colour_strength: float | int = 0.1

    def validate_ranges(self) -> None:
        """Check what the types do not say; called by `strict`."""
        if self.image_size < 16:
            raise ValueError(f"image_size is {self.image_size}: expected at least 16 pixels")
        if not 0 <= self.colour_strength < 1:
            raise ValueError(f"colour_strength is {self.colour_strength}: expected a value in [0, 1)")


Recipe = VQVAERecipe | PriorRecipe | DecoderRecipe | ClassifierRecipe


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a dictionary that may be published: a machine's folders are cut down to the last name."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items()}
        if isinstance(value, str) and ABSOLUTE_PATH.search(value):
            path = re.sub(r"^[A-Za-z][\w+.-]+:", "", value)  # without a scheme; a drive letter is none
            return value.removesuffix(path) + re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        return value

    return clean(dataclasses.asdict(recipe))
