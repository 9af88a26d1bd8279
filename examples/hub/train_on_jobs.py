# /// script
# requires-python = ">=3.11"
# dependencies = ["isic-vq[data,train,fast]"]
# ///
"""Train a tokenizer and a prior on Hugging Face Jobs, and push them; not run here on Jobs, which need a paid account.

    hf jobs uv run --flavor a10g-small --timeout 4h --secrets HF_TOKEN train_on_jobs.py hub:OWNER/IMAGES user/my-model

The images are any source of isic-vq with a diagnosis for each; a tenth is held out. Without a repository nothing is pushed:
`python train_on_jobs.py synthetic:256:0 --steps 20` tries it on this machine.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from isic_vq import IsicVQModel

RECIPE = """\
stage: {stage}
loop: {{max_steps: {steps}, batch_size: 32, learning_rate: 1.0e-3, average_decay: 0.998}}
"""


def isic_vq(*words: str) -> None:
    """Run a command of isic-vq, and end with it if it fails."""
    subprocess.run([sys.executable, "-m", "isic_vq", *words], check=True)


def main() -> None:
    """Train both stages, push the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="source of images, such as hub:OWNER/NAME")
    parser.add_argument("repository", nargs="?", help="Hub repository to push to, private")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of each stage")
    parser.add_argument("--output", type=Path, default="runs/job")
    arguments = parser.parse_args()
    images, run = arguments.images, arguments.output
    run.mkdir(parents=True)
    for stage in ("vqvae", "prior"):
        (run / f"{stage}.yaml").write_text(RECIPE.format(stage=stage, steps=arguments.steps))

    tokenizer = f"{run}/vqvae/model"
    warmup = f"codebook_warmup_steps={min(200, arguments.steps // 2)}"
    isic_vq("train", f"{run}/vqvae.yaml", f"output_dir={run}/vqvae", f"data.train={images}", warmup)
    codes = {part: f"{run}/codes/{part}.parquet" for part in ("train", "validation")}
    for part, path in codes.items():
        isic_vq("encode", tokenizer, "--data", images, "--part", part, "--output", path)
    settings = [f"{part}_codes={path}" for part, path in codes.items()]
    isic_vq("train", f"{run}/prior.yaml", f"output_dir={run}/prior", f"tokenizer={tokenizer}", *settings)
    if arguments.repository:
        model = IsicVQModel.from_pretrained(run / "prior" / "model")
        print(model.push_to_hub(arguments.repository, private=True))  # noqa: T201


if __name__ == "__main__":
    main()
