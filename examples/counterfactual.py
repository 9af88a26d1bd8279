"""One image under every diagnosis the model knows: its middle inpainted, all else kept.

python examples/counterfactual.py nevus.jpg
python examples/counterfactual.py nevus.jpg --diagnoses nevus melanoma --particles 256
"""

import argparse

import torch

from isic_vq import IsicVQImageProcessor, IsicVQModel
from isic_vq.figures import image_grid
from isic_vq.hub.pretrained import load_model, resolve


def main() -> None:
    """Parse arguments, draw one counterfactual per diagnosis, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", help="an image file")
    parser.add_argument("--model", help="model folder or Hub id; default: the shipped checkpoint")
    parser.add_argument("--diagnoses", nargs="+", help="default: all the model knows")
    parser.add_argument("--particles", type=int, default=64, help="candidates per diagnosis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="counterfactuals.png")
    arguments = parser.parse_args()

    model = load_model(IsicVQModel, arguments.model)
    processor = IsicVQImageProcessor.from_pretrained(resolve(arguments.model))
    names = arguments.diagnoses or list(model.config.class_names.values())
    original = processor(arguments.image, return_tensors="pt")["pixel_values"].to(model.device)
    edit = model.counterfactual(
        original.expand(len(names), -1, -1, -1),
        names,
        num_particles=arguments.particles,
        seed=arguments.seed,
    )
    images = torch.cat([original, edit.pixel_values])
    # Of how many particles each was chosen, where they were fewest: near 1, ask for more.
    labels = [f"{name} ({ess.min():.1f})" for name, ess in zip(names, edit.ess, strict=True)]
    image_grid(processor.postprocess(images, output_type="np"), columns=4, labels=["original", *labels]).save(
        arguments.output
    )


if __name__ == "__main__":
    main()
