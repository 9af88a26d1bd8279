"""The codec beside WebP, AVIF and JPEG: bytes and quality of the same images, speed, and what a decoder needs.

    python benchmarks/codec.py                # all images
    python benchmarks/codec.py --limit 64     # a quick look; writes nothing

Every codec gets the same 8-bit images, at the model's size. The shipped checkpoint's codes are coded under the prior,
with the static table of training counts, and flat. The others sweep their quality; between two neighbouring qualities
a share of the images is thought to have one and the rest the other, so that mean bytes, or mean PSNR, are equal to
the codec's exactly and differences are paired by image. The others' headers are measured on a flat grey image at the
same quality and subtracted in a second line, where the codec is counted without names, checksums and headers, too.
An image's share of a file is what its codes cost under their distribution, and the rest evenly.

Results go to benchmarks/reports/codec.json, the curves to codec.png beside it, where the two ends of this codec's line
are files coded under the prior and portable ones.
"""

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from isic_vq.codec.codec import Compressed, compress, decompress
from isic_vq.codec.integer_weights import PRECISION, static_weights, training_code_counts
from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import find_source
from isic_vq.evaluation.cost import MODEL
from isic_vq.evaluation.intervals import MeasuredOn, mean_interval
from isic_vq.evaluation.measures import image_metrics
from isic_vq.evaluation.report import Metric, Report, environment
from isic_vq.figures.plots import Curve, curves
from isic_vq.files import write_atomically
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.likelihood import score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel
from measure import REPORTS

OTHERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {  # settings and qualities
    "WebP": ({"method": 6}, (0, 2, 4, 10, 15, 20, 40)),
    "AVIF": ({"speed": 6}, (1, 10, 15, 20, 25, 40)),
    "JPEG": ({"optimize": True}, (1, 8, 12, 18, 24, 40)),
}
COUNTED = {"num_bytes": "whole files", "net_bytes": "without headers"}
SPLIT = "validation"
BATCHES = (64, 1)
TIMED_IMAGES = {64: 64, 1: 4}
REPEATS = 5
LONE_IMAGES = 8
SHOWN_BELOW = 5  # dB
TICKS = (100, 200, 300, 500, 800, 1300)


@dataclass(frozen=True)
class Measured:
    """Images at one setting of a codec, `(N,)` float64 each.

    Attributes:
        quality: the setting; None for this codec.
        num_bytes: of each image's file.
        net_bytes: of it, without headers.
        psnr: in dB.
        ssim: in [-1, 1].
    """

    quality: int | None
    num_bytes: Tensor
    net_bytes: Tensor
    psnr: Tensor
    ssim: Tensor

    def mean(self, name: str) -> float:
        """Mean of a column."""
        return getattr(self, name).mean().item()


def read_images(data: str, model: IsicVQModel, limit: int | None) -> tuple[list[str], Tensor]:
    """Names and images `(N, 3, H, W)` in [0, 1], of 8 bits."""
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    names, images = [], []
    for batch in iter_batches(find_source(data).records(), processor, batch_size=32):
        names += batch["isic_ids"]
        images.append(batch["pixel_values"])
        if limit is not None and len(names) >= limit:
            break
    return names[:limit], torch.cat(images)[:limit]


def quality_of(images: Tensor, decoded: Tensor) -> dict[str, Tensor]:
    """PSNR and SSIM of each image against 8-bit pixels, `(N,)` float64."""
    parts = [
        image_metrics(a, (b * 255).round() / 255)
        for a, b in zip(images.split(32), decoded.split(32), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]).double() for name in ("psnr", "ssim")}


def measure_other(images: Tensor, name: str, quality: int) -> Measured:
    """Send images through a codec of Pillow's."""
    settings = {"quality": quality, **OTHERS[name][0]}
    grey = Image.new("RGB", tuple(images.shape[:1:-1]), (128, 128, 128))
    header = len(encoded(grey, name, settings))
    sizes, decoded = [], []
    for image in images:
        content = encoded(to_picture(image), name, settings)
        sizes.append(len(content))
        decoded.append(to_tensor(Image.open(io.BytesIO(content)).convert("RGB")))
    num_bytes = torch.tensor(sizes, dtype=torch.float64)
    return Measured(quality, num_bytes, num_bytes - header, **quality_of(images, torch.stack(decoded)))


def encoded(picture: Image.Image, name: str, settings: dict[str, Any]) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=name.upper(), **settings)
    return buffer.getvalue()


def to_picture(image: Tensor) -> Image.Image:
    """An image `(3, H, W)` in [0, 1] as a picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as an image `(3, H, W)` in [0, 1]."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255


def mixed(points: list[Measured], axis: str, target: float, wanted: str) -> Tensor | None:
    """Column `wanted`, `(N,)`, of the mixture of two neighbouring qualities whose mean `axis` is the target.

    None if the target lies outside of the sweep.
    """
    ordered = sorted(points, key=lambda point: point.mean(axis))
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low.mean(axis) <= target <= high.mean(axis):
            share = (target - low.mean(axis)) / (high.mean(axis) - low.mean(axis))
            return (1 - share) * getattr(low, wanted) + share * getattr(high, wanted)
    return None


def compare(
    ours: Measured, coder: str, points: list[Measured], name: str, on: MeasuredOn
) -> tuple[list[Metric], list[dict[str, str]]]:
    """Differences of this codec, with one of its coders, from another codec, and the verdict on each."""
    metrics, verdicts = [], []

    def judge(what: str, difference: Tensor, unit: str, sign: int = 1, note: str = "", **more: str) -> None:
        labels = {"coder": coder, "codec": name, **more}
        metrics.append(on.mean(f"{what}_difference", difference, unit, **labels))
        verdicts.append({"measured": metrics[-1].text, "verdict": verdict(sign * difference) + note})

    for axis, counted in COUNTED.items():
        have = ours.mean(axis)
        for label, unit in (("psnr", "dB"), ("ssim", "1")):
            theirs, at, note = mixed(points, axis, have, label), "equal bytes", ""
            if theirs is None:
                nearest = min(points, key=lambda point: abs(point.mean(axis) - have))
                theirs, at = getattr(nearest, label), "its nearest bytes"
                note = (
                    f", at {have:.0f} bytes against {nearest.mean(axis):.0f}, the nearest that {name} reaches"
                )
            judge(label, getattr(ours, label) - theirs, unit, 1, note, counted=counted, at=at)
        difference = getattr(ours, axis) - bytes_at(ours.mean("psnr"), points, axis, name)
        judge("bytes", difference, "bytes per image", -1, counted=counted, at="equal PSNR")
    return metrics, verdicts


def bytes_at(psnr: float, points: list[Measured], axis: str, name: str) -> Tensor:
    """Bytes `(N,)` that another codec needs for a mean PSNR in dB."""
    found = mixed(points, "psnr", psnr, axis)
    if found is None:
        raise ValueError(f"{name} does not reach {psnr:.2f} dB in its sweep: give it more qualities")
    return found


def verdict(gain: Tensor) -> str:
    """What the 95 % interval of a mean gain says."""
    low, high = mean_interval(gain)
    return "wins" if low > 0 else "loses" if high < 0 else "undecided: the interval holds 0"


def shared_out(file: Compressed, ideal: Tensor, scores: dict[str, Tensor]) -> Measured:
    """A file's bytes by image: what its codes cost, and an even share of the rest."""
    number = file.num_images
    net = ideal + (file.payload_bytes - ideal.sum()) / number
    return Measured(None, net + (len(file.content) - file.payload_bytes) / number, net, **scores)


def timed(action: Callable[[], Any]) -> Tensor:
    """Seconds, `(REPEATS,)` float64."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return torch.tensor(seconds, dtype=torch.float64)


@torch.inference_mode()
def speed(model: IsicVQModel, images: Tensor, counts: list[int] | None, on: MeasuredOn) -> list[Metric]:
    """Images per second from pixels to file and back, at so many images per block; the first run is counted, too."""
    metrics = []
    for batch in BATCHES:
        part = images[: TIMED_IMAGES[batch]]
        names = [str(index) for index in range(len(part))]
        for coder, portable in (("prior", False), ("static", True)):

            def write(batch=batch, part=part, names=names, portable=portable) -> Compressed:
                codes = torch.cat([model.encode(images) for images in part.split(batch)])
                return compress(model, codes, names, None, counts, portable, lanes=batch)

            def read(content: bytes, batch=batch) -> None:
                for codes in decompress(model, content, counts).codes.split(batch):
                    model.decode(codes)

            content = write().content
            for name, action in (("encode", write), ("decode", partial(read, content))):
                rates = len(part) / timed(action)
                labels = {"action": name, "coder": coder, "batch": str(batch)}
                metrics.append(on.mean("images_per_second", rates, "images per second", **labels))
    return metrics


def sizes(model: IsicVQModel) -> list[Metric]:
    """What a decoder has to have."""
    tokenizer = {
        name: tensor
        for name, tensor in model.vqvae.state_dict().items()
        if name.startswith("decoder.") or name == "quantizer.codebook"
    }
    metrics = []
    for name, tensors in (
        ("tokenizer's decoder and codebook", tokenizer),
        ("prior", model.prior.state_dict()),
    ):
        numbers = sum(tensor.numel() for tensor in tensors.values())
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        metrics += [
            MODEL.metric("decoder_parameters", numbers, "parameters", 1, part=name),
            MODEL.metric("decoder_bytes", stored, "bytes", 1, part=name),
        ]
    return metrics


def lone_metric(
    model: IsicVQModel, codes: Tensor, counts: list[int] | None, portable: bool, on: MeasuredOn
) -> Metric:
    """Bytes of files that hold one image each, of the first few images."""
    found = [
        len(compress(model, grid, ["image.jpg"], None, counts, portable).content)
        for grid in codes[:LONE_IMAGES].split(1)
    ]
    sizes, coder = torch.tensor(found, dtype=torch.float64), "unigram" if portable else "prior"
    return on.mean("bytes_of_a_file_of_one_image", sizes, "bytes per image", coder=coder)


def size_metrics(files: dict[str, Compressed], on: MeasuredOn) -> list[Metric]:
    """Bytes per image of each coder, and of them what is not codes."""
    metrics = []
    for name, file in files.items():
        number = file.num_images
        parts = {
            "bytes_per_image": len(file.content),
            "code_bytes_per_image": file.payload_bytes,
            "overhead_bytes_per_image": len(file.content) - file.payload_bytes,
        }
        metrics += [
            on.metric(part, value / number, "bytes per image", number, coder=name)
            for part, value in parts.items()
        ]
        metrics.append(on.metric("fallback_blocks", file.num_fallbacks, "blocks", number, coder=name))
    return metrics


def repaid(
    ours: Measured, points: dict[str, list[Measured]], decoder: list[Metric], on: MeasuredOn
) -> list[Metric]:
    """How many images it takes until the bytes saved at equal PSNR are those of the decoder's weights."""
    weights = sum(metric.value for metric in decoder if metric.unit == "bytes")
    metrics = []
    for name in OTHERS:
        saved = bytes_at(ours.mean("psnr"), points[name], "num_bytes", name).mean().item() - ours.mean(
            "num_bytes"
        )
        if saved > 0:
            number = len(ours.psnr)
            metrics.append(
                on.metric("images_that_repay_the_decoder", weights / saved, "images", number, codec=name)
            )
    return metrics


def point_rows(points: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """The curves as a table."""
    return [
        {"codec": name, "quality": point.quality}
        | {column: point.mean(column) for column in ("num_bytes", "net_bytes", "psnr", "ssim")}
        for name, measured in points.items()
        for point in measured
    ]


def draw(points: dict[str, list[Measured]], path: Path) -> None:
    """Draw quality over bytes, of qualities that are not far worse than this codec's."""
    panels, least = [], next(iter(points.values()))[0].mean("psnr") - SHOWN_BELOW
    for axis, counted in COUNTED.items():
        for quality, unit in (("psnr", "PSNR in dB"), ("ssim", "SSIM")):
            drawn = []
            for name, measured in points.items():
                near = [point for point in measured if point.mean("psnr") > least]
                x, y = ([point.mean(column) for point in near] for column in (axis, quality))
                drawn.append(Curve(name, x, y, [y]))
            panels.append((f"{unit.split()[0]}, {counted}", unit, drawn))
    order = [0, 2, 1]  # the fourth says nothing more
    figure = curves([panels[index] for index in order], "bytes per image", TICKS)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="parquet:${ISIC_VQ_DATA}/ham10000/validation-*.parquet")
    parser.add_argument("--limit", type=int, help="only so many images; prints, but writes no report")
    parser.add_argument("--output", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    model = load_model(IsicVQModel).cpu()
    counts, on = training_code_counts(), MeasuredOn(SPLIT, find_source(arguments.data).name)
    names, images = read_images(arguments.data, model, arguments.limit)
    with torch.inference_mode():
        codes = torch.cat([model.encode(part) for part in images.split(32)])
        decoded = torch.cat([model.decode(part) for part in codes.split(32)])
    files = {
        "prior": compress(model, codes, names, None, counts),
        "unigram": compress(model, codes, names, None, counts, portable=True),
        "flat": compress(model, codes, names, None, None, portable=True),
    }
    for name, file in files.items():
        back = decompress(model, file.content, None if name == "flat" else counts)
        if back.names != names or not torch.equal(back.codes, codes) or back.damage:
            raise RuntimeError(f"the codes coded as {name} do not come back")
        print(f"{name}: {len(file.content) / len(names):.1f} bytes per image", flush=True)
    scores = quality_of(images, decoded)
    frequencies = torch.from_numpy(static_weights(counts or [0] * model.config.vqvae_config.num_codes)) + 1
    ideal = {
        "prior": score_codes(model, codes).flatten(1).sum(1) / 8,
        "unigram": (PRECISION - frequencies.log2()[codes]).flatten(1).sum(1) / 8,
    }
    ours = {name: shared_out(files[name], costs, scores) for name, costs in ideal.items()}
    metrics = size_metrics(files, on)
    metrics += [
        on.mean("ideal_code_bytes_per_image", costs, "bytes per image", coder=name)
        for name, costs in ideal.items()
    ]
    units = {"psnr": "dB", "ssim": "1"}
    metrics += [on.mean(name, scores[name], unit) for name, unit in units.items()]
    points, verdicts = {"isic-vq": list(ours.values())}, []
    for name, (_, qualities) in OTHERS.items():
        points[name] = [measure_other(images, name, quality) for quality in qualities]
        for axis, counted in COUNTED.items():
            needed = bytes_at(scores["psnr"].mean().item(), points[name], axis, name)
            labels = {"codec": name, "counted": counted}
            metrics.append(on.mean("bytes_at_equal_psnr", needed, "bytes per image", **labels))
        for coder, measured in ours.items():
            found, said = compare(measured, coder, points[name], name, on)
            metrics, verdicts = metrics + found, verdicts + said
        print(f"{name} is measured", flush=True)
    metrics += [lone_metric(model, codes, counts, portable, on) for portable in (False, True)]
    metrics += repaid(ours["prior"], points, sizes(model), on) + sizes(model)
    metrics += speed(model, images, counts, on)
    report = Report(
        model={"name": "isic-vq-128", "type": "isic_vq", "prior": model.config.prior_config.model_type},
        metrics=metrics,
        tables={
            "curves": point_rows(points),
            "verdicts": verdicts,
            "settings": {name: settings for name, (settings, _) in OTHERS.items()},
        },
        environment=environment("cpu"),
    )
    for metric in metrics:
        interval = (
            "" if metric.interval is None else f"  [{metric.interval[0]:.4g}, {metric.interval[1]:.4g}]"
        )
        print(f"{metric.value:12.4f}{interval}  {metric.unit}  {metric.text}")
    for row in verdicts:
        print(f"{row['measured']}: {row['verdict']}")
    if arguments.limit is None:
        report.save(arguments.output / "codec.json")
        draw(points, arguments.output / "codec.png")


if __name__ == "__main__":
    main()
