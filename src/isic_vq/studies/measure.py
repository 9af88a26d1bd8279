"""Measure the models of a study: image by image, once, so that they can be compared, and what they cost."""

import math
import time
from pathlib import Path

import scipy.stats
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isic_vq.data.sources import find_source
from isic_vq.evaluation.images import measure_images
from isic_vq.evaluation.likelihood import bits_per_code
from isic_vq.evaluation.report import Metric
from isic_vq.figures.runs import METRICS_FILE, read_metrics
from isic_vq.files import write_atomically
from isic_vq.hub import load_model
from isic_vq.models.modeling_isic_vq import BLOCK_SIZE, IsicVQModel
from isic_vq.studies.chain import Chain

VALUES = ("psnr", "ssim", "bits_per_code")
REPEATS = 6  # of a timed block: of fewer, not even the least and the most enclose the median 95 times of 100


def measure_chain(chain: Chain, name: str, uri: str) -> dict[str, Tensor]:
    """PSNR, SSIM and unconditional bits per code of every image of a data set, and how often each code is used.

    Args:
        chain: a finished one.
        name: of the data set; the values are kept in the chain's folder under it, until its images change.
        uri: of the data set.

    Returns:
        `(N,)` float64 for each of `VALUES`, in the order of the data set, and `codebook_counts`, `(K,)` int64.

    Raises:
        DataError: as `measure_images`.
    """
    source = find_source(uri)
    fingerprint = source.fingerprint()
    path = chain.folder / "measured" / f"{name}.safetensors"
    if not path.is_file() or _measured_of(path) != fingerprint:
        model = load_model(IsicVQModel, str(chain.model)).eval()
        measured = measure_images(model, source)
        values = {key: measured.reconstruction.values[key].double() for key in ("psnr", "ssim")}
        values["bits_per_code"] = bits_per_code(model.prior, measured.codes, None).double()
        values["codebook_counts"] = torch.tensor(measured.reconstruction.codebook_counts)
        write_atomically(path, save(values, metadata={"images": fingerprint}))
    return load_file(path)


def _measured_of(path: Path) -> str | None:
    """Fingerprint of the images that kept values are of."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("images")


def flops_per_image(model: IsicVQModel) -> dict[str, int]:
    """Floating-point operations of one image's way forward.

    Returns:
        `tokenizer`: encoder and decoder. `decoder`: it alone. `prior`: one pass over all codes, which is what training
        takes, and incremental sampling, too.
    """
    config = model.config.vqvae_config
    pixel_values = torch.zeros(1, 3, config.image_size, config.image_size)
    counted = {}
    with FlopCounterMode(display=False) as counter:
        codes = model.encode(pixel_values)
    encoder = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.decode(codes)
    counted["decoder"] = counter.get_total_flops()
    counted["tokenizer"] = encoder + counted["decoder"]
    with FlopCounterMode(display=False) as counter:
        model.prior(codes.clone())  # with gradients: the counter follows modules by them
    counted["prior"] = counter.get_total_flops()
    return counted


def training_flops(chain: Chain, flops: dict[str, int]) -> int:
    """Floating-point operations of all steps of both trainings.

    Args:
        chain: the trainings.
        flops: of one image, as `flops_per_image`.
    """
    loops = {"tokenizer": chain.tokenizer_recipe().loop, "prior": chain.prior_recipe().loop}
    # A step back costs twice a step forward: the gradients of inputs and of weights.
    return sum(3 * flops[part] * loop.max_steps * loop.batch_size for part, loop in loops.items())


def step_seconds(chain: Chain) -> dict[str, Tensor]:
    """Seconds of every training step that the run's log has, reading data included: by run, `(steps,)` float64."""
    seconds = {}
    for part in ("vqvae", "prior"):
        steps = read_metrics(chain.folder / part / METRICS_FILE)["batch"]
        times = [step["data_seconds"] + step["compute_seconds"] for step in steps]
        seconds[part] = torch.tensor(times, dtype=torch.float64)
    return seconds


def sampling_seconds(model: IsicVQModel) -> Tensor:
    """Seconds per image of drawing and decoding a block of `BLOCK_SIZE` images.

    Returns:
        `(REPEATS,)` float64, after one block that is not counted.
    """
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        model.generate(BLOCK_SIZE, seed=0)
        times.append((time.perf_counter() - began) / BLOCK_SIZE)
    return torch.tensor(times[1:], dtype=torch.float64)


def median_metric(
    name: str, values: Tensor, unit: str, split: str, dataset: str, seed: int | None = None
) -> Metric:
    """A median with the interval that its order statistics give, whatever the distribution: times have long tails.

    Args:
        name: as for `Metric`.
        values: `(N,)`, in `unit`; of fewer than six there is no such interval.
        unit: as for `Metric`.
        split: as for `Metric`.
        dataset: as for `Metric`.
        seed: as for `Metric`.
    """
    bounds = scipy.stats.quantile_test(values.numpy(), p=0.5).confidence_interval(0.95)
    interval = [float(bounds.low), float(bounds.high)]
    return Metric(
        name,
        values.quantile(0.5).item(),
        unit,
        len(values),
        split,
        dataset,
        seed,
        None if math.isnan(sum(interval)) else interval,
    )
