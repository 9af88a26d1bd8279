"""How unusual an image is to a model, in four numbers, all in bits per code; in each, more means less usual.

* bits_per_code: what the codes cost under the prior.
* typicality: |bits_per_code - its mean over training images|, for what is suspiciously likely is unusual, too.
  Source: Nalisnick et al., "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality", arXiv
  1906.02994, with one image per batch.
* complexity_corrected: bits_per_code minus what the codes cost by their frequencies in the image itself, for plain
  images are likely under any model. Source: Serra et al., "Input complexity and out-of-distribution detection with
  likelihood-based generative models", arXiv 1909.11480. Differs: there the complexity is a compressed file's size.
* unigram_corrected: bits_per_code minus what the codes cost by their frequencies in training. Source: the likelihood
  ratio of Ren et al., "Likelihood Ratios for Out-of-Distribution Detection", arXiv 1906.02845. Differs: there the
  background model is a network trained on perturbed images; here codes that are rare in training count *for* an image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isic_vq.data.code_cache import check_tokenizer, read_code_cache
from isic_vq.data.order import seeded_subset
from isic_vq.data.schema import DataError
from isic_vq.evaluation.bits_per_code import own_entropy, unigram_bits
from isic_vq.models.likelihood import score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel

SCORES = ("bits_per_code", "typicality", "complexity_corrected", "unigram_corrected")
MAX_REFERENCE_IMAGES = 256


@dataclass(frozen=True)
class Reference:
    """What scores need to know of the training images."""

    code_counts: Tensor  # `(K,)` int64, occurrences of each code in all views of all training images
    bits_per_code: float  # mean over `num_images` training images
    num_images: int  # at most `MAX_REFERENCE_IMAGES`
    source: str


@dataclass(frozen=True)
class ScoredImage:
    """An image and its scores."""

    name: str
    pixel_values: Tensor  # `(3, H, W)`, RGB in [0, 1]
    bits_map: Tensor  # `(h, w)` float64, bits by place; see `IsicVQScoreOutput`
    scores: dict[str, float]  # in bits per code, by name; see `image_scores`


def read_reference(
    path: Path, model: IsicVQModel, label: int | None = None, marginalize: bool = False, seed: int = 0
) -> Reference:
    """Score a seeded subset of a cache of training codes as images will be scored.

    With a label, a class id, training images of this class alone, given the class; `marginalize` is as for `score_codes`.

    Raises:
        DataError: the file is no code cache of this tokenizer, or has no image of the class.
    """
    cache = read_code_cache(path)
    check_tokenizer(cache, model.vqvae, path.name)
    rows = torch.arange(len(cache.diagnoses))
    if label is not None:
        name = model.config.class_names[label]
        rows = rows[[diagnosis == name for diagnosis in cache.diagnoses]]
        if len(rows) == 0:
            raise DataError(f"{path.name} has no image of {name}: leave the label out, or name other codes")
    codes = cache.first_views()[rows[seeded_subset(len(rows), MAX_REFERENCE_IMAGES, seed)]]
    labels = None if label is None else torch.full((len(codes),), label)
    bits = score_codes(model, codes, labels, marginalize)
    return Reference(cache.counts(), bits.mean().item(), len(codes), cache.source.name)


def image_scores(bits: Tensor, codes: Tensor, reference: Reference | None) -> dict[str, Tensor]:
    """Scores of `SCORES`, `(N,)` in bits per code, of codes `(N, ...)` with bits of the same shape.

    Without a reference, those that need none.
    """
    codes = codes.cpu()
    mean = bits.flatten(1).mean(1)
    scores = {"bits_per_code": mean, "complexity_corrected": mean - own_entropy(codes)}
    if reference is not None:
        scores["typicality"] = (mean - reference.bits_per_code).abs()
        scores["unigram_corrected"] = mean - unigram_bits(reference.code_counts, codes).flatten(1).mean(1)
    return {name: scores[name] for name in SCORES if name in scores}


def score_images(
    model: IsicVQModel,
    batches: Iterable[tuple[list[str], Tensor]],
    label: int | None = None,
    marginalize: bool = False,
    reference: Reference | None = None,
) -> Iterator[ScoredImage]:
    """Yield every image of batches of names and `pixel_values` `(B, 3, H, W)` in [0, 1], with its scores.

    `label` is a class id for all images, or None; `reference` was read with the same label and `marginalize`.
    """
    for names, pixel_values in batches:
        output = model.score(pixel_values, label, marginalize)
        scores = image_scores(output["bits"], output["codes"], reference)
        for index, name in enumerate(names):
            numbers = {score: values[index].item() for score, values in scores.items()}
            yield ScoredImage(name, pixel_values[index], output["bits_map"][index], numbers)
