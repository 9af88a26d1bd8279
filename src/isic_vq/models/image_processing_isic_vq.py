"""Image processor of isic-vq: anything that holds a picture -> RGB squares in [0, 1], and back.

The only owner of image size and pixel range. One path: `load_image` (RGB, upright) -> `to_square` (uint8) ->
`preprocess` (uint8 / 255); `postprocess` is its exact inverse on uint8 pixels.

Source: the image processor protocol of transformers 5.23 (`PilBackend`). Centred square, averaging, BICUBIC in the
manner of `center_crop_arr` in openai/guided-diffusion, guided_diffusion/image_datasets.py (which crops last).
Differs: `PilBackend` clips 16-bit grey, leaves out EXIF rotation, resizes without a crop, lets Pillow's errors
through without a name and has about twenty settings (`ImagesKwargs`), eighteen of which the models leave no choice in.
Does not: fetch URLs, apply ICC colour profiles, look beyond the first frame, normalise by mean and deviation.
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import SizeDict

from .checks import HALF_LEVEL

# Pixels; below this an image is an icon or an accident, and upsampling it would invent everything.
MIN_SIDE = 16
MAX_PIXELS = 2**26  # 8192 x 8192: the largest that is decoded, in about 0.6 GB
# Average down to three times the target, then BICUBIC: nearly BICUBIC alone (Pillow's manual), twice as fast.
REDUCING_GAP = 3.0
CHANNELS = (1, 2, 3, 4)  # grey, grey + alpha, RGB, RGB + alpha
# What transformers keeps in preprocessor_config.json for itself.
SERVICE_KEYS = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}
# What Pillow's decoders raise on damaged files, AVIF's RuntimeError included.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error)

ImageLike = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | bytes


class ImageError(ValueError):
    """An image that cannot be used. The text names the file or index, what was expected and the way out."""


class IsicVQImageProcessorKwargs(TypedDict, total=False):
    """The settings of transformers' `ImagesKwargs` that have an effect here, for `preprocessor_config.json` and for calls."""

    size: int | Mapping[str, int]
    do_convert_rgb: bool


class IsicVQImageProcessor(PilBackend):
    """Turn images into `pixel_values` in [0, 1] and back.

    Transparency is laid on white, as transformers and browsers do: black would look like the vignette of a
    dermoscope, a plausible artefact where white is a visible one. Resizing is antialiased BICUBIC, which
    rings less than LANCZOS on hairs and on the rim of a vignette.

    Args:
        size: Side of the square output in pixels, as an int or as `{"height": n, "width": n}`.
        do_convert_rgb: Convert images of other modes (grey, palette, CMYK, transparency, 16 bits); False refuses them.

    Examples:
        >>> processor = IsicVQImageProcessor(size=32)
        >>> pixel_values = processor(Image.new("RGB", (60, 40)), return_tensors="pt").pixel_values
        >>> pixel_values.shape
        torch.Size([1, 3, 32, 32])
        >>> processor.postprocess(pixel_values)[0].size
        (32, 32)
    """

    # ImagesKwargs itself, or a subclass of it, would save settings that change nothing here.
    valid_kwargs = IsicVQImageProcessorKwargs  # type: ignore[assignment]
    model_input_names = ["pixel_values"]
    size = SizeDict(height=128, width=128)
    do_convert_rgb = True

    def __init__(
        self, size: int | Mapping[str, int] | None = None, do_convert_rgb: bool = True, **kwargs: Any
    ):
        unknown = sorted(kwargs.keys() - SERVICE_KEYS)
        if unknown:
            settings = "`size` and `do_convert_rgb`"
            raise ValueError(
                f"IsicVQImageProcessor has no setting {unknown}, only {settings}; remove the others"
            )
        if not isinstance(do_convert_rgb, bool):
            raise ValueError(f"do_convert_rgb: expected True or False, got {do_convert_rgb!r}")
        size = dict(_square_size(type(self).size if size is None else size))
        super().__init__(size=size, do_convert_rgb=do_convert_rgb, **kwargs)

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        return_tensors: str | None = None,
        **kwargs: Unpack[IsicVQImageProcessorKwargs],
    ) -> BatchFeature:
        """Turn one image or several into a batch; `processor(images, return_tensors="pt")` calls this.

        Args:
            images: One image or a list of them, each of a kind `load_image` takes; an array or tensor with
                four dimensions is a list of images.
            return_tensors: `"pt"` for a torch tensor; `"np"` or nothing for a numpy array.
            kwargs: `size` and `do_convert_rgb` of this call, instead of the processor's own.

        Returns:
            BatchFeature with `pixel_values` (float32 of shape (batch, 3, height, width)): RGB in [0, 1].

        Raises:
            ImageError: If the list is empty or an image in it cannot be used; the text starts with its index.
            ValueError: If a setting is unknown or outside of its range.
        """
        own: Any = {"size": dict(self.size), "do_convert_rgb": self.do_convert_rgb}
        processor = type(self)(**{**own, **kwargs}) if kwargs else self
        squares = [
            processor.to_square(image, name=f"image {index} ({_describe(image)})")
            for index, image in enumerate(_as_list(images))
        ]
        pixel_values = np.stack(squares).transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def to_square(self, image: ImageLike, name: str | None = None) -> np.ndarray:
        """Cut the largest centred square and resize it: the pixels a data set may cache.

        A large JPEG given as a path or as bytes is decoded at 1/2, 1/4 or 1/8 where that leaves the geometry
        exact and at least `REDUCING_GAP` times the target: twice as fast, a quarter of the memory or less.
        Levels then differ by about 0.3 (mean, of 255) from those of the same file opened beforehand.

        Args:
            image: Of a kind `load_image` takes.
            name: What error texts call the image; by default its file name or kind.

        Returns:
            Pixels (uint8 array of shape (height, width, 3)): RGB in [0, 255]; `pixel_values` is this / 255.

        Raises:
            ImageError: If the image cannot be used or its shorter side is under `MIN_SIDE` pixels (under
                `size` where that is smaller).
        """
        name = name or _describe(image)
        target: int = self.size["height"]
        picture = _load(image, name, target, convert=self.do_convert_rgb)
        square = _centred_square(picture, name, target)
        return np.array(square.resize((target, target), Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP))

    def to_mask(self, mask: ImageLike, name: str | None = None) -> np.ndarray:
        """Cut and resize a mask as `to_square` does the image it lies on; white marks.

        A pixel is marked if anything of it is, so that a line thinner than a pixel (a hair) is not lost.
        Transparency is laid on black: what is not painted is not marked.

        Args:
            mask: Of a kind `load_image` takes, of the size of its image; grey counts as white from 128 on.
            name: What error texts call the mask; by default its file name or kind.

        Returns:
            Marked pixels (bool array of shape (height, width)).

        Raises:
            ImageError: As `to_square`.
        """
        name = name or _describe(mask)
        target: int = self.size["height"]
        square = _centred_square(_load(mask, name, background="black"), name, target).convert("L")
        shares = square.point(lambda level: 255 * (level >= 128)).convert("F")  # 8 bits would round to 0
        return np.asarray(shares.resize((target, target), Image.Resampling.BOX)) > 0

    def load_image(self, image: ImageLike, name: str | None = None) -> Image.Image:
        """Load an image at its full size, upright (EXIF) and in RGB.

        Args:
            image: A PIL image in any mode; a path; the bytes of an image file; an array or tensor (height,
                width), (height, width, channels) or (channels, height, width) of 1 to 4 channels, uint8,
                uint16 (scaled by 65535) or float in [0, 1]. Grey of 16 and 32 bits is scaled by 65535 too.
            name: What error texts call the image; by default its file name or kind.

        Returns:
            The image in mode RGB; the object passed in where that already is upright RGB.

        Raises:
            ImageError: If the image is missing, damaged, of more than `MAX_PIXELS` or of another kind.
        """
        return _load(image, name or _describe(image), convert=self.do_convert_rgb)

    def postprocess(self, pixel_values: torch.Tensor | np.ndarray, output_type: str = "pil") -> Any:
        """Turn `pixel_values` back into images: clamp to [0, 1], round to 256 levels, restore the layout.

        Args:
            pixel_values (torch.Tensor or numpy array of shape (batch, 3, height, width)): RGB in [0, 1], of
                any float type.
            output_type: `"pil"`, `"np"` or `"pt"`. All three hold the same levels.

        Returns:
            A list of RGB images; or uint8 (batch, height, width, 3) in [0, 255]; or float32 (batch, 3,
            height, width) in [0, 1] on the device of the input.

        Raises:
            ImageError: If `pixel_values` has another shape or type or holds NaN or infinity.
            ValueError: If `output_type` is not one of the three.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: expected 'pil', 'np' or 'pt', got {output_type!r}")
        levels = (_checked_pixel_values(pixel_values) * 255).round().clamp(0, 255)
        if output_type == "pt":
            return levels / 255
        arrays = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return arrays if output_type == "np" else [Image.fromarray(array) for array in arrays]


def _square_size(size: int | Mapping[str, int] | SizeDict) -> SizeDict:
    edges = dict(size) if isinstance(size, (Mapping, SizeDict)) else {"height": size, "width": size}
    side = edges.get("height")
    if type(side) is not int or side < 1 or edges != {"height": side, "width": side}:
        raise ValueError(
            f"size: expected a positive int or {{'height': n, 'width': n}} with one n, got {size!r}"
        )
    return SizeDict(height=side, width=side)


def _as_list(images: Any) -> list[Any]:
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    is_list = isinstance(images, Sequence) and not isinstance(
        images, (str, bytes)
    )  # a column of `datasets`, too
    batch = list(images) if is_batch or is_list else [images]
    if not batch:
        raise ImageError("images: expected at least one image, got an empty list; skip empty batches")
    return batch


def _describe(image: Any) -> str:
    path = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", None)
    if path:
        return f"file '{str(path)[:300]}'"
    if isinstance(image, Image.Image):
        return f"PIL image {image.width} x {image.height} {image.mode}"
    shape = f" of shape {tuple(image.shape)}" if isinstance(image, (np.ndarray, torch.Tensor)) else ""
    return f"{type(image).__name__}{shape}"


def _centred_square(picture: Image.Image, name: str, target: int) -> Image.Image:
    width, height = picture.size
    side, least = min(width, height), min(MIN_SIDE, target)
    if side < least:
        raise ImageError(
            f"{name}: expected a shorter side of at least {least} px, got {width} x {height} px "
            "(width x height); use the original at full size or leave this image out"
        )
    left, top = (width - side) // 2, (height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _load(
    image: ImageLike, name: str, target: int | None = None, background: str = "white", convert: bool = True
) -> Image.Image:
    """Load an image upright and in RGB; a `target` in pixels lets a JPEG file come smaller than it is."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = _array_to_pil(image, name)
    with _pillow_errors_named(name):
        if isinstance(image, Image.Image):
            return _to_rgb(_upright(_of_bearable_size(image, name)), name, background, convert)
        with Image.open(_file_of(image, name)) as opened:
            _of_bearable_size(opened, name)
            if target is not None:
                scale = _draft_scale(*opened.size, target)
                opened.draft(None, (opened.width // scale, opened.height // scale))  # only JPEG knows how
            return _to_rgb(_upright(opened), name, background, convert)


def _file_of(image: Any, name: str) -> str | os.PathLike | BytesIO:
    """What Pillow opens for a path or for the bytes of a file."""
    if isinstance(image, bytes):
        return BytesIO(image)
    if not isinstance(image, (str, os.PathLike)):
        raise ImageError(
            f"{name}: expected a PIL image, numpy array, torch tensor, path or the bytes of an image file; "
            "convert it to one of these"
        )
    if re.match(r"[a-z][a-z0-9+.-]*://|data:", str(image), re.IGNORECASE):
        raise ImageError(f"{name}: expected a local file, got a URL; download it and pass the path")
    return image


@contextmanager
def _pillow_errors_named(name: str) -> Iterator[None]:
    """Raise Pillow's errors as ImageError with the name of the image."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels; shrink it ({error})") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name}: expected an existing file, found none; check the path") from error
    except PILLOW_ERRORS as error:
        raise ImageError(
            f"{name}: expected a complete image that Pillow can decode to RGB, got {type(error).__name__}: "
            f"{str(error)[:300]}; replace the file or leave it out"
        ) from error


def _of_bearable_size(image: Image.Image, name: str) -> Image.Image:
    """Refuse what would fill the memory; a file's size is known before it is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; shrink it")
    return image


def _draft_scale(width: int, height: int, target: int) -> int:
    """Largest of 8, 4, 2, 1 to decode a JPEG smaller by with the centred square staying on whole pixels."""
    for scale in (8, 4, 2):
        is_exact = width % scale == 0 and height % scale == 0 and (width - height) % (2 * scale) == 0
        if is_exact and min(width, height) >= scale * REDUCING_GAP * target:
            return scale
    return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # first: TIFF images turn themselves while loading
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image  # exif_transpose would copy it
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, name: str, background: str, convert: bool) -> Image.Image:
    """Convert any mode to RGB: transparency on the background, more than 8 bits scaled and not clipped."""
    if not convert and (image.mode != "RGB" or image.has_transparency_data):
        raise ImageError(
            f"{name}: expected mode RGB without transparency, got {image.mode}; set do_convert_rgb=True"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_pil(image, name)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_pil(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "I":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(
                f"{name}: expected 32-bit grey in [0, 65535], got [{low}, {high}]; scale it to 16 bits"
            )
        values = values.astype(np.uint16)
    return Image.fromarray(_to_uint8(values, name))


def _array_to_pil(image: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    """Turn an array or tensor, channels last, first or absent, into an image."""
    array = _to_numpy(image) if isinstance(image, torch.Tensor) else image
    is_last = array.ndim == 3 and array.shape[2] in CHANNELS
    is_first = array.ndim == 3 and array.shape[0] in CHANNELS
    if array.size == 0 or not (array.ndim == 2 or is_last or is_first):
        raise ImageError(
            f"{name}: expected shape (height, width, channels), (channels, height, width) or (height, width) "
            f"with 1 to 4 channels, got {array.shape}; move the axes or pass several images as a list"
        )
    if array.ndim == 3:
        array = array if is_last else np.moveaxis(array, 0, -1)
        array = array[..., 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array, name)))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Bring a tensor to numpy; floats become float32, since numpy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Bring uint8, uint16 (scaled by 65535) or float values in [0, 1] to the nearest of 256 levels."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 257 * 255
    if array.dtype.kind != "f":
        raise ImageError(
            f"{name}: expected uint8, uint16 or float values in [0, 1], got {array.dtype}; "
            "convert with .astype(np.uint8) or .to(torch.uint8) if the values lie in [0, 255]"
        )
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ImageError(f"{name}: expected finite values, got NaN or infinity; repair it or leave it out")
    if low < -HALF_LEVEL or high > 1 + HALF_LEVEL:
        raise ImageError(
            f"{name}: expected float values in [0, 1], got [{low:.4g}, {high:.4g}]; "
            "divide [0, 255] by 255, map [-1, 1] by (x + 1) / 2"
        )
    return np.rint(array.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)


def _checked_pixel_values(pixel_values: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Check what goes into `postprocess`; float32, detached, on its device."""
    if not isinstance(pixel_values, (torch.Tensor, np.ndarray)):
        kind = type(pixel_values).__name__
        raise ImageError(
            f"pixel_values: expected a torch tensor or numpy array, got {kind}; stack lists first"
        )
    values = torch.tensor(pixel_values) if isinstance(pixel_values, np.ndarray) else pixel_values.detach()
    if values.ndim != 4 or values.shape[1] != 3 or not values.is_floating_point():
        raise ImageError(
            "pixel_values: expected floats of shape (batch, 3, height, width), got "
            f"{values.dtype} of shape {tuple(values.shape)}; add a batch axis with [None], divide uint8 by 255"
        )
    if not torch.isfinite(values).all():
        raise ImageError(
            "pixel_values: expected finite values, got NaN or infinity; check the model's output"
        )
    return values.float()
