"""Distances in the feature space of an image model that the user supplies: no weights are downloaded.

Sources: paired distance, Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv 1801.03924, eq. 1 with every channel weighted alike; Frechet distance between sets, see `distances`. Both depend on
the model: compare them within one model only. A model with a head whose classes are diagnoses is a classifier, too.
"""

from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging

from isic_vq.data.classes import Classes
from isic_vq.evaluation.distances import frechet_distance


class FeatureModel(nn.Module):
    """An image model of transformers, frozen, that takes images in [0, 1] of any size.

    Args:
        backbone: gives `hidden_states` and either `pooler_output` or `last_hidden_state`.
        mean: per channel, subtracted from pixel values.
        std: per channel, they are divided by it.
        size: side in pixels that the backbone expects.

    Attributes:
        num_features: length of a pooled feature vector.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: PreTrainedModel, mean: list[float], std: list[float], size: int):
        super().__init__()
        self.backbone, self.size = backbone.eval().requires_grad_(False), size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        with torch.inference_mode():
            self.num_features = self(torch.zeros(1, len(mean), size, size)).shape[1]

    @classmethod
    def from_pretrained(cls, model: str) -> "FeatureModel":
        """Open a folder or Hub id that holds safetensors weights and a `preprocessor_config.json`.

        Raises:
            OSError: it lacks one of them, or cannot be reached.
            ValueError: some of the backbone's weights are missing.
        """
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a classifier's head is left out on purpose
        try:
            backbone, info = AutoModel.from_pretrained(model, use_safetensors=True, output_loading_info=True)
        finally:
            transformers_logging.set_verbosity(verbosity)
        if info["missing_keys"]:
            raise ValueError(f"it lacks {sorted(info['missing_keys'])[:3]}: expected a whole backbone")
        return cls(backbone, *image_settings(model))

    def train(self, mode: bool = True) -> "FeatureModel":
        """Stay in eval mode, also when a parent module is set to train mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features `(B, D)` of images `(B, 3, H, W)` in [0, 1]."""
        output = self.backbone(self._prepared(images))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = output.last_hidden_state.flatten(2).mean(2)
        return pooled.flatten(1)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps `(B, C_i, h_i, w_i)` of every stage, the finest first."""
        return self.backbone(self._prepared(images), output_hidden_states=True).hidden_states

    def _prepared(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


class DiagnosisClassifier(FeatureModel):
    """A `FeatureModel` whose backbone is an image classifier that gives `logits` and whose labels name diagnoses.

    Labels are matched with the given `classes`, or with ISIC's.

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
        """Open a folder or Hub id as `FeatureModel` does, with its classification head.

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
    labels, known = config.id2label.values(), Classes.of_model(classes)
    return any(map(known.declares, labels)) or all(Classes().resolve(label) is not None for label in labels)


def image_settings(model: str) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation per channel, and side in pixels, of the input of a model in a folder or on the Hub."""
    settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
    size = settings.get("size", {})
    side = size if isinstance(size, int) else size.get("shortest_edge", size.get("height", 224))
    return settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3), side


def feature_distance(model: FeatureModel, images: Tensor, others: Tensor) -> Tensor:
    """Distance `(B,)` between images pair by pair: channel-normalised maps, squared, mean over places, over stages."""
    distances = []
    for a, b in zip(model.maps(images), model.maps(others), strict=True):
        difference = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
        distances.append(difference.square().sum(1).flatten(1).mean(1))
    return torch.stack(distances).mean(0)


@torch.no_grad()
def measure_features(model: FeatureModel, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`feature_distance`, the mean over pairs, and `frechet_distance` of images `(B, 3, H, W)` and their reconstructions."""
    distances, real, reconstructed = [], [], []
    for images, reconstructions in pairs:
        distances.append(feature_distance(model, images, reconstructions))
        real.append(model(images).cpu())
        reconstructed.append(model(reconstructions).cpu())
    if (number := sum(map(len, distances))) < 2:
        raise ValueError(f"{number} images have no covariance: expected at least two")
    return {
        "feature_distance": torch.cat(distances).mean().item(),
        "frechet_distance": frechet_distance(torch.cat(real), torch.cat(reconstructed)),
    }
