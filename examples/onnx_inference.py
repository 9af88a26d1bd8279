"""Reconstruct an image with the ONNX files alone: numpy, onnxruntime and Pillow, no torch.

isic-vq export isic-vq-128 deployment --onnx  # where isic-vq is installed, once
python examples/onnx_inference.py nevus.jpg deployment/onnx
"""

import argparse
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps


def centred_square(path: Path, size: int) -> Image.Image:
    """Open an RGB or grey image of 8 bits and cut it as the tokenizer's image processor does."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode not in ("RGB", "L"):
        raise SystemExit(
            f"{path} is of mode {image.mode}: convert it to RGB first, transparency laid on white"
        )
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)


def main() -> None:
    """Parse arguments, encode, decode, save the image beside its reconstruction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path, help="holds encoder.onnx and decoder.onnx")
    parser.add_argument("--output", default="reconstruction.png")
    arguments = parser.parse_args()

    encoder, decoder = (
        InferenceSession(arguments.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    size = int(encoder.get_modelmeta().custom_metadata_map["image_size"])
    original = np.asarray(centred_square(arguments.image, size))
    pixel_values = original.transpose(2, 0, 1)[None].astype(np.float32) / 255  # (1, 3, size, size)
    (codes,) = encoder.run(None, {"pixel_values": pixel_values})  # (1, h, w) int64: all that has to be kept
    (decoded,) = decoder.run(None, {"codes": codes})
    reconstruction = (decoded[0] * 255).round().astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(np.hstack([original, reconstruction])).save(arguments.output)


if __name__ == "__main__":
    main()
