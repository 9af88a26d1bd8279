"""Evaluate a checkpoint on a data set: reconstruction, codebook use and likelihood in one report."""

from pathlib import Path

import torch

from isic_vq.data.code_cache import check_tokenizer, encode_source, read_code_cache
from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import describe_source, open_source
from isic_vq.evaluation.likelihood import likelihood_metrics
from isic_vq.evaluation.reconstruction import evaluate_reconstruction, reconstruction_metrics
from isic_vq.evaluation.report import Report, environment
from isic_vq.hub import load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel


def evaluate_checkpoint(
    model: str | None, uri: str, split: str, train_codes: Path | None = None, max_corrupt_share: float = 0.01
) -> Report:
    """Measure a whole model on every image of a source.

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
    records, source = open_source(uri), describe_source(uri)
    processor = IsicVQImageProcessor(size=loaded.config.vqvae_config.image_size)
    batches = iter_batches(records, processor, batch_size=32, max_corrupt_share=max_corrupt_share)
    result = evaluate_reconstruction(loaded.vqvae, (batch["pixel_values"] for batch in batches))
    cache = encode_source(
        loaded.vqvae, processor, records, source, num_views=1, max_corrupt_share=max_corrupt_share
    )
    label2id = {name: index for index, name in loaded.config.class_names.items()}
    labels = torch.tensor([label2id.get(name, len(label2id)) for name in cache.diagnoses])
    train_counts = None
    if train_codes is not None:
        train_cache = read_code_cache(train_codes)
        check_tokenizer(train_cache, loaded.vqvae, train_codes.name)
        train_counts = train_cache.counts()
    codes = torch.from_numpy(cache.codes[:, 0].astype("int64"))
    return Report(
        model={
            "name": Path(resolve(model)).name,
            "type": "isic_vq",
            "prior": loaded.config.prior_config.model_type,
        },
        metrics=[
            *reconstruction_metrics(result, split, source.name),
            *likelihood_metrics(loaded, train_counts, codes, labels, split, source.name),
        ],
        tables={"codebook_counts": result.codebook_counts, "diagnoses": source.diagnoses},
        environment=environment(str(loaded.device)),
    )
