"""A grid of images as one picture, pixel for pixel, with an optional line of text under each image.

Pillow and NumPy only, so that generating images does not need matplotlib. Images are never scaled: without labels the
image in row r and column c has its top left pixel at (padding + c * (width + padding), padding + r * (height +
padding)). Source: none; it does what torchvision's `make_grid` does, with a white background and text.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (255, 255, 255)
TEXT_COLOR = (51, 51, 51)


def image_grid(
    images: np.ndarray, columns: int | None = None, padding: int = 2, labels: Sequence[str] | None = None
) -> Image.Image:
    """Lay images out in rows on a white background.

    With labels, a strip under every row holds them, broken between words to the width of a cell; a cell is as wide as
    its image or as the widest word of any label, and its image is centred in it.

    Args:
        images: RGB of shape (number, height, width, 3), uint8.
        columns: Images per row; by default as close to square as possible, ceil(sqrt(number)).
        padding: White pixels around every image.
        labels: One text per image, for example its diagnosis.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: No images, wrong shape or dtype, or numbers that do not fit each other.
    """
    check_images(images, "images")
    number, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(number)) if columns is None else columns
    if columns < 1 or padding < 0:
        raise ValueError(f"columns must be at least 1 and padding at least 0, got {columns} and {padding}")
    columns = min(columns, number)
    texts, cell_width, strip_height = [""] * number, width, 0
    font = ImageFont.load_default(size=max(12, width // 10))
    if labels is not None:
        if len(labels) != number:
            raise ValueError(f"labels must be one per image, got {len(labels)} for {number} images")
        cell_width = max(
            [width, *(math.ceil(font.getlength(word)) for text in labels for word in text.split())]
        )
        texts = [wrap(text, cell_width, font) for text in labels]
        line_height = sum(font.getmetrics())  # type: ignore[union-attr]  # a scalable font: Pillow has FreeType
        strip_height = max(text.count("\n") + 1 for text in texts) * line_height + padding
    rows = math.ceil(number / columns)
    pitch_x, pitch_y = cell_width + padding, height + strip_height + padding
    picture = Image.new("RGB", (padding + columns * pitch_x, padding + rows * pitch_y), BACKGROUND)
    write_text = partial(ImageDraw.Draw(picture).multiline_text, font=font, fill=TEXT_COLOR, anchor="ma")
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = padding + index % columns * pitch_x, padding + index // columns * pitch_y
        picture.paste(Image.fromarray(image), (x + (cell_width - width) // 2, y))
        if text:
            write_text((x + cell_width / 2, y + height + padding), text, align="center", spacing=0)
    return picture


def captioned(picture: Image.Image, text: str, least_width: int = 320) -> Image.Image:
    """A picture with a line of text under it, in as many rows as its width, or `least_width` pixels, asks for."""
    font = ImageFont.load_default(size=14)
    width = max(picture.width, least_width)
    rows = wrap(text, width - 8, font)
    height = picture.height + 8 + (rows.count("\n") + 1) * sum(font.getmetrics())  # type: ignore[union-attr]
    framed = Image.new("RGB", (width, height), BACKGROUND)
    framed.paste(picture, (0, 0))
    ImageDraw.Draw(framed).multiline_text(
        (4, picture.height + 2), rows, font=font, fill=TEXT_COLOR, spacing=0
    )
    return framed


def paired_grid(
    above: np.ndarray, below: np.ndarray, columns: int = 8, padding: int = 2
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Lay two sets of RGB images (number, height, width, 3), uint8, out in pairs, one above the other.

    Blocks of pairs are a quarter image apart.

    Returns:
        The picture, RGB, and for each block the centres of its upper and its lower row, in pixels from the top.
    """
    if above.shape != below.shape:
        raise ValueError(f"both images of a pair must have one shape, got {above.shape} and {below.shape}")
    number, height = above.shape[:2]
    starts = range(0, number, columns)
    chunks = [np.concatenate([above[i : i + columns], below[i : i + columns]]) for i in starts]
    blocks = [image_grid(chunk, columns=len(chunk) // 2, padding=padding) for chunk in chunks]
    pitch = blocks[0].height + height // 4
    picture = Image.new("RGB", (blocks[0].width, pitch * len(blocks) - height // 4), BACKGROUND)
    centers = []
    for index, block in enumerate(blocks):
        picture.paste(block, (0, index * pitch))
        upper = index * pitch + padding + height // 2
        centers.append((upper, upper + height + padding))
    return picture, centers


def enlarge(images: np.ndarray, least_width: int = 96) -> np.ndarray:
    """Repeat every pixel of small images, RGB of shape (number, height, width, 3), until they are that wide."""
    factor = math.ceil(least_width / images.shape[2])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Break a text between words into lines of at most `width` pixels; a longer word keeps a line to itself."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def check_images(images: np.ndarray, name: str) -> None:
    """Raise ValueError unless the array holds at least one RGB image, uint8."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name} must be uint8 of shape (number, height, width, 3) with at least one image, "
            f"got {images.dtype} of shape {images.shape}"
        )
