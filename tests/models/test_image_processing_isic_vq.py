import contextlib
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from isic_vq.models.image_processing_isic_vq import MIN_SIDE, ImageError, IsicVQImageProcessor

SIDE = 32
ORIENTATION = 0x0112
# What a viewer does to the stored pixels for each EXIF orientation (EXIF 2.3, tag 0x0112), in numpy's words.
EXIF_TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.fixture
def processor():
    return IsicVQImageProcessor(size=SIDE)


def random_pixels(height=SIDE, width=SIDE, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth_image(width, height, seed=0):
    """A picture with structure but no pixel noise, for comparisons across resampling paths."""
    coarse = Image.fromarray(random_pixels(6, 8, seed=seed))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def centred_square(pixels):
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def png_header_claiming(width, height):
    """A PNG whose header claims a size; a decoder that trusts it would allocate all of it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


# --- range, layout and their inverse -----------------------------------------------------------------------------


def test_pixel_values_are_the_uint8_pixels_over_255_channels_first(processor):
    pixels = random_pixels()
    batch = processor(Image.fromarray(pixels), return_tensors="pt")
    assert list(batch) == ["pixel_values"]
    assert batch.pixel_values.dtype == torch.float32
    expected = pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(batch.pixel_values.numpy(), expected)


def test_preprocess_is_to_square_over_255(processor):
    image = smooth_image(90, 61)
    square = processor.to_square(image)
    assert square.shape == (SIDE, SIDE, 3)
    assert square.dtype == np.uint8
    assert square.flags.writeable, "a data loader turns this into a tensor, which warns on read-only memory"
    pixel_values = processor(image, return_tensors="np").pixel_values[0]
    np.testing.assert_array_equal(pixel_values, square.transpose(2, 0, 1) / np.float32(255))


@settings(max_examples=25, deadline=None)
@given(side=st.integers(1, 20), batch=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_postprocess_inverts_preprocess_exactly_on_uint8_of_that_size(side, batch, seed):
    processor = IsicVQImageProcessor(size=side)
    pixels = np.stack([random_pixels(side, side, seed=seed + i) for i in range(batch)])
    pixel_values = processor(list(pixels), return_tensors="pt").pixel_values
    np.testing.assert_array_equal(processor.postprocess(pixel_values, "np"), pixels)


@settings(max_examples=25, deadline=None)
@given(side=st.integers(5, 20), seed=st.integers(0, 2**32 - 1))
def test_round_trip_of_floats_stays_within_half_a_level(side, seed):
    processor = IsicVQImageProcessor(size=side)
    floats = np.random.default_rng(seed).random((side, side, 3))
    back = processor.postprocess(processor(floats, return_tensors="pt").pixel_values, "pt")
    assert np.abs(back[0].permute(1, 2, 0).numpy() - floats).max() <= 0.5 / 255 + 1e-6


def test_three_output_types_hold_the_same_levels(processor):
    pixel_values = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    expected = np.rint(pixel_values.numpy() * 255).astype(np.uint8)
    images = processor.postprocess(pixel_values)
    assert [(image.mode, image.size) for image in images] == [("RGB", (10, 8))] * 2
    array = processor.postprocess(pixel_values, "np")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, expected.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), array)
    tensor = processor.postprocess(pixel_values, "pt")
    np.testing.assert_array_equal(tensor.numpy(), expected.astype(np.float32) / np.float32(255))


def test_postprocess_clamps_values_outside_the_range(processor):
    values = torch.tensor([-3.0, -0.001, 0.0, 1.0, 1.001, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert processor.postprocess(values, "np")[0, 0, :, 0].tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_postprocess_takes_any_float_type(processor, dtype):
    values = torch.linspace(0, 1, 48).view(1, 3, 4, 4).to(dtype).requires_grad_()
    expected = np.rint(values.detach().float().numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(processor.postprocess(values, "np"), expected)
    assert processor.postprocess(values, "pt").dtype == torch.float32


def test_postprocess_takes_read_only_numpy(processor):
    values = np.full((1, 3, 2, 2), 0.5, dtype=np.float32)
    values.flags.writeable = False
    assert processor.postprocess(values, "np").tolist() == np.full((1, 2, 2, 3), 128).tolist()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (torch.zeros(3, 4, 4), r"\(batch, 3, height, width\).*add a batch axis"),
        (torch.zeros(1, 4, 4, 3), r"\(batch, 3, height, width\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "divide uint8 by 255"),
        (torch.full((1, 3, 4, 4), float("nan")), "NaN or infinity"),
        (torch.full((1, 3, 4, 4), float("inf")), "NaN or infinity"),
        ([[0.5]], "got list"),
    ],
)
def test_postprocess_refuses_what_is_not_pixel_values(processor, values, text):
    with pytest.raises(ImageError, match=text):
        processor.postprocess(values)


def test_postprocess_refuses_unknown_output_type(processor):
    with pytest.raises(ValueError, match="'pil', 'np' or 'pt', got 'latent'"):
        processor.postprocess(torch.zeros(1, 3, 4, 4), "latent")


# --- crop and resize -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(SIDE, 75), (76, SIDE), (SIDE, SIDE + 1)])
def test_crop_is_the_largest_centred_square_pixel_for_pixel(processor, height, width):
    pixels = random_pixels(height, width)
    np.testing.assert_array_equal(processor.to_square(pixels), centred_square(pixels))


def test_resize_is_antialiased_bicubic_of_the_crop(processor):
    pixels = random_pixels(70, 90)  # under REDUCING_GAP times the target: BICUBIC alone
    expected = Image.fromarray(centred_square(pixels)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(processor.to_square(pixels), np.asarray(expected))


def test_shrinking_a_fine_checkerboard_leaves_grey_and_no_moire(processor):
    board = (np.indices((320, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(processor.to_square(board).astype(int) - 127.5).max() <= 3


def test_small_image_is_enlarged(processor):
    flat = np.full((MIN_SIDE, MIN_SIDE, 3), (10, 20, 30), dtype=np.uint8)
    assert (processor.to_square(flat) == (10, 20, 30)).all()


def test_batch_equals_single_for_mixed_sizes_and_kinds(processor, tmp_path):
    path = tmp_path / "a.png"
    smooth_image(50, 40).save(path)
    images = [path, str(path), smooth_image(77, 120), random_pixels(40, 33), torch.rand(3, 41, 35)]
    batch = processor(images, return_tensors="pt").pixel_values
    single = [processor(image, return_tensors="pt").pixel_values[0] for image in images]
    assert torch.equal(batch, torch.stack(single))


def test_a_column_of_a_data_set_is_a_list_of_images(processor):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    column = Dataset.from_dict({"image": pictures}, Features({"image": datasets.Image()}))["image"]
    assert np.array_equal(processor(column).pixel_values, processor(pictures).pixel_values)


def test_four_dimensional_input_is_a_list_of_images(processor):
    stack = np.stack([random_pixels(seed=i) for i in range(3)])
    expected = processor(list(stack), return_tensors="pt").pixel_values
    assert torch.equal(processor(stack, return_tensors="pt").pixel_values, expected)
    as_tensor = torch.from_numpy(stack).permute(0, 3, 1, 2)
    assert torch.equal(processor(as_tensor, return_tensors="pt").pixel_values, expected)


# --- kinds of input ------------------------------------------------------------------------------------------------


def test_path_str_bytes_and_opened_file_agree(processor, tmp_path):
    pixels = random_pixels()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    with Image.open(path) as opened:
        for image in (path, str(path), path.read_bytes(), opened):
            np.testing.assert_array_equal(processor.to_square(image), pixels)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
def test_arrays_and_tensors_of_every_layout_and_type_agree(processor, as_tensor, first, dtype):
    pixels = random_pixels()
    scaled = {"uint8": pixels, "uint16": pixels.astype(np.uint16) * 257}.get(dtype, pixels / 255)
    image = scaled.astype(dtype).transpose(2, 0, 1) if first else scaled.astype(dtype)
    image = torch.from_numpy(np.ascontiguousarray(image)) if as_tensor else image
    np.testing.assert_array_equal(processor.to_square(image), pixels)


def test_bfloat16_tensor_with_gradient_is_taken(processor):
    image = torch.full((3, SIDE, SIDE), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert (processor.to_square(image) == 128).all()


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE, 1), (1, SIDE, SIDE)])
def test_grey_arrays_become_three_equal_channels(processor, shape):
    grey = random_pixels(channels=1)
    expected = np.repeat(grey, 3, axis=2)
    np.testing.assert_array_equal(processor.to_square(grey.reshape(shape)), expected)


def test_floats_a_hair_outside_the_range_are_resampling_noise(processor):
    image = np.full((SIDE, SIDE, 3), 1.0 + 1e-6)
    image[0] = -1e-6
    assert set(np.unique(processor.to_square(image))) == {0, 255}


def test_load_image_keeps_the_full_size_and_returns_rgb(processor, tmp_path):
    path = tmp_path / "a.jpg"
    smooth_image(800, 400).save(path)
    image = processor.load_image(path)
    assert (image.mode, image.size) == ("RGB", (800, 400))


def test_load_image_leaves_the_callers_image_alone(processor):
    image = Image.fromarray(random_pixels(40, 50, channels=4))
    before = image.tobytes()
    processor.to_square(image)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (50, 40), before)


# --- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(processor, tmp_path, mode):
    pixels = random_pixels(channels=len(mode))
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (SIDE, SIDE, 3))
    assert np.abs(processor.to_square(path) - expected).max() <= 1
    np.testing.assert_array_equal(processor.to_square(path), processor.to_square(pixels))


def test_palette_image_keeps_its_colours(processor, tmp_path):
    colours = random_pixels(1, 200)[0]
    pixels = colours[np.random.default_rng(1).integers(0, 200, (SIDE, SIDE))]
    path = tmp_path / "a.png"
    Image.fromarray(pixels).quantize(256).save(path)
    with Image.open(path) as opened:
        assert opened.mode == "P"
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(processor.to_square(path), expected)
    np.testing.assert_array_equal(expected, pixels)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_transparent_palette_entry_becomes_white(processor, tmp_path, transparency):
    indices = np.zeros((SIDE, SIDE), dtype=np.uint8)
    indices[:, SIDE // 2 :] = 1
    image = Image.frombytes("P", (SIDE, SIDE), indices.tobytes())
    image.putpalette([200, 0, 0, 0, 0, 200])
    path = tmp_path / "a.png"
    image.save(path, transparency=transparency)
    square = processor.to_square(path)
    assert square[0, 0].tolist() == [255, 255, 255]
    assert square[0, -1].tolist() == [0, 0, 200]


def test_bilevel_image_becomes_black_and_white(processor):
    bits = random_pixels(channels=1)[..., 0] > 127
    expected = np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(processor.to_square(Image.fromarray(bits)), expected)


def test_cmyk_inks_become_their_rgb_colours(processor, tmp_path):
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    for ink, colour in inks.items():
        path = tmp_path / "a.tiff"
        Image.new("CMYK", (SIDE, SIDE), ink).save(path)
        assert (processor.to_square(path) == colour).all()


def test_cmyk_jpeg_is_not_inverted(processor, tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)).save(path, quality=95)
    assert np.abs(processor.to_square(path).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_by_65535_and_not_clipped(processor, tmp_path, suffix):
    grey = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path)
    expected = np.rint(grey / 65535 * 255).astype(np.uint8)
    square = processor.to_square(path)
    np.testing.assert_array_equal(square, np.repeat(expected[..., None], 3, axis=2))
    assert len(np.unique(square)) == 256, "clipping at 255 would leave almost everything white"


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "=i4")])
def test_deep_grey_modes_of_pil_are_scaled_by_65535(processor, mode, dtype):
    grey = np.linspace(0, 65535, SIDE * SIDE).astype(dtype).reshape(SIDE, SIDE)
    image = Image.frombytes(mode, (SIDE, SIDE), grey.tobytes())
    expected = np.rint(grey / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(processor.to_square(image)[..., 1], expected)


def test_every_sixteen_bit_value_goes_to_the_nearest_level():
    processor = IsicVQImageProcessor(size=256)
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(grey / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(processor.to_square(grey)[..., 0], expected)


def test_float_grey_image_is_taken_in_the_unit_range_only(processor):
    grey = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    expected = np.rint(grey * 255).astype(np.uint8)
    np.testing.assert_array_equal(processor.to_square(Image.fromarray(grey))[..., 0], expected)
    with pytest.raises(ImageError, match=r"float values in \[0, 1\]"):
        processor.to_square(Image.fromarray(grey * 255))


@pytest.mark.parametrize("value", [-1, 65536])
def test_thirty_two_bit_grey_beyond_sixteen_bits_is_refused(processor, value):
    with pytest.raises(ImageError, match=r"32-bit grey in \[0, 65535\]"):
        processor.to_square(Image.new("I", (SIDE, SIDE), value))


def test_mode_without_a_way_to_rgb_is_refused(processor):
    with pytest.raises(ImageError, match="conversion from La .* not supported"):
        processor.to_square(Image.new("La", (SIDE, SIDE)))


# --- EXIF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", EXIF_TURNS)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_orientation_moves_every_pixel_where_a_viewer_shows_it(processor, tmp_path, suffix, orientation):
    stored = random_pixels(SIDE, SIDE + 9)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    shown = EXIF_TURNS[orientation](stored)
    np.testing.assert_array_equal(np.asarray(processor.load_image(path)), shown)
    np.testing.assert_array_equal(processor.to_square(path), centred_square(shown))
    with Image.open(path) as opened:
        np.testing.assert_array_equal(processor.to_square(opened), centred_square(shown))


def test_exif_orientation_holds_for_sixteen_bit_grey(processor, tmp_path):
    stored = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    expected = np.rint(np.rot90(stored, -1) / 65535 * 255)
    np.testing.assert_array_equal(processor.to_square(path)[..., 0], expected)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_holds_for_a_jpeg_decoded_at_a_fraction(processor, tmp_path, orientation):
    stored = Image.new("RGB", (1024, 768), "black")
    stored.paste("red", (128, 0, 512, 384))  # upper left quarter of the centred square
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.jpg"
    stored.save(path, exif=exif, quality=95)
    is_red = processor.to_square(path)[..., 0] > 127
    expected = np.zeros((SIDE, SIDE, 1), dtype=bool)
    expected[: SIDE // 2, : SIDE // 2] = True
    np.testing.assert_array_equal(is_red, EXIF_TURNS[orientation](expected)[..., 0])


# --- large images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2048, 1536), (2592, 1944), (1022, 767), (919, 802), (600, 450)])
def test_jpeg_decoded_at_a_fraction_looks_like_the_same_file_opened_beforehand(tmp_path, size):
    processor = IsicVQImageProcessor()
    path = tmp_path / "a.jpg"
    smooth_image(*size).save(path, quality=90)
    with Image.open(path) as opened:
        expected = processor.to_square(opened).astype(int)
    difference = np.abs(processor.to_square(path) - expected)
    assert difference.mean() < 0.5
    assert difference.max() <= 4


def test_forty_megapixels_work_without_a_warning_within_seconds(tmp_path):
    processor = IsicVQImageProcessor()
    large = smooth_image(160, 100).resize((8000, 5000), Image.Resampling.NEAREST)
    path = tmp_path / "large.jpg"
    large.save(path, quality=60)
    start = time.process_time()
    from_file, opened = processor([path, large], return_tensors="np").pixel_values
    assert time.process_time() - start < 3
    expected = centred_square(np.asarray(large.resize((1600, 1000), Image.Resampling.BOX)))
    expected = np.asarray(Image.fromarray(expected).resize((128, 128), Image.Resampling.BICUBIC)) / 255
    for pixel_values in (from_file, opened):
        assert np.abs(pixel_values.transpose(1, 2, 0) - expected).mean() < 0.01


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (2**26 + 1, 1), (20000, 20000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(processor, tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_claiming(width, height))
    with pytest.raises(ImageError, match="bomb.png.*at most 67,108,864 pixels.*shrink it"):
        processor.to_square(path)
    path.write_bytes(png_header_claiming(8192, 8192))
    with pytest.raises(ImageError, match="complete image"):  # so it began to decode
        processor.to_square(path)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_image_error_is_a_value_error_that_keeps_its_cause(processor, tmp_path):
    assert issubclass(ImageError, ValueError)
    with pytest.raises(ImageError) as caught:
        processor.to_square(tmp_path / "none.jpg")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_missing_file_is_refused_by_name(processor, tmp_path):
    with pytest.raises(ImageError, match="none.jpg.*expected an existing file.*check the path"):
        processor(str(tmp_path / "none.jpg"))


def test_directory_is_refused_by_name(processor, tmp_path):
    with pytest.raises(ImageError, match=f"{tmp_path.name}.*IsADirectoryError"):
        processor(tmp_path)


def test_text_file_named_jpg_is_refused_by_name(processor, tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("not a picture at all")
    with pytest.raises(ImageError, match="notes.jpg.*expected a complete image.*replace the file"):
        processor(path)


def test_empty_file_is_refused_by_name(processor, tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(ImageError, match="empty.png"):
        processor(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("size", [(64, 64), (1024, 768)])
def test_truncated_file_is_refused_by_name_at_any_decoding_scale(processor, tmp_path, suffix, size):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(random_pixels(size[1], size[0])).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"cut.{suffix}.*expected a complete image"):
        processor(path)
    with Image.open(path) as opened, pytest.raises(ImageError, match=f"cut.{suffix}"):
        processor(opened)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of damaged TIFF tags before it fails
@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), suffix=st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "TIFF"]))
def test_damaged_bytes_give_pixels_or_an_image_error_and_nothing_else(seed, suffix):
    rng = np.random.default_rng(seed)
    buffer = BytesIO()
    Image.fromarray(random_pixels(20, 20)).save(buffer, suffix)
    data = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
    data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
    data = data[: rng.integers(1, len(data) + 1)].tobytes()
    with contextlib.suppress(ImageError):
        assert IsicVQImageProcessor(size=8).to_square(data).shape == (8, 8, 3)


@pytest.mark.parametrize("url", ["https://example.org/a.jpg", "HTTP://x/a.png", "s3://b/a.jpg", "data:,x"])
def test_url_is_refused_and_not_fetched(processor, url):
    with pytest.raises(ImageError, match="got a URL; download it"):
        processor(url)


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 3, 20, 20), dtype=np.uint8)])
def test_empty_list_is_refused(processor, images):
    with pytest.raises(ImageError, match="at least one image"):
        processor(images)


def test_image_with_a_side_under_the_minimum_is_refused(processor):
    with pytest.raises(ImageError, match=f"at least {MIN_SIDE} px, got 300 x {MIN_SIDE - 1} px"):
        processor(Image.new("RGB", (300, MIN_SIDE - 1)))


def test_image_of_the_target_size_is_never_too_small():
    pixels = random_pixels(8, 8)
    np.testing.assert_array_equal(IsicVQImageProcessor(size=8).to_square(pixels), pixels)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint32", "bool", "complex64"])
def test_other_number_types_are_refused(processor, dtype):
    with pytest.raises(ImageError, match=f"expected uint8, uint16 or float .* got {dtype}"):
        processor(np.zeros((SIDE, SIDE, 3), dtype=dtype))


@pytest.mark.parametrize("shape", [(SIDE,), (SIDE, SIDE, 5), (2, 2, SIDE, SIDE, 3), (0, SIDE, 3)])
def test_other_shapes_are_refused(processor, shape):
    with pytest.raises(ImageError, match="expected shape"):
        processor(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1)])
def test_floats_of_another_range_are_refused_with_the_way_out(processor, low, high):
    image = np.linspace(low, high, SIDE * SIDE).reshape(SIDE, SIDE)
    with pytest.raises(ImageError, match=r"divide \[0, 255\] by 255, map \[-1, 1\]"):
        processor(image)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(processor, value):
    image = np.full((SIDE, SIDE, 3), 0.5)
    image[3, 4, 1] = value
    with pytest.raises(ImageError, match="NaN or infinity"):
        processor(image)


@pytest.mark.parametrize("image", [None, 3, {"bytes": b""}, [["nested.jpg"]]])
def test_other_kinds_of_object_are_refused(processor, image):
    with pytest.raises(ImageError, match="expected a PIL image, numpy array, torch tensor, path"):
        processor(image)


def test_closed_pil_image_is_refused(processor):
    image = Image.new("RGB", (SIDE, SIDE))
    image.close()
    with pytest.raises(ImageError, match="closed"):
        processor(image)


def test_error_in_a_list_starts_with_the_index_and_names_the_file(processor, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("x")
    with pytest.raises(ImageError, match=r"^image 1 \(file '.*bad.jpg'\): "):
        processor([random_pixels(), bad, random_pixels()])


def test_error_carries_the_name_the_caller_gave(processor):
    with pytest.raises(ImageError, match="^ISIC_0000001: "):
        processor.to_square(b"x", name="ISIC_0000001")
    with pytest.raises(ImageError, match="^ISIC_0000001: "):
        processor.load_image(b"x", name="ISIC_0000001")


# --- masks ---------------------------------------------------------------------------------------------------------


def box_mask(width, height, box):
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("width", "height", "left", "top"), [(128, 96, 16, 0), (96, 128, 0, 16), (96, 96, 0, 0)]
)
def test_a_mask_is_cut_and_resized_like_its_image(processor, width, height, left, top):
    """96 pixels to 32: three by three become one."""
    mask = processor.to_mask(box_mask(width, height, (left + 6, top + 12, left + 30, top + 15)))
    assert mask.shape == (SIDE, SIDE)
    assert mask.dtype == bool
    expected = np.zeros((SIDE, SIDE), dtype=bool)
    expected[4, 2:10] = True
    np.testing.assert_array_equal(mask, expected)


def test_a_mask_marks_where_its_image_changes(processor):
    box = (300, 120, 420, 201)
    white = processor.to_square(box_mask(640, 451, box))[..., 0] > 127
    marked = processor.to_mask(box_mask(640, 451, box))
    assert (marked | ~white).all(), "what is mostly inside is marked"
    assert marked.sum() <= (white.shape[0] * 120 / 451 + 2) * (white.shape[0] * 81 / 451 + 2)


@pytest.mark.parametrize("side", [96, 1000, 4000])
def test_a_line_thinner_than_a_pixel_is_not_lost(processor, side):
    line = box_mask(side, side, (side // 2, 0, side // 2 + 1, side))
    assert processor.to_mask(line).sum(1).tolist() == [1] * SIDE


def test_a_mask_smaller_than_the_target_is_enlarged_without_blur(processor):
    mask = processor.to_mask(box_mask(16, 16, (0, 0, 8, 16)))
    np.testing.assert_array_equal(mask, np.arange(SIDE) < SIDE // 2 + np.zeros((SIDE, 1)))


@pytest.mark.parametrize(("level", "marked"), [(0, False), (127, False), (128, True), (255, True)])
def test_grey_counts_as_white_from_the_middle_on(processor, level, marked):
    assert processor.to_mask(Image.new("L", (SIDE, SIDE), level)).all() == marked
    assert processor.to_mask(Image.new("L", (SIDE, SIDE), level)).any() == marked


def test_what_is_transparent_in_a_mask_is_not_marked(processor):
    mask = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (4, 0, 8, SIDE))
    assert np.flatnonzero(processor.to_mask(mask)[0]).tolist() == [4, 5, 6, 7]


def test_a_mask_is_turned_upright(processor):
    mask = box_mask(SIDE, SIDE, (0, 0, SIDE, 4))
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    buffer = BytesIO()
    mask.save(buffer, format="PNG", exif=exif)
    assert np.flatnonzero(processor.to_mask(buffer.getvalue())[:, 0]).tolist() == list(range(SIDE - 4, SIDE))


def test_an_unusable_mask_is_named(processor):
    with pytest.raises(ImageError, match="hairs.png"):
        processor.to_mask("hairs.png")


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, {"height": 64, "width": 64}])
def test_size_is_an_int_or_a_square(size):
    processor = IsicVQImageProcessor(size=size)
    assert processor.size == {"height": 64, "width": 64}
    assert processor(random_pixels(), return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)


def test_default_size_is_128():
    assert IsicVQImageProcessor().size == {"height": 128, "width": 128}


@pytest.mark.parametrize(
    "size",
    [0, -4, True, 12.5, "64", {"height": 64, "width": 32}, {"height": 64}, {"shortest_edge": 64}, [64, 64]],
)
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size: expected a positive int"):
        IsicVQImageProcessor(size=size)


def test_settings_without_effect_are_refused(processor):
    with pytest.raises(ValueError, match="no setting .'do_normalize'., only `size` and"):
        IsicVQImageProcessor(do_normalize=True)
    with pytest.raises(ValueError, match="no setting .'do_resize'., only `size` and"):
        processor(random_pixels(), do_resize=False)


def test_without_conversion_other_modes_are_refused_and_rgb_stays_as_it_is(processor, tmp_path):
    strict = IsicVQImageProcessor(size=processor.size["height"], do_convert_rgb=False)
    image = smooth_image(60, 40)
    assert np.array_equal(strict.to_square(image), processor.to_square(image))
    transparent = image.copy()
    transparent.info["transparency"] = (0, 0, 0)
    others = [image.convert(mode) for mode in ("L", "1", "P", "LA", "RGBA", "CMYK", "I", "YCbCr")]
    for other in (*others, transparent, np.zeros((40, 40), dtype=np.uint16)):
        with pytest.raises(
            ImageError, match=r"expected mode RGB without transparency, got .*; set do_convert_rgb=True"
        ):
            strict(other)
        assert strict(other, do_convert_rgb=True)["pixel_values"].shape[1] == 3, (
            "the call's own setting holds"
        )
    assert strict.do_convert_rgb is False
    assert strict.to_mask(image.convert("L")).dtype == bool, "masks are grey"
    image.convert("L").save(tmp_path / "grey.png")
    with pytest.raises(ImageError, match=r"grey.png.*got L"):
        strict.load_image(tmp_path / "grey.png")
    with pytest.raises(ValueError, match="do_convert_rgb: expected True or False, got 'no'"):
        IsicVQImageProcessor(do_convert_rgb="no")


def test_a_call_may_have_a_size_of_its_own(processor):
    image = smooth_image(200, 150)
    expected = IsicVQImageProcessor(size=24)(image)["pixel_values"]
    assert np.array_equal(processor(image, size=24)["pixel_values"], expected)
    assert processor.size != {"height": 24, "width": 24}


def test_files_that_an_earlier_commit_saved_load_and_convert(tmp_path):
    content = {"image_processor_type": "IsicVQImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    loaded = IsicVQImageProcessor.from_pretrained(tmp_path)
    assert loaded.do_convert_rgb is True
    assert loaded.to_dict() == IsicVQImageProcessor(size=32).to_dict()


def test_saved_file_holds_settings_and_type_only(tmp_path):
    IsicVQImageProcessor(size=96).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "image_processor_type": "IsicVQImageProcessor",
        "size": {"height": 96, "width": 96},
        "do_convert_rgb": True,
    }


def test_save_and_load_give_the_same_processor_and_pixels(tmp_path):
    processor = IsicVQImageProcessor(size=96)
    processor.save_pretrained(tmp_path)
    loaded = IsicVQImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = smooth_image(200, 150)
    assert torch.equal(
        loaded(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
    )
    assert IsicVQImageProcessor.from_pretrained(tmp_path, size=48).size == {"height": 48, "width": 48}


def test_auto_image_processor_finds_the_registered_class(tmp_path):
    class RegisteredConfig(PreTrainedConfig):
        model_type = "isic_vq_image_processor_test"

    AutoImageProcessor.register(RegisteredConfig, image_processor_classes={"pil": IsicVQImageProcessor})
    try:
        IsicVQImageProcessor(size=40).save_pretrained(tmp_path)
        loaded = AutoImageProcessor.from_pretrained(tmp_path)
    finally:
        del IMAGE_PROCESSOR_MAPPING._extra_content[RegisteredConfig]
    assert type(loaded) is IsicVQImageProcessor
    assert loaded.size == {"height": 40, "width": 40}


@pytest.mark.slow
def test_repository_with_its_code_loads_and_saves_where_isic_vq_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(IsicVQImageProcessor, "_auto_class", "AutoImageProcessor")
    repository, copy = tmp_path / "repository", tmp_path / "copy"
    IsicVQImageProcessor(size=SIDE).save_pretrained(repository)
    pixels = random_pixels(70, 90)
    np.save(tmp_path / "pixels.npy", pixels)
    script = f"""
import sys; sys.modules["isic_vq"] = None
import numpy as np
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained({str(repository)!r}, trust_remote_code=True)
np.save({str(tmp_path / "square.npy")!r}, processor.to_square(np.load({str(tmp_path / "pixels.npy")!r})))
processor.save_pretrained({str(copy)!r})
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = IsicVQImageProcessor(size=SIDE).to_square(pixels)
    np.testing.assert_array_equal(np.load(tmp_path / "square.npy"), expected)
    for folder in (repository, copy):
        saved = Path(folder, "preprocessor_config.json").read_text()
        assert str(tmp_path) not in saved
        assert json.loads(saved) == {
            "auto_map": {"AutoImageProcessor": "image_processing_isic_vq.IsicVQImageProcessor"},
            "do_convert_rgb": True,
            "image_processor_type": "IsicVQImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
        }
        assert Path(folder, "image_processing_isic_vq.py").is_file()
