"""Whether images show the diagnosis that they were asked for, as a classifier of diagnoses sees it.

Source: the class-conditional check of generative models by a fixed classifier, "conformity" in Shmelkov et al., "How
good is my GAN?", arXiv 1807.09499 (GAN-test). Differs: the classifier is given, not trained on the same data here.

A classifier is no oracle: read the agreement beside its accuracy on real images that it has not seen, and on what
the tokenizer makes of these. An agreement above that accuracy says that samples are plainer than images.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.modeling_utils import PreTrainedModel

from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.images import MIN_GROUP
from isic_vq.evaluation.intervals import share_interval
from isic_vq.evaluation.report import Metric
from isic_vq.models.diagnosis import canonical_diagnosis


class DiagnosisClassifier(FeatureModel):
    """An image classifier of transformers, frozen, whose classes are diagnoses; it takes images in [0, 1] of any size.

    Args:
        backbone: gives `logits`; each label of its config names a diagnosis.
        mean: per channel, subtracted from pixel values.
        std: per channel, they are divided by it.
        size: side in pixels the backbone expects.

    Attributes:
        diagnoses: canonical name of each class.
    """

    def __init__(self, backbone: PreTrainedModel, mean: list[float], std: list[float], size: int):
        super().__init__(backbone, mean, std, size)
        id2label = backbone.config.id2label
        self.diagnoses = [canonical_diagnosis(id2label[index]) for index in range(len(id2label))]

    @classmethod
    def from_pretrained(cls, model: str) -> "DiagnosisClassifier":
        """Open a folder or Hub id as `FeatureModel` does, with its head.

        Raises:
            OSError: it holds no safetensors weights or no `preprocessor_config.json`, or cannot be reached.
            ValueError: it has no head, or one whose classes are no diagnoses.
        """
        if not names_diagnoses(model):
            raise ValueError(f"{model} is no image classifier whose labels name diagnoses")
        features = FeatureModel.from_pretrained(model)
        classifier, info = AutoModelForImageClassification.from_pretrained(
            model, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"{model} lacks {sorted(info['missing_keys'])[:3]}: expected a whole classifier")
        return cls(
            classifier, features.mean.flatten().tolist(), features.std.flatten().tolist(), features.size
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, number of diagnoses)` of images `(B, 3, H, W)` in [0, 1]."""
        return self.backbone(self._prepared(images)).logits

    def name(self, images: Tensor) -> list[str]:
        """The most likely diagnosis of each image `(B, 3, H, W)` in [0, 1]."""
        return [self.diagnoses[index] for index in self(images).argmax(1).tolist()]


def names_diagnoses(model: str) -> bool:
    """Whether a folder or Hub id holds an image classifier each of whose labels names a diagnosis.

    Raises:
        OSError: it has no config, or cannot be reached.
    """
    config = AutoConfig.from_pretrained(model)
    if not any(name.endswith("ForImageClassification") for name in config.architectures or []):
        return False
    try:
        return bool({canonical_diagnosis(label) for label in config.id2label.values()})
    except ValueError:  # another kind of classes, such as ImageNet's
        return False


def agreement_metrics(
    named: Mapping[str, Sequence[str]],
    asked: Sequence[str],
    known: set[str],
    yardstick: str,
    split: str,
    dataset: str,
    seed: int,
) -> list[Metric]:
    """The share of images that the classifier names as asked, over all and per diagnosis of at least `MIN_GROUP` images.

    Lines are called "agreement[SET, YARDSTICK]" and "agreement[SET, YARDSTICK, diagnosis=NAME]".

    Args:
        named: what the classifier called each of N images, by name of their set.
        asked: the diagnosis that each of the N images has, or was generated for; the same for all sets.
        known: diagnoses that count: those of the classifier and of the model. Others are left out.
        yardstick: name of the classifier.
        split: of the real images.
        dataset: theirs.
        seed: of the samples.

    Returns:
        The lines; none where no image has a known diagnosis.
    """
    rows = [row for row, diagnosis in enumerate(asked) if diagnosis in known]
    groups = {"": rows}
    for diagnosis in sorted({asked[row] for row in rows}):
        members = [row for row in rows if asked[row] == diagnosis]
        if len(members) >= MIN_GROUP:
            groups[f", diagnosis={diagnosis}"] = members
    metrics = []
    for name, predictions in named.items():
        for group, members in groups.items():
            if members:
                right = sum(predictions[row] == asked[row] for row in members)
                metrics.append(
                    Metric(
                        f"agreement[{name}, {yardstick}{group}]",
                        right / len(members),
                        "1",
                        len(members),
                        split,
                        dataset,
                        seed,
                        list(share_interval(right, len(members))),
                    )
                )
    return metrics
