"""Large sets of images, generated in shards, the pieces of a `Work`.

Shard k holds the images [k S, (k + 1) S); image i depends on the settings and i alone, so that any number of processes
makes the same files.
"""

import fnmatch
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from isic_vq import __version__
from isic_vq.data.schema import DataError
from isic_vq.data.shards import (
    SHARD_PATTERN,
    SUFFIXES,
    Sample,
    read_shard,
    shard_name,
    to_png,
    write_shard,
)
from isic_vq.locks import hold
from isic_vq.models.checks import expect
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, IsicVQModel
from isic_vq.models.pixelcnn_sampler import BACKENDS
from isic_vq.models.sampling import Sampling
from isic_vq.work import Work, check_process, settings_bytes, torch_threads

MANIFEST = "generation.json"
MAX_SHARDS = 10**5 - 1  # what their names number
MAX_SHARD_SIZE = 2**14  # images, which a process holds in memory


@dataclass(frozen=True)
class _Generation:
    model: IsicVQModel
    work: Work  # its pieces are the shards
    settings: dict[str, Any]  # all that decides a byte of them, as `generation.json` has it
    labels: torch.Tensor  # class ids `(L,)` int64; image i is of class `labels[i % L]`

    @property
    def run(self) -> str:
        return hashlib.sha256(settings_bytes(self.settings)).hexdigest()[:16]

    def indices(self, shard: int) -> range:
        size = self.settings["images_per_shard"]
        return range(shard * size, min((shard + 1) * size, self.settings["num_images"]))


def generate_shards(
    model: IsicVQModel,
    output: Path,
    num_images: int,
    labels: int | str | Sequence[int | str] | None = None,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    format: str = "parquet",
    images_per_shard: int = 1024,
    block_size: int = BLOCK_SIZE,
    backend: str = "auto",
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    cluster: int | None = None,
    **settings: Any,
) -> tuple[int, int]:
    """Generate this process's shards of a set of images, but for those that are already there.

    The folder gets `generation.json`, which holds every setting, and shards such as `images-00000-of-00100.parquet`.
    A later call with the same settings, in as many processes as it likes, makes what is missing. A process computes
    on one thread, so that their number decides nothing: start one per core, or per GPU.

    Args:
        model: in eval mode.
        output: folder of the set; nothing else named `images-*-of-*` may be in it.
        num_images: of the whole set, at least 1.
        labels: a diagnosis (name, alias or id) for all images, several that take turns (image i gets
            `labels[i % len(labels)]`), or None for unconditional.
        sampling: how codes are drawn; by default as the prior's `config.sampling` says.
        seed: image i depends on (seed, i) alone; 0 to 2**63 - 1.
        format: "parquet" or "webdataset", see `write_shard`.
        images_per_shard: a multiple of `block_size`. A shard is held in memory until it is written.
        block_size: images computed at once, see `IsicVQModel.generate`.
        backend: as `IsicVQModel.generate` has it; "auto" is the fastest for many images.
        rank: number of this process.
        world: number of processes.
        progress: show a progress bar if this is process 0; it counts that process's images.
        cluster: of a prior with clusters, that of all images; drawn for each by default.
        settings: fields of `Sampling`, such as `temperature`, that differ from those of `sampling`.

    Returns:
        How many of its shards this process made, and how many were there.

    Raises:
        ValueError: a setting out of its range, or one that differs from those the folder was begun with.
        DataError: the folder holds a shard that is damaged or of another set.
        InUseError: another launch is at it.
        OSError: a file cannot be written; it is named.
    """
    check_process(rank, world)
    sampling = (sampling or model.default_sampling).changed(settings)
    several = isinstance(labels, Sequence) and not isinstance(labels, str)
    ids = model.label_ids(labels, len(labels) if several else 1)  # type: ignore[arg-type]
    asked = {
        "num_images": num_images,
        "labels": None if labels is None else [model.config.class_names[index] for index in ids.tolist()],
        "seed": seed,
        **{k: v if v is None or k == "top_k" else float(v) for k, v in asdict(sampling).items()},  # 1 is 1.0
        "backend": model.prior.best_backend(sys.maxsize) if backend == "auto" else backend,
        "block_size": block_size,
        "format": format,
        "images_per_shard": images_per_shard,
    }
    model.cluster_ids(cluster, 1)
    later = {"cluster": cluster, "guidance_power": asked.pop("guidance_power")}
    # Sets that older versions began do not name these.
    asked |= {key: value for key, value in later.items() if value is not None}
    _check_settings(asked, model.config.vqvae_config.num_codes)
    num_shards = -(-num_images // images_per_shard)
    names = [shard_name(shard, num_shards, format) for shard in range(num_shards)]
    work = Work(output, names, "shards", rank, world)
    generation = _Generation(model, work, {**asked, **_origin(model, str(asked["backend"]))}, ids)
    with hold(output, rank, world), torch_threads(1):
        return _make_shards(generation, progress)


def _check_settings(asked: dict[str, Any], num_codes: int) -> None:
    """Refuse what the model would not: it never hears of shards."""
    block_size, size = asked["block_size"], asked["images_per_shard"]
    if asked["labels"] == []:
        raise ValueError("labels are empty: give a diagnosis, or None for unconditional images")
    expect(asked["backend"] in BACKENDS, "backend", asked["backend"], f"auto, {', '.join(BACKENDS)}")
    expect(asked["format"] in SUFFIXES, "the format of the shards", asked["format"], " or ".join(SUFFIXES))
    for name in ("num_images", "block_size"):
        expect(asked[name] >= 1, name, asked[name], "at least 1")
    expect(0 <= asked["seed"] < 2**63, "seed", asked["seed"], "0 to 2**63 - 1")
    if size < 1 or size % block_size:
        raise ValueError(
            f"a shard of {size} images: expected a multiple of {block_size}, the images that are computed at once, "
            f"such as {max(round(size / block_size), 1) * block_size}"
        )
    if size > MAX_SHARD_SIZE or asked["num_images"] > MAX_SHARDS * size:
        raise ValueError(
            f"{asked['num_images']} images in shards of {size}: expected at most {MAX_SHARDS:,} shards of at most "
            f"{MAX_SHARD_SIZE:,} images"
        )
    if num_codes > 2**16:
        raise ValueError(f"the model has {num_codes} codes: shards hold at most {2**16}")


def _origin(model: IsicVQModel, backend: str) -> dict[str, str]:
    """Describe what decides bytes: the model's weights, the kind of device and the versions of packages."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    packages = ["torch", "numpy", "pillow", "pyarrow", *(["numba"] if backend == "compiled" else [])]
    return {
        "model": Path(model.config.name_or_path).name,
        "weights": digest.hexdigest(),
        "device": model.device.type,
        "isic_vq": __version__,
        **{package: metadata.version(package) for package in packages},
    }


def _make_shards(generation: _Generation, progress: bool) -> tuple[int, int]:
    """Make the missing ones of a process's shards; returns how many, and how many were there."""
    work, class_names = generation.work, list(generation.model.config.class_names.values())
    _open_folder(generation)
    missing = work.missing
    kept = sorted(set(work.numbers) - set(missing))
    for shard in kept:
        _check_shard(generation, shard)
    total, initial = (sum(len(generation.indices(shard)) for shard in part) for part in (work.numbers, kept))
    title = "generating" if work.world == 1 else f"process 0 of {work.world}"
    with work.progress(total, initial, title, progress and work.rank == 0) as bar:
        for shard in missing:
            samples = []
            for sample in _samples(generation, shard):
                samples.append(sample)
                bar.update()
            with work.naming(work.path(shard)):
                write_shard(work.path(shard), samples, class_names)
    return len(missing), len(kept)


def _open_folder(generation: _Generation) -> None:
    """Begin the folder, or check that it was begun with the same settings."""
    work = generation.work
    work.folder.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in work.folder.iterdir()}
    if MANIFEST not in present:
        next(_samples(generation, 0))  # a setting that the model refuses must not become the folder's
    others = set(fnmatch.filter(present, SHARD_PATTERN)) - set(work.names if MANIFEST in present else ())
    if MANIFEST in present or not others:
        work.begin(generation.settings, MANIFEST)
    if others:
        raise DataError(f"{work.folder} holds {min(others)}, not of this set: choose another folder")


def _check_shard(generation: _Generation, shard: int) -> None:
    """Refuse a file that is not the shard it is named like."""
    path, way_out = generation.work.path(shard), "delete it and run the same command again"
    try:
        samples = read_shard(path)
    except DataError as error:
        raise DataError(f"{error}: {way_out}") from error
    if [sample.index for sample in samples] != list(generation.indices(shard)):
        raise DataError(f"{path} does not hold the images that its name says: {way_out}")
    if {sample.run for sample in samples} != {generation.run}:
        raise DataError(f"{path} was generated with other settings: {way_out}")


def _samples(generation: _Generation, shard: int) -> Iterator[Sample]:
    model, settings, indices = generation.model, generation.settings, generation.indices(shard)
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    labels = generation.labels[torch.tensor(indices) % len(generation.labels)]
    passed_on = [*vars(Sampling()), "seed", "backend", "cluster"]
    passed = {key: settings[key] for key in passed_on if key in settings}
    passed["batch_size"] = settings["block_size"]
    same = {"seed": settings["seed"], "model": settings["model"], "isic_vq": settings["isic_vq"]}
    output: Any
    for output in model.generate_blocks(
        len(indices), labels, first_index=indices[0], sampling=Sampling(), **passed
    ):
        images = processor.postprocess(output.pixel_values, output_type="np")
        codes = output.codes.flatten(1).tolist()
        for pixels, grid, label in zip(images, codes, output.labels.tolist(), strict=True):
            index, indices = indices[0], indices[1:]
            name = model.config.class_names.get(label)
            yield Sample(
                image=to_png(pixels), label=name, index=index, codes=grid, run=generation.run, **same
            )
