"""From a cold start to PNG files: where the time of `isic-vq generate -n 16` goes.

    python benchmarks/cold_start.py

Every sample is a fresh process on the shipped checkpoint. One kind runs the command as users do;
the other does the same with a clock between its parts: import, load, sample, decode, write. Results go to
benchmarks/reports/cold-start.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import torch

from measure import spread, write_report

PARTS = """
import json, sys, time
clock = [time.perf_counter()]
from isic_vq.cli.app import quiet_transformers
from isic_vq.figures.png import write_png
from isic_vq.figures import image_grid
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.pipeline_isic_vq import UnconditionalImageGenerationPipeline
from isic_vq.models.sampling import image_generators, position_uniforms
clock.append(time.perf_counter())
quiet_transformers()
pipe = UnconditionalImageGenerationPipeline(load_model(IsicVQModel, None))
clock.append(time.perf_counter())
model, backend = pipe.model, sys.argv[2]
uniforms = position_uniforms(image_generators(0, 16), model.config.prior_config.grid_size**2)
import torch
codes = model.prior.sample(
    uniforms,
    backend=model.prior.best_backend(1) if backend == "auto" else backend,
    clusters=torch.zeros(16, dtype=torch.long) if model.prior.config.num_clusters else None,
)
clock.append(time.perf_counter())
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
with torch.no_grad():
    pixels = IsicVQImageProcessor(size=128).postprocess(model.decode(codes), output_type="np")
clock.append(time.perf_counter())
from pathlib import Path
for index, image in enumerate(pixels):
    write_png(image, Path(sys.argv[1]) / f"image-{index:05d}.png", {})
write_png(image_grid(pixels), Path(sys.argv[1]) / "grid.png", {})
clock.append(time.perf_counter())
names = ("import", "load", "sample", "decode", "write")
print(json.dumps(dict(zip(names, (b - a for a, b in zip(clock, clock[1:]))))))
"""


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for backend in ("auto", "compiled"):
            row = rows.setdefault(backend, {})
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                command = ["-m", "isic_vq", "generate", "-n", "16", "-o", folder, "--backend", backend]
                subprocess.run([sys.executable, *command], capture_output=True, check=True)
                row.setdefault("command", []).append(time.perf_counter() - start)
                command = [sys.executable, "-c", PARTS, folder, backend]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            for part, seconds in json.loads(done.stdout).items():
                row.setdefault(part, []).append(seconds)
    report = {
        backend: {part: spread(seconds) for part, seconds in row.items()} for backend, row in rows.items()
    }
    for backend, row in report.items():
        print(backend, {part: round(seconds["median"], 3) for part, seconds in row.items()})
    settings = {"images": 16, "rounds": arguments.rounds, "threads": torch.get_num_threads()}
    write_report("cold-start", settings, {"seconds": report})


if __name__ == "__main__":
    main()
