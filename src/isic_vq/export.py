"""Write a complete Hub repository folder for a trained model: weights, processor, previews, provenance, card.

The order is export, evaluate, card: the weights that ship are the ones that are measured, and the card is
rendered from the reports that lie in the folder. A number that no report holds cannot reach the card.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file

from isic_vq import __version__
from isic_vq.data.code_cache import CodeCache, check_tokenizer, read_code_cache
from isic_vq.evaluation.report import Metric, Report
from isic_vq.figures import image_grid
from isic_vq.files import replaced_directory, write_atomically
from isic_vq.hub import load_model
from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import WEIGHTS_FILE, IsicVQModel
from isic_vq.models.pipeline_isic_vq import TASK

PREVIEWS_PER_CLASS = 6
PREVIEW_SEED = 0
# By the letters of a licence's name, so that CC-BY-NC, CC-BY-NC-4.0 and CC BY-NC 4.0 are one; CC-0 leaves "cc".
LICENSE_IDS = {"cc": "cc0-1.0", "ccby": "cc-by-4.0", "ccbync": "cc-by-nc-4.0", "unknown": "unknown"}
RESTRICTIVENESS = ["cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "unknown"]


def export_repository(model: str, output: Path, train_codes: Path, bf16: bool) -> None:
    """Write weights, configs, processor, previews and provenance of a trained model.

    Args:
        model: folder of a whole model.
        output: repository folder; replaced whole.
        train_codes: code cache of the images the model was trained on: their provenance.
        bf16: round the prior's parameters to bfloat16 and store them so; they are still computed with in float32.

    Raises:
        ModelError, DataError: as their docstrings say.
    """
    loaded = load_model(IsicVQModel, model).cpu()
    cache = read_code_cache(train_codes)
    check_tokenizer(cache, loaded.vqvae, train_codes.name)
    processor = IsicVQImageProcessor(size=loaded.config.vqvae_config.image_size)
    with replaced_directory(output) as folder:
        loaded.save_pretrained(folder)
        processor.save_pretrained(folder)
        if bf16:
            store_prior_as_bf16(folder, loaded)
            loaded = load_model(IsicVQModel, str(folder)).cpu()
        (folder / "provenance.json").write_text(json.dumps(provenance(cache), indent=2) + "\n")
        write_previews(loaded, processor, folder / "previews")


def store_prior_as_bf16(folder: Path, model: IsicVQModel) -> None:
    """Rewrite the prior's weight file with bfloat16 parameters; its buffers stay float32.

    The tokenizer is left alone: rounding its encoder would change codes, and codes are what caches and priors rest on.
    """
    parameters = {f"prior.{name}" for name, _ in model.prior.named_parameters()}
    path = folder / "prior" / WEIGHTS_FILE
    tensors = {
        name: tensor.bfloat16() if name in parameters else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def provenance(cache: CodeCache) -> dict[str, Any]:
    """What the weights were trained on, in a form that may be published."""
    return {
        "isic_vq": __version__,
        "tokenizer_hash": cache.tokenizer_hash,
        "training_data": dataclasses.asdict(cache.source),
        "training_code_counts": cache.counts().tolist(),
    }


def write_previews(model: IsicVQModel, processor: IsicVQImageProcessor, folder: Path) -> None:
    """Write a grid of each class, and one of unconditional images."""
    folder.mkdir()
    names = {model.prior.config.unconditional_id: "unconditional", **model.config.class_names}
    for label, name in names.items():
        labels = torch.full((PREVIEWS_PER_CLASS,), label)
        images = model.generate(PREVIEWS_PER_CLASS, labels, seed=PREVIEW_SEED)["pixel_values"]
        image_grid(processor.postprocess(images, output_type="np"), columns=PREVIEWS_PER_CLASS).save(
            folder / f"{name}.png", optimize=True
        )


def weights_license(licenses: dict[str, int]) -> str:
    """The Hub's licence id for weights trained on images of these licences: the most restrictive one.

    Images without a licence make it "unknown".

    Raises:
        ValueError: a licence that is not one of ISIC's.
    """
    ids = set()
    for license_name in licenses:
        letters = re.sub(r"[^a-z]", "", license_name.lower())
        if letters not in LICENSE_IDS:
            raise ValueError(
                f"images are under {license_name!r}: expected CC-0, CC-BY or CC-BY-NC, ISIC's licences"
            )
        ids.add(LICENSE_IDS[letters])
    return max(ids, key=RESTRICTIVENESS.index)


def write_card(folder: Path) -> None:
    """Render README.md of a repository folder from its configs, reports and provenance.

    Raises:
        ValueError: the folder has no report, or one of another model.
    """
    reports = [Report.load(path) for path in sorted((folder / "reports").glob("*.json"))]
    if not reports:
        raise ValueError(f"{folder.name}/reports is empty: run isic-vq evaluate with --output there first")
    config = IsicVQConfig.from_pretrained(folder)
    origin = json.loads((folder / "provenance.json").read_text())
    data = origin["training_data"]
    metrics = [metric for report in reports for metric in report.metrics]
    card_data = ModelCardData(
        license=weights_license(data["licenses"]),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["isic-vq", "vq-vae", "pixelcnn", "dermoscopy", "skin", "medical-imaging", "custom_code"],
        model_name=folder.name,
        eval_results=[eval_result(metric) for metric in metrics],
    )
    content = f"---\n{card_data.to_yaml()}\n---\n{card_body(folder.name, config, data, reports)}"
    write_atomically(folder / "README.md", ModelCard(content).content.encode())


def eval_result(metric: Metric) -> EvalResult:
    """A report's line as the Hub's model-index has it."""
    return EvalResult(
        task_type=TASK,
        task_name="Unconditional image generation",
        dataset_type="ham10000" if "ham10000" in metric.dataset else "isic",
        dataset_name=f"{metric.dataset} (n = {metric.n})",
        dataset_split=metric.split,
        metric_type=metric.name,
        metric_name=f"{metric.name} ({metric.unit})",
        metric_value=metric.value,
    )


def metric_table(reports: list[Report]) -> str:
    """The reports' metrics as a Markdown table, one column per report."""
    heads = [f"{report.metrics[0].split} (n = {report.metrics[0].n})" for report in reports]
    lines = ["| metric | unit | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    for metric in reports[0].metrics:
        values = []
        for report in reports:
            found = [m for m in report.metrics if m.name == metric.name]
            values.append(f"{found[0].value:.5g}" if found else "")
        lines.append(f"| {metric.name} | {metric.unit} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def card_body(name: str, config: IsicVQConfig, data: dict[str, Any], reports: list[Report]) -> str:
    """The card's text."""
    vqvae, prior = config.vqvae_config, config.prior_config
    classes = "\n".join(f"| {label} | {diagnosis} |" for diagnosis in prior.id2label.values() for label in [
        f"![{diagnosis}](previews/{diagnosis}.png)"])  # fmt: skip
    example = next(iter(prior.id2label.values()), None)
    labelled = f'images = pipe("{example}", num_images=4)  # one diagnosis\n' if example else ""
    diagnoses = ", ".join(f"{diagnosis} {count}" for diagnosis, count in data["diagnoses"].items())
    attributions = "\n".join(f"- {line}" for line in data["attributions"]) or "- none given"
    licenses = ", ".join(f"{license_name}: {count}" for license_name, count in data["licenses"].items())
    environments = {json.dumps(report.environment, sort_keys=True): report.environment for report in reports}
    measured = "; ".join(
        f"{e['device']}, torch {e['torch']}, transformers {e['transformers']}" for e in environments.values()
    )
    return f"""
# {name}

A discrete generative model of dermoscopy images, in two parts: a VQ-VAE tokenizer that turns a
{vqvae.image_size}x{vqvae.image_size} image into {vqvae.grid_size}x{vqvae.grid_size} codes out of {vqvae.num_codes}, and a
{"gated " if prior.architecture == "gated" else ""}PixelCNN prior that generates such grids in raster order, for one diagnosis or for none.

**For research on synthetic images. It is not a diagnostic device: do not use it, or images from it, to judge a
person's skin.**

![generated images](previews/unconditional.png)

## Use

```python
import isic_vq
from transformers import pipeline

pipe = pipeline("unconditional-image-generation", model="{name}")  # this folder, or its Hub id
images = pipe(num_images=8, seed=0)  # PIL images
{labelled}```

The tokenizer alone:

```python
from isic_vq import IsicVQImageProcessor, VQVAEModel

tokenizer = VQVAEModel.from_pretrained("{name}")
processor = IsicVQImageProcessor.from_pretrained("{name}")
codes = tokenizer.encode(processor("image.jpg", return_tensors="pt")["pixel_values"])
image = processor.postprocess(tokenizer.decode(codes))[0]
```

## Generated images by diagnosis

{PREVIEWS_PER_CLASS} samples each, seed {PREVIEW_SEED}, temperature 1, no guidance; not selected.

| samples | diagnosis |
|---|---|
{classes}

## Measured

Every number is from `reports/`, written by `isic-vq evaluate` on this folder ({measured}).

{metric_table(reports)}

PSNR and SSIM are means over images; usage and perplexity are taken over all codes of the split. `bits_per_code` is
conditional on the diagnosis; `bits_per_code_flat` is log2 K and `bits_per_code_unigram` the cross-entropy under the
training images' code frequencies.

## Training data

{data["name"]}: {data["num_images"]} images ({diagnoses}). Content hash `{data["fingerprint"]}`. Licences: {licenses}.

Attribution:

{attributions}

## Limits

- {vqvae.image_size} pixels: fine structures (thin hairs, small globules) are smoothed or lost in the codes.
- Trained on one data set; images from other devices, skin types and body sites reconstruct less well.
- The classes are unbalanced as the data set is; rare diagnoses were learned from few images.
- Samples may resemble training images; no memorisation audit is part of this card.

## Licence

Weights: {weights_license(data["licenses"])}, because of the training images. Code: Apache-2.0.
"""
