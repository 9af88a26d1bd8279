"""Evaluate a checkpoint on a data set: reconstruction, codebook use and likelihood in one report."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from isic_vq.data.code_cache import check_tokenizer, read_code_cache
from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import find_source
from isic_vq.evaluation.likelihood import likelihood_metrics
from isic_vq.evaluation.reconstruction import evaluate_reconstruction, reconstruction_metrics
from isic_vq.evaluation.report import Report, environment
from isic_vq.hub import load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

BATCH_SIZE = 32


def evaluate_checkpoint(
    model: str | None, uri: str, split: str, train_codes: Path | None = None, max_corrupt_share: float = 0.01
) -> Report:
    """Measure a whole model on every image of a source, which is read once.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        uri: the images.
        split: what the report calls them.
        train_codes: code cache of the training images; with it the report has the unigram yardstick.
        max_corrupt_share: share of unreadable images past which to fail.

    Raises:
        ModelError, DataError: as their docstrings say.
    """
    loaded = load_model(IsicVQModel, model)
    source = find_source(uri)
    info = source.describe()
    processor = IsicVQImageProcessor(size=loaded.config.vqvae_config.image_size)
    label2id = {name: index for index, name in loaded.config.class_names.items()}
    codes: list[Tensor] = []
    labels: list[Tensor] = []

    def pixel_values() -> Iterator[Tensor]:
        for batch in iter_batches(source.records(), processor, BATCH_SIZE, label2id, max_corrupt_share):
            codes.append(loaded.encode(batch["pixel_values"].to(loaded.device)).cpu())
            labels.append(batch["labels"])
            yield batch["pixel_values"]

    result = evaluate_reconstruction(loaded.vqvae, pixel_values())
    train_counts = None
    if train_codes is not None:
        train_cache = read_code_cache(train_codes)
        check_tokenizer(train_cache, loaded.vqvae, train_codes.name)
        train_counts = train_cache.counts()
    return Report(
        model={
            "name": Path(resolve(model)).name,
            "type": "isic_vq",
            "prior": loaded.config.prior_config.model_type,
        },
        metrics=[
            *reconstruction_metrics(result, split, info.name),
            *likelihood_metrics(loaded, train_counts, torch.cat(codes), torch.cat(labels), split, info.name),
        ],
        tables={"codebook_counts": result.codebook_counts, "diagnoses": info.diagnoses},
        environment=environment(str(loaded.device)),
    )
