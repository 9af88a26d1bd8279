"""How fast the shipped tokenizer is in ONNX Runtime, as ratios to torch's eager mode.

    python benchmarks/onnx_runtime.py

Encoding and decoding with model_cards/isic-vq-128 on the CPU, in batches of 1 and of 16: `VQVAEModel.encode` and `decode`
next to the files that `isic-vq export --onnx` writes, with as many threads; contestants take turns as measure.py has it. The
export itself checks that both compute the same. Results go to benchmarks/reports/onnx-runtime.json.
"""

import argparse
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from onnxruntime import InferenceSession, SessionOptions

from isic_vq.hub.onnx_export import export_onnx
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_vqvae import VQVAEModel
from measure import Contestant, compare, print_figures, write_report

BATCH_SIZES = (1, 16)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="samples of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before its first sample")
    parser.add_argument("--threads", type=int, default=2, help="of torch and of ONNX Runtime")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load_model(VQVAEModel).cpu()
    options = SessionOptions()
    options.intra_op_num_threads = args.threads
    with tempfile.TemporaryDirectory() as folder:
        encoder, decoder = (
            InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in export_onnx(model, Path(folder))
        )
    contestants: dict[str, Contestant] = {}
    figures: dict[str, tuple[str, str]] = {}
    for size in BATCH_SIZES:
        pixel_values = torch.rand(size, 3, model.config.image_size, model.config.image_size)
        codes = model.encode(pixel_values)
        steps: dict[str, tuple[Any, Any]] = {
            "encode": (
                partial(model.encode, pixel_values),
                partial(encoder.run, None, {"pixel_values": pixel_values.numpy()}),
            ),
            "decode": (partial(model.decode, codes), partial(decoder.run, None, {"codes": codes.numpy()})),
        }
        for name, (in_torch, in_onnx) in steps.items():
            work = f"{name}, batch of {size}"
            contestants[f"torch: {work}"] = Contestant(in_torch, size)
            contestants[f"onnxruntime: {work}"] = Contestant(in_onnx, size)
            figures[f"throughput of onnxruntime over torch: {work}"] = (
                f"torch: {work}",
                f"onnxruntime: {work}",
            )
    rows = compare(contestants, figures, args.rounds, args.warmup)
    for name, row in rows["contestants"].items():
        print(f"{row['images_per_second']:8.1f} images/s  {name}")
    print_figures(rows)
    versions = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    write_report("onnx-runtime", {"rounds": args.rounds, "threads": args.threads, **versions}, rows)


if __name__ == "__main__":
    main()
