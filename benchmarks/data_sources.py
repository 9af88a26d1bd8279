"""How fast images come out of each kind of source, decoded and resized to 128 pixels, beside plain `datasets` streaming.

    ISIC_VQ_DATA=... python benchmarks/data_sources.py

The same encoded images lie in a parquet file, a tar, a folder and, over HTTP, in a challenge's zip archive. Contestants
stream them from the first to the last: the package's sources, which decode while reading, and `datasets` with its own
readers, which opens each image for the same image processor. imagefolder over a zip re-reads the archive's directory
for each image, so only its first images are taken; `datasets` needs aiohttp for it, which is no dependency of the package:

    pip install --target build/aiohttp aiohttp && PYTHONPATH=build/aiohttp ISIC_VQ_DATA=... python benchmarks/data_sources.py

The server runs in the same process. Results go to benchmarks/reports/data-sources.json.
"""

import argparse
import itertools
import os
import sys
import tempfile
import zipfile
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch

from measure import Contestant, compare, print_figures, write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from fault_server import FaultServer

from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import find_source
from isic_vq.data.sources.manifest import write_shard
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

SIZE = 128
CLASSES = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


def real_images(number: int) -> list[dict[str, Any]]:
    """The first records of HAM10000's training files, over and over."""
    source = find_source("parquet:${ISIC_VQ_DATA}/ham10000/train-*.parquet")
    records = list(itertools.islice((r for part in source.parts() for r in source.read(part)), number))
    return [{**r, "image": {"bytes": r["image"], "path": f"{r['isic_id']}.jpg"}} for r in records]


def write_sources(folder: Path, records: list[dict[str, Any]]) -> dict[str, bytes]:
    """Write parquet, tar and folder; return the files of the challenge's server."""
    for name in ("parquet", "tar", "images"):
        (folder / name).mkdir()
    write_shard(folder / "parquet" / "train-00000.parquet", records)
    write_shard(folder / "tar" / "train-00000.tar", records)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for record in records:
            (folder / "images" / record["image"]["path"]).write_bytes(record["image"]["bytes"])
            file.writestr(
                f"ISIC2018_Task3_Training_Input/{record['image']['path']}", record["image"]["bytes"]
            )
    rows = [f"{r['isic_id']},0.0,1.0" + ",0.0" * 5 for r in records]
    truth = BytesIO()
    with zipfile.ZipFile(truth, "w") as file:
        file.writestr("GT/truth.csv", "\n".join(["image," + ",".join(CLASSES), *rows]))
    lesions = "\n".join(["image,lesion_id", *(f"{r['isic_id']},{r['lesion_id']}" for r in records)])
    stem = "/challenge/2018/ISIC2018_Task3_Training"
    return {
        f"{stem}_Input.zip": archive.getvalue(),
        f"{stem}_GroundTruth.zip": truth.getvalue(),
        f"{stem}_LesionGroupings.csv": lesions.encode(),
    }


def read_ours(uri: str, number: int, processor: IsicVQImageProcessor) -> None:
    """Stream a source of the package."""
    found = sum(len(b["indices"]) for b in iter_batches(find_source(uri).stream(), processor, batch_size=32))
    if found != number:
        raise RuntimeError(f"{uri} gave {found} images, expected {number}")


def read_plain(options: dict[str, Any], column: str, number: int, processor: IsicVQImageProcessor) -> None:
    """Stream by `datasets` alone, and make squares of its images."""
    stream = datasets.load_dataset(**options, split="train", streaming=True)
    found = 0
    for row in stream.take(number):
        processor.to_square(row[column])
        found += 1
    if found != number:
        raise RuntimeError(f"{options} gave {found} images, expected {number}")


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000, help="in each source")
    parser.add_argument("--of-the-zip", type=int, default=20, help="images that imagefolder reads of it")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contestant")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    processor = IsicVQImageProcessor(size=SIZE)
    records = real_images(args.images)
    number = len(records)
    with tempfile.TemporaryDirectory() as name, FaultServer() as server:
        folder = Path(name)
        server.files = write_sources(folder, records)
        os.environ["ISIC_VQ_CHALLENGE_URL"] = f"{server.url}/challenge"
        zip_url = f"{server.url}/challenge/2018/ISIC2018_Task3_Training_Input.zip"
        ours = {
            "parquet": f"parquet:{folder}/parquet/*.parquet",
            "tar": f"webdataset:{folder}/tar/*.tar",
            "folder": f"folder:{folder}/images",
            "zip over HTTP": "challenge:2018",
        }
        plain: dict[str, tuple[dict[str, Any], str, int]] = {
            "parquet": ({"path": "parquet", "data_files": f"{folder}/parquet/*.parquet"}, "image", number),
            "tar": ({"path": "webdataset", "data_files": f"{folder}/tar/*.tar"}, "jpg", number),
            "folder": ({"path": "imagefolder", "data_dir": f"{folder}/images"}, "image", number),
        }
        if find_spec("aiohttp"):
            options = {"path": "imagefolder", "data_files": zip_url, "drop_labels": True}
            plain["zip over HTTP"] = (options, "image", min(args.of_the_zip, number))
        contestants = {
            f"isic-vq: {kind}": Contestant(partial(read_ours, uri, number, processor), number)
            for kind, uri in ours.items()
        }
        for kind, (options, column, count) in plain.items():
            step = partial(read_plain, options, column, count, processor)
            contestants[f"datasets: {kind}"] = Contestant(step, number, parts=number // count)
        figures = {
            f"throughput of isic-vq over datasets: {kind}": (f"datasets: {kind}", f"isic-vq: {kind}")
            for kind in plain
        }
        rows = compare(contestants, figures, args.rounds, warmup=1)
    for title, row in rows["contestants"].items():
        print(f"{row['images_per_second']:8.1f} images/s  {title}")
    print_figures(rows)
    settings = {"images": number, "rounds": args.rounds, "size": SIZE, "of_the_zip": args.of_the_zip}
    versions = {package: metadata.version(package) for package in ("datasets", "pyarrow", "pillow")}
    sizes = pyarrow.array([len(r["image"]["bytes"]) for r in records])
    settings["mean_bytes"] = round(pyarrow.compute.mean(sizes).as_py())
    write_report("data-sources", {**settings, **versions}, rows)


if __name__ == "__main__":
    main()
