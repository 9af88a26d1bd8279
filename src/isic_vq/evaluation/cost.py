"""Cost of a model: parameters, bytes of weights, bytes per image, and time.

Times are of this machine at that moment: read them with the report's environment, and compare them within one report.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Metric
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.repository import PARTS

REPEATS = 5
BATCH_SIZES = (1, 16)
MODEL = MeasuredOn("model", "model")  # no images of anybody


def cost_metrics(model: IsicVQModel, bits_per_code: float, seed: int = 0) -> list[Metric]:
    """The report's lines for what the model costs.

    * `parameters` and `weight_bytes` of each part, in memory;
    * `bytes_per_image_flat`, codes stored as they are, and `bytes_per_image_prior`, what an ideal entropy coder driven
      by the prior reaches, of the images that `bits_per_code` was measured on;
    * `seconds_per_image` to generate, encode and decode, by batch size: the mean of `REPEATS` runs after one that warms up.
    """
    config = model.config.vqvae_config
    positions = config.num_positions
    metrics = []
    for part in PARTS:
        module = getattr(model, part)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        metrics += [
            MODEL.metric("parameters", module.num_parameters(), "parameters", 1, part=part),
            MODEL.metric("weight_bytes", stored, "bytes", 1, part=part),
        ]
    for name, bits in (("flat", math.log2(config.num_codes)), ("prior", bits_per_code)):
        metrics.append(MODEL.metric(f"bytes_per_image_{name}", positions * bits / 8, "bytes per image", 1))
    for batch in BATCH_SIZES:
        images = torch.rand(batch, 3, config.image_size, config.image_size, device=model.device)
        codes = model.encode(images)
        actions: dict[str, Callable[[], object]] = {
            "generate": partial(model.generate, batch, seed=seed),
            "encode": partial(model.encode, images),
            "decode": partial(model.decode, codes),
        }
        for name, action in actions.items():
            times = seconds(action, model.device) / batch
            drawn = seed if name == "generate" else None
            labels = {"action": name, "batch": str(batch)}
            metrics.append(MODEL.mean("seconds_per_image", times, "s per image", drawn, **labels))
    return metrics


def seconds(action: Callable[[], object], device: torch.device) -> torch.Tensor:
    """Duration of `action`, `(REPEATS,)` float64 in seconds, after one run that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return torch.tensor(times[1:], dtype=torch.float64)
