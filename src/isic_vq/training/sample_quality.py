"""Quality of a prior's samples while it trains: bits alone mislead, see `PriorRecipe.select_by`."""

import torch
from torch import Tensor

from isic_vq.evaluation.distances import frechet_distance, precision_recall_density_coverage
from isic_vq.evaluation.features import FeatureModel
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, IsicVQModel


class SampleQuality:
    """Compares samples with decoded validation codes `(N, *code shape)` of the same labels, which no prior can surpass.

    The feature space is never the one that the finished prior will be judged in.
    """

    def __init__(self, features: FeatureModel, codes: Tensor, labels: Tensor, seed: int):
        self.features, self.codes, self.labels, self.seed = features, codes, labels, seed
        self.reference: Tensor | None = None

    @torch.no_grad()
    def measure(self, model: IsicVQModel) -> dict[str, float]:
        """Frechet distance and recall of samples of a model as it is; its train or eval mode is kept."""
        self.features.to(model.device)
        if self.reference is None:
            blocks = self.codes.to(model.device).split(BLOCK_SIZE)
            self.reference = self._embedded([model.decode(block) for block in blocks])
        pixel_values = model.generate(len(self.labels), self.labels, seed=self.seed).pixel_values
        samples = self._embedded(pixel_values.split(BLOCK_SIZE))
        recall = precision_recall_density_coverage(self.reference, samples)["recall"]
        return {"frechet_distance": frechet_distance(self.reference, samples), "recall": recall}

    def _embedded(self, blocks: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        processor = IsicVQImageProcessor()
        rounded = [processor.postprocess(block, output_type="pt") for block in blocks]
        return torch.cat([self.features(block).cpu() for block in rounded])
