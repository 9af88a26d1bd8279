"""Generate a row of images for each diagnosis the model knows, and save them as one picture.

python examples/generate.py                                   # the shipped checkpoint
python examples/generate.py --model runs/quickstart/prior/model --guidance-scale 1.5
"""

import argparse

import numpy as np
from transformers import pipeline

import isic_vq  # noqa: F401  (makes the model and the task known to transformers)
from isic_vq.figures import image_grid
from isic_vq.hub.pretrained import resolve


def main() -> None:
    """Parse arguments, generate, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder or Hub id; default: the shipped checkpoint")
    parser.add_argument("--per-class", type=int, default=4, help="images per diagnosis")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="diagnoses.png")
    arguments = parser.parse_args()

    pipe = pipeline("unconditional-image-generation", model=resolve(arguments.model))
    names = [name for name in pipe.model.config.class_names.values() for _ in range(arguments.per_class)]
    images = pipe(
        names, seed=arguments.seed, guidance_scale=arguments.guidance_scale, output_type="np", progress=True
    )
    image_grid(np.asarray(images), columns=arguments.per_class, labels=names).save(arguments.output)


if __name__ == "__main__":
    main()
