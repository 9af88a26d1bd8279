"""How well pythae's VQ-VAE reconstructs beside ours: same halves, images, order, views, optimizer, steps and codes.

    PYTHONPATH=build/peers python benchmarks/peer_quality.py    # needs pythae, see benchmarks/README.md

What differs is what the two packages bring: loss, codebook and its start, as each has them by default (ours by the
recipe examples/configs/vqvae-f8.yaml). Pythae's models are trained in float32, because its quantizer computes distances in
whatever precision autocast gives it, and without clipped gradients, because its loss is a sum over pixels; ours is in
the recipe's precision. Weights are those of the last step, numbers of all validation images. One seed each:
differences under about 0.3 dB mean nothing. Result: benchmarks/reports/peer-quality.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers import pythae_vqvae
from torch import Tensor, nn

from isic_vq.evaluation.reconstruction import Reconstruction, evaluate_reconstruction
from isic_vq.evaluation.report import environment
from isic_vq.files import write_atomically
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.image_task import ImageTask, open_images
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import VQVAERecipe
from isic_vq.training.run import build_config, open_run
from isic_vq.training.vqvae import VQVAETask

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples/configs/vqvae-f8.yaml"
REPORT = ROOT / "benchmarks/reports/peer-quality.json"
CONTESTANTS: dict[str, dict[str, Any]] = {
    "isic-vq": {},
    "pythae, moving average": {"use_ema": True},
    "pythae, gradient": {"use_ema": False},
}


class PythaeTask(VQVAETask):
    """Pythae's model in our loop.

    Args:
        tokenizer: its halves are trained; it measures them with pythae's codebook.
        settings: of pythae's `VQVAEConfig`, beside sizes.
        arguments: as for `VQVAETask`, without the model.
    """

    def __init__(self, tokenizer: VQVAEModel, settings: dict[str, Any], *arguments: Any):
        super().__init__(tokenizer, *arguments)
        self.tokenizer = tokenizer
        self.model = pythae_vqvae(tokenizer.encoder, tokenizer.decoder, tokenizer.config, **settings)

    def compiled_parts(self) -> list[nn.Module]:
        """Nothing."""
        return []

    def begin(self, processes: Processes) -> None:
        """The codebook is pythae's own."""
        ImageTask.begin(self, processes)

    def before_step(self, step: int) -> None:
        """No warm-up and no k-means."""

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Pythae's loss of a batch."""
        return {"loss": model({"data": self.pixel_values(batch)}).loss}

    def after_step(self) -> dict[str, Tensor]:
        """It has learnt in the step."""
        return {}

    def measured(self) -> Reconstruction:
        """How the halves do with pythae's codebook."""
        codebook = self.model.quantizer.embeddings
        codebook = codebook.weight if isinstance(codebook, nn.Embedding) else codebook
        self.tokenizer.quantizer.start_from(codebook.detach(), torch.ones(len(codebook)))
        return evaluate_reconstruction(self.tokenizer, self.images(self.validation_set))

    def validate(self) -> dict[str, float]:
        """Reconstruction of the validation images."""
        result = self.measured()
        return {"loss": result.mse, "psnr": result.psnr, "usage": result.usage}

    def save(self, folder: Path) -> None:
        """The tokenizer with pythae's codebook."""
        self.measured()
        self.tokenizer.save_pretrained(folder)


def trained(name: str, settings: dict[str, Any], steps: int) -> Reconstruction:
    """Train a contestant to its last step, and measure it."""
    folder = ROOT / "runs/peer-quality" / "".join(c if c.isalnum() else "-" for c in name)
    overrides = [
        f"output_dir={folder}",
        f"loop.max_steps={steps}",
        "loop.average_decay=0",
        "loop.eval_every=1000",
        f"codebook_warmup_steps={min(100, steps // 4)}",
    ]
    if settings:
        overrides += ["loop.precision=fp32", "loop.max_grad_norm=1.0e+9"]
    recipe = load_recipe(VQVAERecipe, CONFIG, overrides)
    config = build_config(VQVAEConfig, recipe.model)
    processor = IsicVQImageProcessor(size=config.image_size)
    train_set, validation_set, sources = open_images(recipe.data, processor)
    processes = Processes(recipe.loop, folder)
    resume = any(folder.glob("checkpoints/step-*"))
    run = open_run(recipe, sources, resume, processes)
    torch.manual_seed(recipe.loop.seed)
    model = VQVAEModel(config).to(memory_format=torch.channels_last)
    sets = processor, train_set, validation_set, recipe
    task = PythaeTask(model, settings, *sets) if settings else VQVAETask(model, *sets)
    trainer = Trainer(task, recipe.loop, run, processes, {"stage": recipe.stage, "contestant": name})
    if resume:
        trainer.resume()
    trainer.train()
    trainer.finish()
    if settings:
        return task.measured()
    return evaluate_reconstruction(model, task.images(validation_set))


def measure(name: str, steps: int) -> None:
    """Train a contestant and add its row to the report."""
    result = trained(name, CONTESTANTS[name], steps)
    rows = finished_rows()
    rows[name] = {
        "psnr": result.psnr,
        "ssim": result.ssim,
        "usage": result.usage,
        "perplexity": result.perplexity,
        "n": result.num_images,
    }
    report = {"steps": steps, "config": CONFIG.name, "rows": rows, "environment": environment()}
    write_atomically(REPORT, (json.dumps(report, indent=2) + "\n").encode())
    print(name, rows[name], flush=True)


def finished_rows() -> dict[str, Any]:
    """What the report has."""
    return json.loads(REPORT.read_text(encoding="utf-8"))["rows"] if REPORT.exists() else {}


def main() -> None:
    """Train the contestants that the report lacks, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each")
    parser.add_argument("--contestant", choices=CONTESTANTS, help="train this one alone")
    arguments = parser.parse_args()
    if arguments.contestant:
        measure(arguments.contestant, arguments.steps)
        return
    for name in CONTESTANTS:
        if name not in finished_rows():  # delete a row to run it again
            command = [sys.executable, __file__, "--contestant", name, "--steps", str(arguments.steps)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
