"""Write pictures as files that name the program that made them: a picture without may be of a patient."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from isic_vq import __version__
from isic_vq.files import write_atomically


def write_png(image: Image.Image | np.ndarray, path: Path, texts: dict[str, str]) -> None:
    """Write a picture as `png_content` makes it, whole or not at all."""
    write_atomically(path, png_content(image, texts))


def png_content(image: Image.Image | np.ndarray, texts: dict[str, str]) -> bytes:
    """A picture, or pixels (height, width, 3), uint8, as PNG with texts by keyword, such as `Comment`.

    `Software` is "isic-vq" and its version.
    """
    fields = PngInfo()
    for key, text in {"Software": f"isic-vq {__version__}", **texts}.items():
        fields.add_text(key, text)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=fields, icc_profile=None, exif=b"")
    return buffer.getvalue()


def write_jpeg(image: Image.Image, path: Path, comment: str, quality: int = 92) -> None:
    """Write a picture as JPEG with a comment, atomically, with its colours at full resolution.

    A sheet of many images takes a fifth of its PNG; JPEG hides faint noise, but no seams or blocks of codes.
    """
    buffer = io.BytesIO()
    text = f"{comment}; isic-vq {__version__}"
    image.save(buffer, format="JPEG", quality=quality, subsampling=0, comment=text.encode())
    write_atomically(path, buffer.getvalue())
