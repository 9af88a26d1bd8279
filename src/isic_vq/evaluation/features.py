"""Distances in the feature space of an image model that the user supplies: no weights are downloaded.

Sources: paired distance, Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv 1801.03924, eq. 1 with every channel weighted alike; Frechet distance between sets, see `distances`. Both depend on
the model: compare them within one model only.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging

from isic_vq.evaluation.distances import frechet_distance


class FeatureModel(nn.Module):
    """An image model of transformers, frozen, that takes images in [0, 1] of any size.

    Args:
        backbone: gives `hidden_states` and either `pooler_output` or `last_hidden_state`.
        mean: per channel, subtracted from pixel values.
        std: per channel, they are divided by it.
        size: side in pixels the backbone expects.

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
            OSError: it holds neither, or cannot be reached.
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
        """Stay in eval mode, whatever the parent does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features `(B, D)` of images `(B, 3, H, W)` in [0, 1]."""
        output = self.backbone(self._prepared(images))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = output.last_hidden_state.flatten(2).mean(2)
        return pooled.flatten(1)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps `(B, C_i, h_i, w_i)` of every stage, coarser and coarser."""
        return self.backbone(self._prepared(images), output_hidden_states=True).hidden_states

    def _prepared(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


def image_settings(model: str) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation per channel and side in pixels of the images that a folder or Hub id takes."""
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
    """Both distances between images and their reconstructions, batches of `(B, 3, H, W)` in [0, 1].

    Returns:
        `feature_distance`, the mean over pairs, and `frechet_distance`, between the two sets.

    Raises:
        ValueError: there are fewer than two pairs, and so no covariance.
    """
    distances: list[Tensor] = []
    features: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        distances.append(feature_distance(model, *pair))
        features.append((model(pair[0]).cpu(), model(pair[1]).cpu()))
    if sum(map(len, distances)) < 2:
        raise ValueError(f"{sum(map(len, distances))} images have no covariance: expected at least two")
    real, reconstructed = (torch.cat(parts) for parts in zip(*features, strict=True))
    return {
        "feature_distance": torch.cat(distances).mean().item(),
        "frechet_distance": frechet_distance(real, reconstructed),
    }
