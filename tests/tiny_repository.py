"""A tiny untrained model and its repository folder, as `isic-vq export` and `isic-vq evaluate` leave it."""

from pathlib import Path

import torch

from isic_vq.data.code_cache import write_code_cache
from isic_vq.data.encoding import encode_source
from isic_vq.data.parts import open_part
from isic_vq.data.provenance import write_training_data
from isic_vq.evaluation.evaluate import evaluate_checkpoint
from isic_vq.hub.card import write_card
from isic_vq.hub.export import export_repository
from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

VQVAE = {"image_size": 16, "hidden_sizes": (8, 8), "num_codes": 8, "code_dim": 4, "residual_size": 4}
PRIOR = {
    "num_codes": 8,
    "grid_size": 4,
    "hidden_size": 8,
    "num_layers": 1,
    "head_size": 8,
    "id2label": {0: "melanoma", 1: "nevus"},
}


def write_model(folder: Path) -> None:
    """Write `model/` and, in `codes.parquet`, the codes of "its training images"."""
    torch.manual_seed(0)
    model = IsicVQModel(IsicVQConfig(vqvae_config=VQVAE, prior_config=PRIOR)).eval()
    model.save_pretrained(folder / "model")
    records, source = open_part("synthetic:8:0")
    cache = encode_source(model.vqvae, IsicVQImageProcessor(size=16), records, source, num_views=1)
    write_code_cache(cache, folder / "codes.parquet")
    write_training_data(folder / "model", {"vqvae": source, "prior": source})


def write_repository(folder: Path) -> Path:
    """Write, beside the model, its repository folder `tiny/` with a report and without a card."""
    output, codes = folder / "tiny", folder / "codes.parquet"
    export_repository(str(folder / "model"), output, codes, bf16=False)
    images = ("validation", "synthetic:6:1")
    evaluate_checkpoint(str(output), [images], codes).report.save(output / "reports" / "validation.json")
    return output


def write_with_card(folder: Path) -> Path:
    """Write the model and its repository folder `tiny/` with the card."""
    write_model(folder)
    output = write_repository(folder)
    write_card(output)
    return output
