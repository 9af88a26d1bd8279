"""Cost of a model: parameters, bytes of weights, bytes per image, and time.

Times are of this machine at that moment: read them with the report's environment, and compare them within one report.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


def flops_per_image(model: IsicVQModel) -> dict[str, int]:
    """Floating-point operations of a forward pass of one image.

    Returns:
        `tokenizer`: encoder and decoder. `decoder`: it alone. `prior`: one pass over all codes, which is what training
        takes, and incremental sampling, too.
    """
    config = model.config.vqvae_config
    pixel_values = torch.zeros(1, 3, config.image_size, config.image_size)
    codes = model.encode(pixel_values)
    decoder = count_flops(lambda: model.decode(codes))
    return {
        "tokenizer": count_flops(lambda: model.encode(pixel_values)) + decoder,
        "decoder": decoder,
        "prior": count_flops(lambda: model.predict(codes.clone())),  # a normal tensor: gradients are recorded
    }


def count_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of products and convolutions that torch does in a call.

    Attention is computed as two products, because the counter ignores its fused kernels for CPUs.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
