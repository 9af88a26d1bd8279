"""Whether images show the diagnosis that they were asked for, as a classifier of diagnoses sees it.

Source: the class-conditional check of generative models by a fixed classifier, "conformity" in Shmelkov et al., "How
good is my GAN?", arXiv 1807.09499 (GAN-test). Differs: the classifier is given, not trained on the same data here.

A classifier is no oracle: read the agreement beside its accuracy on real images that it has not seen, and on what
the tokenizer makes of these. An agreement above that accuracy says that samples are plainer than images.
"""

import logging
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.modeling_utils import PreTrainedModel

from isic_vq.data.classes import NUM_LISTED, Classes
from isic_vq.evaluation.features import FeatureModel, image_settings
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import MIN_GROUP
from isic_vq.evaluation.report import Metric

logger = logging.getLogger(__name__)


class DiagnosisClassifier(FeatureModel):
    """An image classifier of transformers, frozen, whose classes are diagnoses; it takes images in [0, 1] of any size.

    Args:
        backbone: gives `logits`; the labels of its config name classes.
        mean: per channel, subtracted from pixel values.
        std: per channel, they are divided by it.
        size: side in pixels the backbone expects.
        classes: own classes; labels are taken for these, or for ISIC's, where they name one.

    Attributes:
        diagnoses: name of each class.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        mean: list[float],
        std: list[float],
        size: int,
        classes: Collection[str] = (),
    ):
        super().__init__(backbone, mean, std, size)
        id2label, known = backbone.config.id2label, Classes.of_model(classes)
        self.diagnoses = [str(known.resolve(id2label[index])) for index in range(len(id2label))]

    @classmethod
    def from_pretrained(cls, model: str, classes: Collection[str] = ()) -> "DiagnosisClassifier":
        """Open a folder or Hub id as `FeatureModel` does, with its head.

        Raises:
            OSError: it holds no safetensors weights or no `preprocessor_config.json`, or cannot be reached.
            ValueError: it has no head, or one whose labels name none of the classes and not ISIC's.
        """
        if not names_diagnoses(model, classes):
            raise ValueError(f"{model} is no image classifier whose labels name diagnoses")
        classifier, info = AutoModelForImageClassification.from_pretrained(
            model, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"{model} lacks {sorted(info['missing_keys'])[:3]}: expected a whole classifier")
        return cls(classifier, *image_settings(model), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, number of diagnoses)` of images `(B, 3, H, W)` in [0, 1]."""
        return self.backbone(self._prepared(images)).logits

    def name(self, images: Tensor) -> list[str]:
        """The most likely diagnosis of each image `(B, 3, H, W)` in [0, 1]."""
        return [self.diagnoses[index] for index in self(images).argmax(1).tolist()]


def names_diagnoses(model: str, classes: Collection[str] = ()) -> bool:
    """Whether a folder or Hub id holds an image classifier of some of these classes, or of ISIC's alone.

    Raises:
        OSError: it has no config, or cannot be reached.
    """
    config = AutoConfig.from_pretrained(model)
    if not any(name.endswith("ForImageClassification") for name in config.architectures or []):
        return False
    labels, own = config.id2label.values(), Classes.of_model(classes)
    return any(map(own.declares, labels)) or all(Classes().resolve(label) is not None for label in labels)


def shared_classes(classifier: DiagnosisClassifier, classes: Collection[str], yardstick: str) -> set[str]:
    """The classes of both a classifier and a model; a warning names those that one of them has alone."""
    found, wanted = set(classifier.diagnoses), set(classes)
    if found != wanted:
        alone = [
            f"{who} alone knows {', '.join(sorted(names)[:NUM_LISTED])}{' and others' * (len(names) > NUM_LISTED)}"
            for who, names in (("the model", wanted - found), (yardstick, found - wanted))
            if names
        ]
        logger.warning(
            "agreement with %s is measured on the %d classes of both: %s",
            yardstick,
            len(found & wanted),
            "; ".join(alone),
        )
    return found & wanted


def agreement_metrics(
    named: Mapping[str, Sequence[str]],
    asked: Sequence[str],
    known: set[str],
    yardstick: str,
    on: MeasuredOn,
    seed: int,
) -> list[Metric]:
    """The share of images that the classifier names as asked, over all and per diagnosis of at least `MIN_GROUP` images.

    Args:
        named: what the classifier called each of N images, by name of their set.
        asked: the diagnosis that each of the N images has, or was generated for; the same for all sets.
        known: diagnoses that count: those of the classifier and of the model. Others are left out.
        yardstick: name of the classifier.
        on: split and data set of the real images.
        seed: of the samples.

    Returns:
        The lines; none where no image has a known diagnosis.
    """
    rows = [row for row, diagnosis in enumerate(asked) if diagnosis in known]
    if not rows:
        return []
    groups: list[tuple[dict[str, str], list[int]]] = [({}, rows)]
    for diagnosis in sorted({asked[row] for row in rows}):
        members = [row for row in rows if asked[row] == diagnosis]
        if len(members) >= MIN_GROUP:
            groups.append(({"diagnosis": diagnosis}, members))
    return [
        on.share(
            "agreement",
            sum(predictions[row] == asked[row] for row in members),
            len(members),
            seed,
            images=name,
            yardstick=yardstick,
            **labels,
        )
        for name, predictions in named.items()
        for labels, members in groups
    ]
