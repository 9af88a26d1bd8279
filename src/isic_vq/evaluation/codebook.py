"""How a codebook is used, over a data set and by diagnosis, and the pixels that each code decodes to."""

from collections import Counter

import torch
from torch import Tensor

from isic_vq.evaluation.intervals import MeasuredOn, subsample_intervals
from isic_vq.evaluation.measured_images import MIN_GROUP, MeasuredImages
from isic_vq.evaluation.report import Metric
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import usage_and_perplexity

ATLAS_CONTEXT = 3  # codes on each side of the one that is shown, so that no border of the grid is seen


def codebook_metrics(counts: Tensor, on: MeasuredOn, seed: int = 0, **labels: str) -> list[Metric]:
    """The report's lines for codebook use, from uses `(N, K)` of each code by each image.

    Intervals come from halves drawn without replacement: images drawn twice would use fewer codes.
    """

    def statistics(part: Tensor) -> dict[str, float]:
        total = torch.as_tensor(part).sum(0)
        usage, perplexity = usage_and_perplexity(total)
        return {"usage": usage, "perplexity": perplexity, "dead_codes": float((total == 0).sum())}

    number, num_codes = counts.shape
    kinds = {  # unit, and between which values an interval ends
        "usage": ("share of codes", 0.0, 1.0),
        "perplexity": ("codes", 1.0, float(num_codes)),
        "dead_codes": ("codes", 0.0, float(num_codes)),
    }
    intervals = subsample_intervals(statistics, counts, seed=seed) if number >= 4 else {}
    metrics = []
    for name, value in statistics(counts).items():
        unit, least, most = kinds[name]
        interval = [min(max(bound, least), most) for bound in intervals[name]] if intervals else None
        metrics.append(on.metric(name, value, unit, number, seed, interval, **labels))
    return metrics


def counts_by_diagnosis(measured: MeasuredImages, counts: Tensor) -> dict[str, list[int]]:
    """Uses of each code, K integers, by diagnosis of at least `MIN_GROUP` images."""
    names = [row["diagnosis"] or "unknown" for row in measured.rows]
    return {
        name: counts[[other == name for other in names]].sum(0).tolist()
        for name, number in sorted(Counter(names).items())
        if number >= MIN_GROUP
    }


@torch.inference_mode()
def code_atlas(tokenizer: VQVAEModel) -> Tensor:
    """The middle of the image that a grid of one code alone decodes to: two by two codes, for each code.

    It is `(K, 3, 2 f, 2 f)` float32 in [0, 1], f the downsampling.
    """
    tokenizer.eval()
    border = ATLAS_CONTEXT * tokenizer.config.downsampling
    parts = [
        tokenizer.decode_alone(codes, 2 + 2 * ATLAS_CONTEXT).float()[..., border:-border, border:-border]
        for codes in torch.arange(tokenizer.config.num_codes, device=tokenizer.device).split(64)
    ]
    return torch.cat(parts).cpu()
