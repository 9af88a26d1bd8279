"""Decoders of one tokenizer's codes, measured alike: reconstructions and samples, beside noise and sharpening.

    python benchmarks/decoders.py shipped=model_cards/isic-vq-128 new=runs/decoder-f8/model \
        --features derm-features=model_cards/isic-derm-features --features derm-resnet=FOLDER

All models decode the same codes: those of the 597 validation images of HAM10000 ("reconstructions"), of as many training
images of the same diagnoses ("others", as `isic-vq evaluate` takes them), and those that the first model's prior draws for
the diagnoses of validation ("samples", seed 0). All are compared with the validation images. Controls are the first model's images
plus white noise, and sharpened (unsharp masking, a Gaussian of 1 pixel), each as strong as to give the last model's texture.
Images are rounded to 8 bits first, as files hold them. Recipes are chosen on images held out of the training files instead; see
`held_out`. With --scales the last model's reconstructions are made with that much of its refinement's noise, too.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from isic_vq.data.loading import DecodedImages, collate
from isic_vq.data.parts import open_part
from isic_vq.data.sources import open_source
from isic_vq.evaluation.appearance import grid_power, octave_power, octaves, texture, worst_tenth
from isic_vq.evaluation.distances import frechet_distance, precision_recall_density_coverage
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.generation import matched_rows
from isic_vq.evaluation.measures import psnr, ssim
from isic_vq.evaluation.report import environment
from isic_vq.files import write_atomically, write_tensors
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel

HAM = "parquet:${ISIC_VQ_DATA}/ham10000"
PERIODS = (8, 4, 2)  # pixels
BATCH = 32


def to_8_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded as files hold them."""
    return (images.float().clamp(0, 1) * 255).round() / 255


def open_validation() -> tuple[Tensor, list[str]]:
    """The validation images of HAM10000, `(597, 3, 128, 128)`, and their diagnoses."""
    records = open_source(f"{HAM}/validation-*.parquet")
    return read(records, len(records)), records["diagnosis"]


def held_out() -> Tensor:
    """500 images of the lesions that `data.validation_share=0.1` keeps out of training on HAM10000's training files."""
    records, _ = open_part(f"{HAM}/train-*.parquet", "validation", 0.1, [])
    return read(records, 500)


def read(records, limit: int) -> Tensor:
    """The first images of a data set."""
    items = torch.utils.data.Subset(
        DecodedImages(records, IsicVQImageProcessor(size=128)), range(min(limit, len(records)))
    )
    loader = torch.utils.data.DataLoader(items, BATCH, collate_fn=collate)
    return to_8_bits(torch.cat([batch["pixel_values"] for batch in loader]))


def in_batches(function, values: Tensor) -> Tensor:
    """A function of batches, applied to all without gradients."""
    with torch.inference_mode():
        return torch.cat([function(part) for part in values.split(BATCH)])


class Reference:
    """Real images, and what others are compared with.

    Args:
        images: `(N, 3, 128, 128)` in [0, 1].
        models: feature spaces by name.
    """

    def __init__(self, images: Tensor, models: dict[str, FeatureModel]):
        self.images, self.models = images, models
        self.power = in_batches(octave_power, images).mean(0)
        self.features = {name: in_batches(model, images) for name, model in models.items()}


def measure(images: Tensor, real: Reference) -> dict[str, Any]:
    """Texture, grid, spectrum and distances from real images of images `(N, 3, 128, 128)` in [0, 1]."""
    grid = in_batches(lambda part: grid_power(part, PERIODS), images)
    power = in_batches(octave_power, images).mean(0)
    names = [f"{low}-{high}" for low, high in octaves(images.shape[-1])]
    row: dict[str, Any] = {
        "n": len(images),
        "texture": in_batches(texture, images).mean().item(),
        "grid_power": {
            name: dict(zip(map(str, PERIODS), values.tolist(), strict=True))
            for name, values in {
                "mean": grid.mean(0),
                "median": grid.median(0).values,
                "worst_tenth": torch.tensor([worst_tenth(column) for column in grid.double().T.numpy()]),
            }.items()
        },
        "octaves_db": dict(zip(names, (10 * (power / real.power).log10()).tolist(), strict=True)),
    }
    ours = {name: in_batches(model, images) for name, model in real.models.items()}
    pairs = {name: (real.features[name], features) for name, features in ours.items()}
    row["frechet_distance"] = {name: frechet_distance(*pair) for name, pair in pairs.items()}
    row["recall"] = {name: precision_recall_density_coverage(*pair)["recall"] for name, pair in pairs.items()}
    return row


def paired(images: Tensor, real: Tensor) -> dict[str, float]:
    """Mean PSNR and SSIM of reconstructions."""
    pairs = zip(images.split(BATCH), real.split(BATCH), strict=True)
    values = [(psnr(b, a), ssim(b, a)) for a, b in pairs]
    return {
        name: torch.cat(part).mean().item()
        for name, part in zip(("psnr", "ssim"), zip(*values, strict=True), strict=True)
    }


def decode(tokenizer: VQVAEModel, codes: Tensor) -> Tensor:
    """Images of codes, rounded."""
    return in_batches(lambda part: to_8_bits(tokenizer.decode(part)), codes)


def add_noise(images: Tensor, strength: float) -> Tensor:
    """White noise of this standard deviation, in [0, 1], the same for each call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return to_8_bits(images + strength * noise)


def sharpen(images: Tensor, strength: float) -> Tensor:
    """Unsharp masking with a Gaussian of 1 pixel."""
    line = torch.exp(-torch.arange(-3.0, 4).square() / 2)
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 7, 7)
    blurred = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="reflect"), kernel, groups=3)
    return to_8_bits(images + strength * (images - blurred))


def as_sharp(change, images: Tensor, wanted: float, most: float) -> Tensor:
    """Images changed as strongly as to give them a texture, found by halving.

    Raises:
        ValueError: the strongest change does not.
    """
    low, high = 0.0, most
    if in_batches(texture, change(images, most)).mean() < wanted:
        raise ValueError(f"even {most} does not give a texture of {wanted}")
    for _ in range(12):
        middle = (low + high) / 2
        if in_batches(texture, change(images, middle)).mean() < wanted:
            low = middle
        else:
            high = middle
    return change(images, high)


def open_tokenizer(folder: str) -> VQVAEModel:
    """The tokenizer of a folder, alone or in a whole model."""
    whole = "vqvae_config" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return (IsicVQModel.from_pretrained(folder).vqvae if whole else VQVAEModel.from_pretrained(folder)).eval()


def drawn_codes(folder: str, labels: list[str], kept: Path | None) -> Tensor:
    """Codes that a model's prior draws, one grid for each label, seed 0; kept in a file, if one is named."""
    if kept is not None and kept.exists():
        return load_file(kept)["codes"]
    model = IsicVQModel.from_pretrained(folder).eval()
    backend = model.prior.best_backend(-(-len(labels) // BATCH))
    blocks = [
        model.generate(len(part), part, seed=0, first_index=start, backend=backend).codes
        for start, part in ((start, labels[start : start + BATCH]) for start in range(0, len(labels), BATCH))
    ]
    codes = torch.cat(blocks)
    if kept is not None:
        write_tensors(kept, {"codes": codes})
    return codes


def others(labels: list[str]) -> Tensor:
    """Training images of the same diagnoses, which `isic-vq evaluate` draws with seed 0."""
    records = open_source(f"{HAM}/train-*.parquet")
    rows = matched_rows(records["diagnosis"], labels, 0)
    return read(records.select(rows), len(rows))


def with_noise(tokenizer: VQVAEModel, scale: float) -> VQVAEModel:
    """A tokenizer whose refinement sees its noise that much stronger."""
    changed = copy.deepcopy(tokenizer)
    assert changed.decoder.refinement is not None, "the last model has no refinement"
    with torch.no_grad():
        changed.decoder.refinement.first.weight[:, -1] *= scale
    return changed


def main() -> None:
    """Measure models and controls, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="NAME=FOLDER, the first a whole model")
    parser.add_argument("--features", action="append", default=[], help="NAME=FOLDER")
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="of the last model's noise")
    parser.add_argument("--codes", type=Path, help="file that keeps the samples' codes")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "reports/decoders.json")
    arguments = parser.parse_args()
    models = dict(text.split("=", 1) for text in arguments.models)
    spaces = {
        name: FeatureModel.from_pretrained(folder)
        for name, folder in (text.split("=", 1) for text in arguments.features)
    }
    real, labels = open_validation()
    first, *_, last = models
    tokenizers = {name: open_tokenizer(folder) for name, folder in models.items()}
    reference = Reference(real, spaces)
    report: dict[str, Any] = {"environment": environment(), "rows": {"real": measure(real, reference)}}
    sets = {
        "reconstructions": lambda: in_batches(tokenizers[first].encode, real),
        "samples": lambda: drawn_codes(models[first], labels, arguments.codes),
        "others": lambda: in_batches(tokenizers[first].encode, others(labels)),
    }
    for kind, codes_of in sets.items():
        codes = codes_of()
        images = {name: decode(tokenizer, codes) for name, tokenizer in tokenizers.items()}
        wanted = in_batches(texture, images[last]).mean().item()
        images[f"{first} + noise"] = as_sharp(add_noise, images[first], wanted, 0.2)
        images[f"{first}, sharpened"] = as_sharp(sharpen, images[first], wanted, 20)
        for scale in arguments.scales if kind == "reconstructions" else []:
            images[f"{last}, noise x {scale:g}"] = decode(with_noise(tokenizers[last], scale), codes)
        for name, pixels in images.items():
            row = measure(pixels, reference)
            if kind == "reconstructions":
                row |= paired(pixels, real)
            report["rows"][f"{kind}, {name}"] = row
            print(kind, name, json.dumps(row), flush=True)
            write_atomically(arguments.output, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
