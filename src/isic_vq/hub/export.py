"""Write a complete Hub repository folder for a trained model: weights, processor, previews, provenance.

The order is export, evaluate, card: the weights that ship are the ones that are measured, and the card
(`isic_vq.hub.card`) is rendered from the reports and the provenance that lie in the folder.
"""

import dataclasses
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from isic_vq import __version__
from isic_vq.data.code_cache import CodeCache, check_tokenizer, read_code_cache, tokenizer_hash
from isic_vq.data.licenses import weights_license
from isic_vq.data.provenance import BY_STAGE, licenses_of, read_training_data
from isic_vq.data.schema import DataError
from isic_vq.evaluation.report import ABSOLUTE_PATH, Report
from isic_vq.figures import image_grid
from isic_vq.figures.png import write_png
from isic_vq.figures.runs import METRICS_FILE, Run
from isic_vq.figures.write import draw_run
from isic_vq.files import MAX_PREVIEWS, preview_name, replaced_directory, write_atomically, write_tensors
from isic_vq.hub.layout import check_replaceable
from isic_vq.hub.onnx_export import export_onnx
from isic_vq.hub.pretrained import load_model, read_object
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.repository import PARTS, WEIGHTS_FILE
from isic_vq.yaml_text import read_yaml

logger = logging.getLogger(__name__)

PREVIEWS_PER_CLASS = 6
PREVIEW_SEED = 0
PROVENANCE_FILE = "provenance.json"
STARTED_FROM = {"prior": "tokenizer", "decoder": "model"}  # the recipe's key for the model a stage began with
PUBLISHED_FIGURES = ("_epoch_loss", "codebook_usage")  # plots; what shows source images stays with the run


@dataclass(frozen=True)
class Origins:
    """How a model was made."""

    runs: dict[str, Path]  # folders of its runs by stage, the last one first
    # The repository folder that the first of them began with, whose record is taken over
    repository: Path | None = None


def export_repository(
    model: str, output: Path, train_codes: Path, bf16: bool, onnx: bool = False, **sampling: Any
) -> None:
    """Write weights, configs, processor, previews, figures and provenance of a trained model.

    Args:
        model: folder of a whole model.
        output: repository folder; replaced whole, if it is one of ours that nobody has added files to.
        train_codes: code cache of the images the model was trained on: their provenance.
        bf16: round the prior's and the decoder's parameters to bfloat16 and store them so; they are computed with in float32.
        onnx: add the tokenizer as ONNX files, as `export_onnx` writes them.
        sampling: fields of `Sampling` that the repository draws images with by default; without any, those of `model` stay.

    Raises:
        ModelError, DataError: as their docstrings say.
        ImportError: matplotlib is not installed, to draw runs, or a package of the extra `onnx`.
    """
    check_replaceable(output)
    loaded = load_model(IsicVQModel, model).cpu()
    cache = read_code_cache(train_codes)
    check_tokenizer(cache, loaded.vqvae, train_codes.name)
    origins = find_training_runs(Path(model), cache.tokenizer_hash)
    stages = training_data_by_stage(Path(model), origins.runs, dataclasses.asdict(cache.source))
    loaded.config.license = weights_license(licenses_of(stages))
    loaded.prior.config.sampling = sampling or loaded.prior.config.sampling
    loaded.prior.config.validate()
    with replaced_directory(output) as folder:
        loaded.save_pretrained(folder)
        if bf16:
            store_as_bf16(folder, loaded)
            loaded = load_model(IsicVQModel, str(folder)).cpu()
        write_provenance(folder, provenance(cache, stages))
        _record(folder, model, origins)
        write_previews(loaded, folder / "previews")
        if onnx:
            export_onnx(loaded.vqvae, folder, loaded.config.license)


def store_as_bf16(folder: Path, model: IsicVQModel) -> None:
    """Rewrite the weight files with bfloat16 parameters in the prior and the decoder; buffers stay float32.

    Encoder and codebook are left alone: rounding them would change codes, and codes are what caches and priors rest on.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for part, rounded in (("prior", "prior."), ("vqvae", "vqvae.decoder.")):
        path = folder / part / WEIGHTS_FILE
        tensors = load_file(path)
        for name in tensors.keys() & parameters:
            tensors[name] = tensors[name].bfloat16() if name.startswith(rounded) else tensors[name]
        write_tensors(path, tensors)


def training_data_by_stage(model: Path, runs: dict[str, Path], prior: dict[str, Any]) -> dict[str, Any]:
    """Collect what each part of a model was trained on, as dictionaries; None for a tokenizer without a record.

    Older runs describe their data in `run.json` alone. DataError if the prior was trained on other codes than `prior` says.
    """
    stages: dict[str, Any] = {"vqvae": None}
    for stage, run in runs.items():
        if (run / "run.json").is_file():
            stages[stage] = read_object(run / "run.json")["data"]["train"]
    for stage, info in read_training_data(model).items():
        if info is not None:
            stages[stage] = dataclasses.asdict(info)
    if stages.get("prior", prior) != prior:
        raise DataError(
            f"the codes are those of {prior['name']} ({prior['num_images']} images), and the prior was trained on "
            f"{stages['prior']['name']} ({stages['prior']['num_images']} images): name the codes that it was trained on"
        )
    return {**stages, "prior": prior}


def provenance(cache: CodeCache, stages: dict[str, Any]) -> dict[str, Any]:
    """Describe what the weights were trained on, in a form that may be published."""
    return {
        "isic_vq": __version__,
        "tokenizer_hash": cache.tokenizer_hash,
        "training_data": dataclasses.asdict(cache.source),
        BY_STAGE: stages,
        "training_code_counts": cache.counts().tolist(),
    }


def write_provenance(folder: Path, content: dict[str, Any]) -> None:
    """Write a repository folder's provenance; ValueError if it names an absolute path, which may not be published."""
    text = json.dumps(content, indent=2) + "\n"
    if path := ABSOLUTE_PATH.search(text):
        raise ValueError(f"{PROVENANCE_FILE} would name an absolute path ({path[0].strip()}...): shorten it")
    write_atomically(folder / PROVENANCE_FILE, text.encode())


def write_previews(model: IsicVQModel, folder: Path) -> None:
    """Write a grid of each class, one of unconditional images and, of several scales, one of these as they come about."""
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)

    def preview(rows: list[torch.Tensor]) -> Image.Image:
        pixels = processor.postprocess(torch.cat(rows), output_type="np")
        return image_grid(pixels, columns=PREVIEWS_PER_CLASS)

    shown = list(model.config.class_names.items())[:MAX_PREVIEWS]
    if len(shown) < len(model.config.class_names):
        logger.warning("previews show the first %d of %d classes", len(shown), len(model.config.class_names))
    unconditional = model.prior.config.unconditional_id
    for label, name in ((unconditional, "unconditional"), *shown):
        labels = torch.full((PREVIEWS_PER_CLASS,), label)
        output: Any = model.generate(PREVIEWS_PER_CLASS, labels, seed=PREVIEW_SEED)
        settings = ", ".join(
            f"{k.replace('_', ' ')} {v}" for k, v in model.default_sampling.changes().items()
        )
        comment = (
            f"synthetic images, seed {PREVIEW_SEED}, {settings or 'temperature 1, no guidance'}, not selected"
        )
        file = name if label == unconditional else preview_name(name)
        write_png(preview([output.pixel_values]), folder / f"{file}.png", {"Title": name, "Comment": comment})
        stages = model.vqvae.decode_progressively(output.codes)
        if label == unconditional and len(stages) > 1:
            comment = f"synthetic images, seed {PREVIEW_SEED}, from the first code grid alone (top) to all"
            write_png(preview(stages), folder / "scales.png", {"Title": "scales", "Comment": comment})


def record_training(folder: Path, model: str) -> list[str]:
    """Add how a repository folder's model was trained, and plots of its runs; returns the stages of which there is a record.

    The run of a model is the folder around it, as training leaves it (`RUN/model`); the run of its tokenizer is found by the
    recipe. A run that began with a repository folder takes over what that one has recorded. What is not found is not recorded,
    and named in a warning of this module's logger.

    Raises:
        ValueError: the folder holds other weights, or a run is broken or names an absolute path.
        DataError: the folder was exported with other codes than those that the prior was trained on.
    """
    expected = tokenizer_hash(load_model(VQVAEModel, model))
    return _record(folder, model, find_training_runs(Path(model), expected))


def _record(folder: Path, model: str, origins: Origins) -> list[str]:
    trained, shipped = load_model(IsicVQModel, model).cpu(), load_model(IsicVQModel, str(folder)).cpu()
    check_same_weights(trained, shipped, folder)
    content = read_object(folder / PROVENANCE_FILE)
    counts = content.pop("training_code_counts")  # long, so it stays last
    content[BY_STAGE] = training_data_by_stage(Path(model), origins.runs, content["training_data"])
    write_license(folder, weights_license(licenses_of(content[BY_STAGE])))
    content["num_parameters"] = {part: getattr(trained, part).num_parameters() for part in PARTS}
    content["training"] = {} if origins.repository is None else take_over(origins.repository, folder)
    for stage, run in reversed(origins.runs.items()):  # in the order of training
        content["training"][stage] = training_record(run)
        write_run_figures(run, folder / "figures")
    content["training_code_counts"] = counts
    write_provenance(folder, content)
    return list(content["training"])


def take_over(repository: Path, folder: Path) -> dict[str, Any]:
    """Copy the plots of runs from another repository folder, and return its training records."""
    for path in sorted((repository / "figures").glob("*.png")):
        write_atomically(folder / "figures" / path.name, path.read_bytes())
    return dict(read_object(repository / PROVENANCE_FILE).get("training", {}))


def write_license(folder: Path, license: str) -> None:
    """Write the weights' licence, which more records may have changed, to a repository folder's config."""
    path = folder / "config.json"
    config = read_object(path)
    if config["license"] != license:
        text = json.dumps({**config, "license": license}, indent=2, sort_keys=True) + "\n"
        write_atomically(path, text.encode())


def check_same_weights(trained: IsicVQModel, shipped: IsicVQModel, folder: Path) -> None:
    """Raise ValueError unless each parameter of `shipped` is the trained one, or that in bfloat16."""
    for name, parameter in trained.named_parameters():
        stored = shipped.get_parameter(name)
        if not (torch.equal(stored, parameter) or torch.equal(stored, parameter.bfloat16().float())):
            raise ValueError(f"{folder.name} holds other weights than the model ({name})")


def find_training_runs(model: Path, expected_hash: str) -> Origins:
    """Find a model's own run, and those of the models it began with, as long as the hash of their tokenizer is the expected."""
    runs: dict[str, Path] = {}
    while True:
        folder = model.parent
        in_run = model.is_dir() and (folder / "recipe.yaml").is_file()
        if not in_run and not (model / PROVENANCE_FILE).is_file():
            logger.warning("%s is not a model in a run's folder: its training is not recorded", model)
            return Origins(runs)
        if tokenizer_hash(load_model(VQVAEModel, str(model))) != expected_hash:
            logger.warning("%s is another tokenizer than the model's: its run is not recorded", model)
            return Origins(runs)
        if not in_run:
            return Origins(runs, model)
        stage = Run(folder).stage
        runs.setdefault(stage, folder)
        origin = read_recipe(folder).get(STARTED_FROM.get(stage, ""))
        if origin is None:
            return Origins(runs)
        model = Path(origin)


def read_recipe(run: Path) -> dict[str, Any]:
    """Read a run's resolved recipe; ValueError if it names an absolute path, which may not be published."""
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    if path := ABSOLUTE_PATH.search(text):
        raise ValueError(f"{run.name}/recipe.yaml names an absolute path ({path[0].strip()}...): shorten it")
    return read_yaml(text)


def earlier_record(model: Path, stage: str) -> dict[str, Any] | None:
    """The training record of the model that a stage's weights come from, in a run's folder or a repository."""
    if (model.parent / "recipe.yaml").is_file():
        return training_record(model.parent)
    path = model / PROVENANCE_FILE
    if path.is_file():
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8"))["training"].get(stage)
        return found
    logger.warning("%s is not a model in a run's folder: its training is not recorded", model)
    return None


def training_record(run: Path) -> dict[str, Any]:
    """What a run says of itself: recipe and changes to it, environment, optimizer steps, hours in them, and which weights it kept."""
    record: dict[str, Any] = {"recipe": read_recipe(run)}
    if (start := record["recipe"].get("start")) and (
        before := earlier_record(Path(start), record["recipe"]["stage"])
    ):
        record["started_from"] = before
    if (run / "run.json").is_file():
        began = read_object(run / "run.json")
        record |= {key: began[key] for key in ("environment", "changes") if key in began}
    if (run / METRICS_FILE).is_file():
        steps = Run(run).metrics["batch"]
        batch_size = record["recipe"]["loop"]["batch_size"]
        record["steps"] = steps[-1]["step"]
        # At the median pace: steps in which the process was stopped, or others had the machine, say nothing of the run.
        seconds = batch_size / median(step["images_per_second"] for step in steps)
        record["hours"] = seconds * len(steps) / 3600
    if (run / "report.json").is_file() and "weights" in (kept := Report.load(run / "report.json").model):
        record["weights"] = kept["weights"]
    return record


def write_run_figures(run: Path, folder: Path) -> None:
    """Draw a run's loss per epoch and its use of the codebook, marked as plots."""
    if not (run / METRICS_FILE).is_file():
        return
    drawings = draw_run(Run(run))
    from isic_vq.figures.plots import png_bytes  # after `draw_run`, which says what to install for it

    for drawing in drawings:
        if drawing.name.endswith(PUBLISHED_FIGURES) and not drawing.shows_source_images:
            with Image.open(io.BytesIO(png_bytes(drawing.figure))) as picture:
                write_png(picture.convert("RGB"), folder / f"{drawing.name}.png", {"Comment": "plot"})
