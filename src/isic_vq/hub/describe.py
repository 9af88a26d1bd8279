"""What a model is, in a few lines: classes, codes, parameters, licence, training images, measured quality."""

from pathlib import Path

from isic_vq import __version__
from isic_vq.evaluation.report import Metric, Report
from isic_vq.hub.pretrained import load_model, resolve
from isic_vq.models.modeling_isic_vq import IsicVQModel

# Metrics by name and labels, and how they are told with their split and labels.
HEADLINES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("psnr", {}, "PSNR {:.1f} dB ({split})"),
    ("bits_per_code", {}, "{:.2f} bits per code"),
    ("frechet_distance", {"images": "samples"}, "Frechet distance {:.2f} ({yardstick})"),
    ("seconds_per_image", {"action": "generate", "batch": "16"}, "{:.2g} s per image in batches of 16"),
)
HARDLY_TRAINED = 0.95  # of the bits that code frequencies alone ask for


def describe_model(model: str | None = None) -> list[str]:
    """Describe a whole model (folder, Hub id, None: the shipped one) in eight lines, the last by the reports it has."""
    # `training_warning`, which every generation asks for, does without the extra `data`.
    from isic_vq.data.provenance import read_training_data

    loaded = load_model(IsicVQModel, model, "cpu")
    folder = Path(resolve(model))
    vqvae, prior = loaded.config.vqvae_config, loaded.config.prior_config
    grids = " + ".join(f"{side}x{side}" for side in vqvae.sides)
    trained = read_training_data(folder)
    images = {
        f"{info.num_images:,} images of {info.name} ({', '.join(info.licenses)})" if info else "not recorded"
        for info in trained.values()
    }
    return [
        f"model      {folder.name}, isic-vq {__version__}: generates, encodes and decodes images of skin lesions",
        f"tokenizer  {vqvae.image_size} px -> {grids} codes of {vqvae.num_codes}, {loaded.vqvae.num_parameters():,} parameters",
        f"prior      {prior.model_type.removeprefix('isic_')}, {loaded.prior.num_parameters():,} parameters",
        "classes    "
        + (", ".join(f"{i} {name}" for i, name in prior.id2label.items()) or "none (unconditional)"),
        f"trained on {'; '.join(sorted(images)) or 'not recorded'}",
        f"licence    weights {loaded.config.license or 'not recorded'}",
        f"measured   {headline(read_reports(model)) or 'no report'}",
        "use        research on synthetic images; not a diagnostic device",
    ]


def training_details(model: str | None = None) -> list[str]:
    """A line on the training images of each stage: how many, of what data set, by licence."""
    from isic_vq.data.provenance import read_training_data

    lines = []
    for stage, info in read_training_data(Path(resolve(model))).items():
        licenses = info and ", ".join(f"{name} {count:,}" for name, count in info.licenses.items())
        known = info and f"{info.num_images:,} images of {info.name}, by licence: {licenses}"
        lines.append(f"{stage} trained on {known or 'images that are not recorded'}")
    return lines


def read_reports(model: str | None = None) -> list[Report]:
    """The reports of a model's repository folder, or of the run that the model's folder lies in."""
    folder = Path(resolve(model))
    paths = sorted(folder.glob("reports/*.json")) or [
        path for path in [folder.parent / "report.json"] if folder.name == "model" and path.is_file()
    ]
    return [Report.load(path) for path in paths]


def headline(reports: list[Report]) -> str:
    """The numbers of `HEADLINES` that reports have of images which are not training images."""
    metrics = (_metric(reports, name, labels) for name, labels, _ in HEADLINES)
    lines = [
        form.format(metric.value, split=metric.split, yardstick=metric.labels.get("yardstick", "unnamed"))
        for metric, (*_, form) in zip(metrics, HEADLINES, strict=True)
        if metric
    ]
    return ", ".join(lines)


def training_warning(model: str | None = None) -> str | None:
    """Warn of a model whose reports say that its prior was hardly trained; the reports of a Hub id are not read."""
    reports = read_reports(model)
    bits, unigram = (_metric(reports, f"bits_per_code{end}", {}) for end in ("", "_unigram"))
    if bits is None or unigram is None or bits.value < HARDLY_TRAINED * unigram.value:
        return None
    return (
        f"this model was hardly trained: its prior needs {bits.value:.2f} bits per code, the codes' frequencies alone "
        f"{unigram.value:.2f}; expect images without structure"
    )


def _metric(reports: list[Report], name: str, labels: dict[str, str]) -> Metric | None:
    """The first metric of a name and labels, of any yardstick."""
    for metric in (metric for report in reports for metric in report.metrics):
        shown_labels = {key: value for key, value in metric.labels.items() if key != "yardstick"}
        if metric.name == name and metric.split != "train" and shown_labels == labels:
            return metric
    return None
