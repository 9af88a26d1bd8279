"""Encode two images, exchange the middle of their code grids, and decode: what the codes stand for, seen.

python examples/code_swap.py nevus.jpg melanoma.jpg
"""

import argparse

import torch

from isic_vq import IsicVQImageProcessor, VQVAEModel
from isic_vq.figures import image_grid
from isic_vq.hub.pretrained import load_model, resolve


def main() -> None:
    """Parse arguments, encode, exchange, decode, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs=2, help="two image files")
    parser.add_argument("--model", help="model folder or Hub id; default: the shipped checkpoint")
    parser.add_argument("--output", default="swapped.png")
    arguments = parser.parse_args()

    tokenizer = load_model(VQVAEModel, arguments.model)
    processor = IsicVQImageProcessor.from_pretrained(resolve(arguments.model))
    pixel_values = processor(arguments.images, return_tensors="pt")["pixel_values"]
    codes = tokenizer.encode(pixel_values)  # (2, h, w)
    quarter = codes.shape[-1] // 4
    middle = slice(quarter, -quarter)
    swapped = codes.clone()
    swapped[:, middle, middle] = codes.flip(0)[:, middle, middle]
    decoded = torch.cat([tokenizer.decode(codes), tokenizer.decode(swapped)])
    labels = ["first", "second", "first, middle of second", "second, middle of first"]
    image_grid(processor.postprocess(decoded, output_type="np"), columns=4, labels=labels).save(
        arguments.output
    )


if __name__ == "__main__":
    main()
