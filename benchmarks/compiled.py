"""Do exported and compiled models compute what eager ones do?

    python benchmarks/compiled.py   # needs a C++ compiler, such as g++; half an hour
    python benchmarks/compiled.py --backends export aot_eager inductor

Encoder, decoder, tokenizer and prior of both shipped checkpoints, by `torch.export` and by
`torch.compile(fullgraph=True)`, once for each batch size and once for any; class labels are given. The table has the largest
difference of pixels, latents and logits to eager; codes that differ of the tokenizer's and of those drawn from the logits with
the noise of seed 0; and how many of these are near ties: another code lies as near to 1e-5 of the squared distance, or
the draw lies within 1e-5 of the border between two codes. Results go to benchmarks/reports/compiled.json.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isic_vq import IsicVQModel, VARModel, VQVAEModel
from isic_vq.evaluation.report_tables import markdown_table
from isic_vq.models.sampling import draw, image_generators, position_uniforms
from isic_vq.models.vector_quantizer import rows
from measure import write_report

MODELS = Path(__file__).resolve().parents[1] / "model_cards"
BATCHES = (2, 1, 5)
NEAR = 1e-5
Part = tuple[nn.Module, dict[str, Tensor]]


def parts_of(model: IsicVQModel) -> dict[str, Part]:
    """Each part and its inputs for the largest batch."""
    images, size = max(BATCHES), model.config.vqvae_config.image_size
    pixel_values = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    codes = model.encode(pixel_values)
    prior = {"codes": codes, "class_ids": torch.arange(images)}
    if isinstance(model.prior, VARModel):
        prior["context"] = model.vqvae.context(codes)
    return {
        "encoder": (model.vqvae.encoder, {"pixel_values": pixel_values}),
        "decoder": (model.vqvae.decoder, {"quantized": model.vqvae.quantizer.lookup(codes)}),
        "tokenizer": (model.vqvae, {"pixel_values": pixel_values}),
        "prior": (model.prior, prior),
    }


def converted(part: Part, backend: str, dynamic: bool, images: int) -> Callable[..., Any]:
    """The part, exported or compiled."""
    module, inputs = part
    if backend == "export":
        shapes = {name: {0: torch.export.Dim("batch")} for name in inputs} if dynamic else None
        example = {name: value[:images] for name, value in inputs.items()}
        return torch.export.export(module, (), example, dynamic_shapes=shapes).module()
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)


def differences(module: nn.Module, expected: Any, found: Any) -> tuple[float, int, int]:
    """Largest difference of numbers, codes that differ, and near ties among these."""
    if isinstance(expected, Tensor):
        return (expected - found).abs().max().item(), 0, 0
    name = "logits" if "logits" in expected else "reconstruction"
    largest = (expected[name] - found[name]).abs().max().item()
    if isinstance(module, VQVAEModel):
        largest = max(largest, (expected.latents - found.latents).abs().max().item())
        differs = (expected.codes != found.codes).flatten()
        if module.config.scales or not differs.any():  # a code of a coarser scale moves all later ones
            return largest, int(differs.sum()), 0
        latents = rows(expected.latents).flatten(0, 2)[differs]
        both = torch.stack([expected.codes.flatten()[differs], found.codes.flatten()[differs]], 1)
        distances = (latents[:, None] - module.quantizer.codebook[both]).square().sum(2)
        near = (distances[:, 0] / distances[:, 1] - 1).abs() < NEAR
        return largest, int(differs.sum()), int(near.sum())
    uniforms = position_uniforms(image_generators(0, len(expected.logits)), module.config.num_positions)
    logits = [output.logits.flatten(2).transpose(1, 2) for output in (expected, found)]
    codes = [draw(part, uniforms) for part in logits]
    differs = codes[0] != codes[1]
    borders = logits[0].double().softmax(2).cumsum(2).gather(2, torch.minimum(*codes)[..., None])[..., 0]
    near = differs & ((borders - uniforms).abs() < NEAR)
    return largest, int(differs.sum()), int(near.sum())


@torch.no_grad()
def measure(part: Part, backend: str, dynamic: bool) -> dict[str, Any]:
    """Compare a part over batches: of one graph if it is `dynamic`, or of one for each."""
    module, inputs = part
    results, model = [], None
    for images in BATCHES:
        batch = {name: value[:images] for name, value in inputs.items()}
        if model is None or not dynamic:
            model = converted(part, backend, dynamic, images)
        results.append(differences(module, module(**batch), model(**batch)))
    difference, codes, near = zip(*results, strict=True)
    return {"difference": max(difference), "codes_differ": sum(codes), "near_ties": sum(near)}


def main() -> None:
    """Compare, print the table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["inductor"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = []
    for checkpoint in ("isic-vq-128", "isic-vq-128-var"):
        for name, part in parts_of(IsicVQModel.from_pretrained(MODELS / checkpoint)).items():
            for backend in arguments.backends:
                for dynamic in (False, True):
                    what = {
                        "model": checkpoint,
                        "part": name,
                        "backend": backend,
                        "batch": "any" if dynamic else "each",
                    }
                    table.append({**what, **measure(part, backend, dynamic)})
                    print(*table[-1].values(), flush=True)
    cells = [
        [f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in table
    ]
    print(markdown_table(list(table[0]), cells))
    write_report("compiled", {"batches": BATCHES, "near": NEAR, "threads": 1}, {"rows": table})


if __name__ == "__main__":
    main()
