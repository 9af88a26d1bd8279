"""Recipes: one run is one YAML file plus `key=value` overrides; an unknown key fails.

A recipe is a dataclass checked field by field (type and range) at construction. The comment at a field says what it sets.
What is saved beside the weights is the resolved recipe with data named by URI or data set name, never by a machine's folders.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict

from isic_vq.data.classes import Classes
from isic_vq.evaluation.report import ABSOLUTE_PATH


class RecipeError(ValueError):
    """A recipe or an override that cannot be used."""


Range = tuple[str, Callable[[float], bool]]  # as a message names it, and whether a number is in it

# AT_LEAST_0 is the range of every number that names none.
AT_LEAST_0: Range = "at least 0", lambda number: 0 <= number < math.inf
MORE_THAN_0: Range = "more than 0", lambda number: 0 < number < math.inf
FROM_0_TO_1: Range = "a value in [0, 1]", lambda number: 0 <= number <= 1
BELOW_1: Range = "a value in [0, 1)", lambda number: 0 <= number < 1


def _at_least(least: int, why: str = "") -> Range:
    return f"at least {least}{why}", lambda number: least <= number < math.inf


def number(default: float, allowed: Range) -> Any:
    """A field that holds a number in a range."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def choice(default: str, *others: str) -> Any:
    """A field that holds one of some texts."""
    *first, last = map(repr, (default, *others))
    allowed = f"{', '.join(first)} or {last}", (default, *others).__contains__
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def nested(kind: type) -> Any:
    """A field that holds a recipe of its own, or an empty list or dictionary."""
    return dataclasses.field(default_factory=kind)


class CheckedFields:
    """Checks the values of a recipe's `number` and `choice` fields when it is made."""

    def validate_fields(self) -> None:  # `strict` calls every method of such a name
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            allowed = field.metadata.get("allowed", AT_LEAST_0 if type(value) in (int, float) else None)
            if allowed is not None and not allowed[1](value):
                raise ValueError(f"{field.name} is {value!r}: expected {allowed[0]}")


@strict
@dataclasses.dataclass
class LoopRecipe(CheckedFields):
    """How long, how fast and how carefully to train."""

    max_steps: int = number(1000, MORE_THAN_0)  # optimizer steps
    # Images per optimizer step, over all processes and accumulated parts.
    batch_size: int = number(32, MORE_THAN_0)
    # Parts that a process's share of the batch is cut into, to save memory. Gradients and codebook statistics are those
    # of the whole batch; BatchNorm normalizes each part by its own mean and variance.
    accumulation_steps: int = number(1, MORE_THAN_0)
    # Peak: after a linear warm-up a cosine falls to zero.
    learning_rate: float | int = number(1e-3, MORE_THAN_0)
    warmup_steps: int = 50  # optimizer steps of the warm-up
    # AdamW's decay of the mean gradient; 0.5 beside a discriminator.
    beta1: float | int = number(0.9, BELOW_1)
    weight_decay: float | int = 0.0  # AdamW's
    max_grad_norm: float | int = number(1.0, MORE_THAN_0)  # gradients are clipped to this norm
    # Decay per step of the averaged weights; 0: no averaging.
    average_decay: float | int = number(0.999, BELOW_1)
    # "auto" is bf16 where the hardware multiplies it natively (AVX512-BF16, AMX), on kinds of devices on which this project
    # has trained with it (CPUs). The quantizer stays in float32.
    precision: str = choice("auto", "fp32", "bf16")
    compile: bool = False  # torch.compile: a slower start and faster steps
    profile: bool = False  # write a profiler trace of a few steps to `profile/` in the run's folder
    seed: int = 0  # of weights, data order and augmentation
    eval_every: int = number(1, MORE_THAN_0)  # epochs between validations
    save_every: int = number(500, MORE_THAN_0)  # optimizer steps between checkpoints
    keep_checkpoints: int = number(2, MORE_THAN_0)  # the newest ones
    patience: int = 0  # validations without improvement after which training stops; 0 never stops early
    num_workers: int = 0  # data loader processes; 0 loads in the training process
    trackers: list[str] = nested(list)  # any of wandb, tensorboard, trackio; metrics.jsonl is always written
    project: str = "isic-vq"  # the trackers' project
    # Seconds that a process of several waits for the others before it gives up; more than a validation takes.
    process_timeout: int = number(600, MORE_THAN_0)

    def validate_trackers(self) -> None:
        unknown = set(self.trackers) - {"wandb", "tensorboard", "trackio"}
        if unknown:
            raise ValueError(f"trackers has {sorted(unknown)}: expected any of wandb, tensorboard, trackio")


@strict
@dataclasses.dataclass
class DataRecipe(CheckedFields):
    """Which images."""

    # URI (`parquet:`, `folder:`, `synthetic:`, another source's) or path of the training images.
    train: str = ""
    validation: str | None = None  # of the validation images; None splits a share of `train` off by lesion
    # Read the training images in order rather than by random access, as a source that cannot do otherwise is read. Needs
    # `validation`, and keeps nothing in memory or on disk.
    stream: bool = False
    validation_share: float = number(0.1, ("a share between 0 and 1", lambda share: 0 < share < 1))
    # Train on images under these licences alone, such as [CC-0]; [] takes all. It holds for what is split off for validation,
    # too, but not for images that `validation` names: these are only measured.
    licenses: list[str] = nested(list)
    # Your own classes, a list of names, beside which ISIC's are known; "auto" takes every name that occurs, "none" no label
    # at all. By default ISIC's eight. A label that is neither declared nor known stops the run.
    classes: str | list | None = None
    # Leave out, and count, images of classes that are not declared, and validation images of classes that no training
    # image has.
    drop_other_classes: bool = False
    # Of unreadable images, past which the run fails.
    max_corrupt_share: float | int = number(0.01, FROM_0_TO_1)
    cache: bool = True  # keep decoded images in memory (48 KiB each at 128 pixels)

    @property
    def declared_classes(self) -> Classes | None:
        """Classes that the recipe declares, for `find_source`; None: those of the source."""
        if self.classes is None and not self.drop_other_classes:
            return None
        return Classes.parse(self.classes, self.drop_other_classes)

    def validate_classes(self) -> None:
        _ = self.declared_classes


@strict
@dataclasses.dataclass
class VQVAERecipe(CheckedFields):
    """A tokenizer run."""

    output_dir: str = "runs/vqvae"
    stage: str = "vqvae"
    data: DataRecipe = nested(DataRecipe)
    loop: LoopRecipe = nested(LoopRecipe)
    model: dict = nested(dict)  # fields of `VQVAEConfig`; `preset` ("f8" or "f4") fills in the others
    codebook_warmup_steps: int = 100  # steps trained without quantization before the codebook starts
    # "kmeans" starts the codebook at k-means centroids of latents, "random" leaves it at its initial normal noise, as the
    # first VQ-VAEs had it.
    codebook_start: str = choice("kmeans", "random")
    ssim_weight: float | int = 0.0  # of 1 - SSIM in the loss
    # Last steps in which BatchNorm normalizes by its running statistics, which then stay: what is trained is what will be
    # used (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3).
    frozen_norm_steps: int = 0
    augment: bool = True  # show each image in a random one of its eight dihedral views

    def validate_warmup(self) -> None:
        if self.codebook_warmup_steps >= self.loop.max_steps:
            raise ValueError(
                f"codebook_warmup_steps is {self.codebook_warmup_steps}: expected at least 0 and less than "
                f"loop.max_steps ({self.loop.max_steps}), or the codebook would never start"
            )
        steps_with_codebook = self.loop.max_steps - self.codebook_warmup_steps
        if self.frozen_norm_steps > steps_with_codebook:
            raise ValueError(
                f"frozen_norm_steps is {self.frozen_norm_steps}: expected at least 0 and no more than the steps after the "
                f"codebook's warm-up ({steps_with_codebook})"
            )


@strict
@dataclasses.dataclass
class PriorRecipe(CheckedFields):
    """A prior run, on codes written by `isic-vq encode`."""

    output_dir: str = "runs/prior"
    stage: str = "prior"
    tokenizer: str = ""  # folder of the tokenizer that made the codes
    train_codes: str = ""  # code cache of the training images
    validation_codes: str = ""  # and of the validation images
    loop: LoopRecipe = nested(LoopRecipe)
    # Fields of the prior's config, and its `model_type`: "isic_pixelcnn" by default, or "isic_var". What it shares with the
    # tokenizer's config is taken from that, the classes from the code cache.
    model: dict = nested(dict)
    # Folder of a prior, or of a whole model, whose training continues; "" starts a new one. Clusters may be added to it. Its
    # parameters belong to the average from the first step.
    start: str = ""
    # Largest share of an image's input codes that are replaced by random ones while targets stay; see `disturb_context`.
    context_noise: float | int = number(0.0, FROM_0_TO_1)
    # Share of `loop.max_steps` over which `context_noise` falls to 0, linearly.
    context_noise_until: float | int = number(0.75, FROM_0_TO_1)
    # The measure that chooses among validations, raw and averaged; the last two are of samples and need `feature_model`.
    select_by: str = choice("bits_per_code", "frechet_distance", "recall")
    # Folder or Hub id of an image model: the feature space in which samples are measured at each validation. Take one that
    # the prior will not be judged by.
    feature_model: str = ""
    # Number of samples that are measured, limited to the number of validation codes.
    select_samples: int = number(256, _at_least(12, ", which have neighbours"))
    num_samples: int = number(64, _at_least(1))  # images generated at the end, for the figures
    # Leave out, and count, validation images of classes that no training image has; without it they stop the run where own
    # classes were declared.
    drop_other_classes: bool = False

    def validate_selection(self) -> None:
        if self.select_by != "bits_per_code" and not self.feature_model:
            raise ValueError(f"select_by is {self.select_by!r}: expected a feature_model beside it")


@strict
@dataclasses.dataclass
class CodeNoiseRecipe(CheckedFields):
    """Training codes disturbed as a prior's are: some replaced by near ones; see `disturb_codes`."""

    image_share: float | int = number(0.0, FROM_0_TO_1)  # probability that an image's codes are disturbed
    # A disturbed image has a share of its codes replaced that is drawn evenly from 0 to this.
    code_share: float | int = number(1.0, FROM_0_TO_1)
    num_nearest: int = number(12, _at_least(1))  # nearest codes from which the replacement is drawn
    annealed: bool = False  # let `code_share` fall to 0 over the run, in proportion to the steps left


@strict
@dataclasses.dataclass
class DecoderRecipe(CheckedFields):
    """A finer decoder for a trained tokenizer; encoder and codebook, and so codes and priors, stay as they are.

    A weight of 0 leaves its term out.
    """

    output_dir: str = "runs/decoder"
    stage: str = "decoder"
    model: str = ""  # folder of the tokenizer, or of the whole model, to start from
    # Folder or Hub id of an image model of transformers, yours to choose: the feature space of the matching term and of the
    # report's distances.
    feature_model: str = ""
    data: DataRecipe = nested(DataRecipe)
    loop: LoopRecipe = nested(LoopRecipe)
    l1_weight: float | int = 1.0  # mean absolute error
    mse_weight: float | int = 5.0  # mean squared error
    ssim_weight: float | int = 0.0  # 1 - SSIM
    spectrum_weight: float | int = 0.0  # difference of local power spectra
    grid_weight: float | int = 0.0  # errors that stand out at the decoder's own periods
    feature_weight: float | int = 0.1  # distance between feature maps
    # Squared error of logits of `feature_model`, which is then a classifier of diagnoses.
    logit_weight: float | int = 0.0
    adversarial_weight: float | int = 0.02  # hinge loss against the discriminator; 0 leaves both out
    adversarial_start: int = 100  # step from which that loss counts
    discriminator_warmup: int = 0  # first steps in which the discriminator learns and the decoder does not
    # Stride-2 convolutions of the discriminator: it judges patches of 16, 34 or 70 pixels.
    discriminator_layers: int = number(3, ("1, 2 or 3", lambda layers: layers in (1, 2, 3)))
    lecam_weight: float | int = 0.0  # LeCam's term in the discriminator's loss
    code_noise: CodeNoiseRecipe = nested(CodeNoiseRecipe)
    refinement_size: int = 0  # channels of a refinement for a decoder that has none; see `VQVAEConfig`
    augment: bool = True  # show each image in a random one of its eight dihedral views

    def validate_weights(self) -> None:
        if self.discriminator_warmup and not self.adversarial_weight:
            raise ValueError(
                f"discriminator_warmup is {self.discriminator_warmup}: expected 0 without adversarial_weight"
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
class ClassifierRecipe(CheckedFields):
    """An image classifier of diagnoses; images labelled `unknown` are left out."""

    output_dir: str = "runs/classifier"
    stage: str = "classifier"
    data: DataRecipe = nested(DataRecipe)  # both parts are read by random access
    loop: LoopRecipe = nested(LoopRecipe)
    model: dict = nested(dict)  # fields of transformers' `ResNetConfig`; the training images give the classes
    image_size: int = number(128, _at_least(16, " pixels"))  # side of the images
    augment: bool = True  # show each image in a random dihedral view, its colours changed at random
    colour_strength: float | int = number(0.1, BELOW_1)  # largest change; see `random_colours`


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
