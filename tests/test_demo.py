"""What the demonstration page computes, and the command that serves it; test_demo_browser.py opens the page."""

import asyncio
import colorsys
import copy
import json
import math
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from isic_vq.data.schema import DataError
from isic_vq.demo.actions import ANY, DemoModel, checked_seed, chosen, made_before
from isic_vq.demo.code_maps import (
    BITS_COLORS,
    bits_map,
    code_colors,
    code_map,
    overlay,
    use_table,
)
from isic_vq.demo.front import LOADING, LoadingNotice, card_text
from isic_vq.demo.training_index import TrainingIndex, grid_distances
from isic_vq.figures.numbers import CodebookUse
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import MAX_PIXELS, ImageError
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import Sampling

SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_model(IsicVQModel, str(tiny_run.prior / "model"))


@pytest.fixture(scope="module")
def demo(model):
    return DemoModel(model)


@pytest.fixture(scope="module")
def index(model, tiny_run):
    return TrainingIndex.open(tiny_run.codes["train"], model.vqvae)


@pytest.fixture
def photo(tmp_path):
    """A picture whose centred square is 32 x 32 of its 48 x 32 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def square(demo, photo):
    return demo.read_square(str(photo))


# Pictures


def test_codebook_use_counts_codes_and_ranks_them():
    use = CodebookUse.count(np.array([[3, 1, 1], [3, 0, 1]]), num_codes=5)
    assert use.counts == (1, 3, 0, 2, 0)
    assert use.num_used == 3
    assert use.most_used() == [(1, 3), (3, 2), (0, 1)]
    shares = [1 / 2, 1 / 3, 1 / 6]
    assert use.perplexity == pytest.approx(math.prod(share**-share for share in shares))


def test_equally_frequent_codes_are_listed_in_their_order():
    assert CodebookUse.count(np.array([[4, 2], [2, 4]]), num_codes=5).most_used() == [(2, 2), (4, 2)]


def test_a_code_map_shows_each_code_as_a_square_of_its_colour():
    colors = np.arange(12, dtype=np.uint8).reshape(4, 3)
    codes = np.array([[0, 3], [2, 1]])
    shown = code_map(codes, colors, size=5)
    assert shown.shape == (6, 6, 3), "enlarged by whole numbers, to 5 pixels at least"
    for row in range(6):
        for column in range(6):
            assert (shown[row, column] == colors[codes[row // 3, column // 3]]).all()


def test_codes_have_colours_of_their_own_as_bright_as_what_they_decode_to():
    generator = np.random.default_rng(0)
    codebook, brightness = generator.normal(size=(200, 8)), generator.random(200)
    colors = code_colors(codebook, brightness)
    assert len({tuple(color) for color in colors.tolist()}) == 200
    luma = colors @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    expected = 55 + 150 * np.argsort(np.argsort(brightness)) / 199
    assert np.abs(luma - expected).max() < 1
    assert max(colorsys.rgb_to_hsv(*color / 255)[1] for color in colors) < 0.9, "no neon"


def test_colours_differ_most_along_the_codebooks_main_axis():
    codebook = np.random.default_rng(0).normal(size=(100, 6)) * [0.1, 9, 0.1, 0.1, 0.1, 3]
    colors = code_colors(codebook, np.zeros(100)).astype(float)
    blue_difference = colors[:, 2] - colors @ [0.299, 0.587, 0.114]
    assert abs(np.corrcoef(np.argsort(np.argsort(codebook[:, 1])), blue_difference)[0, 1]) > 0.99


@pytest.mark.parametrize("shape", [(1, 3), (5, 1), (2, 2)])
def test_small_codebooks_have_colours_too(shape):
    codebook = np.random.default_rng(0).normal(size=shape)
    colors = code_colors(codebook, np.arange(shape[0]))
    assert colors.shape == (shape[0], 3)
    assert len(np.unique(colors, axis=0)) == shape[0]


def test_a_bits_map_runs_from_pale_at_no_bits_to_dark_at_one_and_a_half_times_log2_k():
    shown = bits_map(np.array([[0.0, 3.0], [6.0, 60.0]]), num_codes=16, size=2)
    assert shown.tolist() == [
        [list(BITS_COLORS[0]), list(BITS_COLORS[2])],
        [list(BITS_COLORS[4]), list(BITS_COLORS[4])],
    ]


def test_an_overlay_tints_the_mask_alone():
    pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
    shown = overlay(pixels, np.array([[True, False], [False, False]]))
    assert shown[0, 0].tolist() == [63, 101, 177]
    assert (shown[0, 1] == 100).all()
    assert (shown[1] == 100).all()


def test_the_table_of_use_lists_codes_by_frequency_in_their_colours():
    codes = np.repeat(np.arange(12), np.arange(13, 1, -1))
    table = use_table(CodebookUse.count(codes, 16), np.arange(48, dtype=np.uint8).reshape(16, 3))
    listed = re.findall(r"background:#(\w{6})\"></span>(\d+)</td><td>(\d+)</td>.*?width:(\d+)%", table)
    assert listed[0] == ("000102", "0", "13", "100")
    assert listed[9] == ("1b1c1d", "9", "4", "31")
    assert len(listed) == 10
    assert "2 other codes in 3 patches or fewer each" in table


# Neighbours


def test_grid_distances_equal_those_of_the_quantized_latents():
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(9, 4, generator=generator)
    codes = torch.randint(9, (3, 5), generator=generator)
    grids = torch.randint(9, (4100, 3, 5), generator=generator)  # more than two chunks
    grids[7] = codes
    distances = grid_distances(codes, grids.to(torch.uint8), codebook)
    latents = codebook.double().numpy()
    expected = [
        np.sqrt(np.mean([((latents[a] - latents[b]) ** 2).sum() for a, b in zip(x, y, strict=True)]))
        for x, y in ((codes.flatten().tolist(), grid.flatten().tolist()) for grid in grids[::50])
    ]
    assert distances.dtype == torch.float64
    assert distances[::50].numpy() == pytest.approx(expected, abs=1e-12)
    assert distances[7] == 0, "exactly"


def test_the_nearest_image_to_a_training_image_in_any_view_is_itself(index):
    cache = index.cache
    for row, view in ((3, 0), (5, 6)):
        codes = torch.from_numpy(cache.codes[row, view].astype(np.int64))
        found = index.nearest(codes, 4)
        assert len(found) == 4
        assert found[0].distance == 0
        assert (found[0].codes == codes).all()
        assert found[0].num_equal == codes.numel()
        distances = [neighbour.distance for neighbour in found]
        assert distances == sorted(distances)
        twins = [
            i
            for i in range(len(cache.isic_ids))
            if (cache.codes[i] == cache.codes[row, view]).all((1, 2)).any()
        ]
        assert found[0].isic_id == cache.isic_ids[twins[0]]
        assert found[0].diagnosis == cache.diagnoses[twins[0]]


def test_the_distance_to_an_image_is_that_to_its_nearest_view(index):
    codes = torch.from_numpy(index.cache.codes[0, 0].astype(np.int64)).flip(0)
    codebook = index.codebook.double().numpy()
    found = index.nearest(codes, 99)
    assert len(found) == len(index.cache.isic_ids), "all there are"
    by_id = {neighbour.isic_id: neighbour for neighbour in found}
    for row in (1, 9):
        views = codebook[index.cache.codes[row].astype(int)]
        differences = ((views - codebook[codes.numpy()]) ** 2).sum(-1).mean((1, 2)) ** 0.5
        neighbour = by_id[index.cache.isic_ids[row]]
        assert neighbour.distance == pytest.approx(differences.min())
        assert (neighbour.codes.numpy() == index.cache.codes[row, differences.argmin()]).all()


def test_an_index_refuses_codes_of_another_tokenizer(tiny_run, model):
    other = copy.deepcopy(model.vqvae)
    other.quantizer.codebook[0] += 1
    with pytest.raises(DataError, match=r"train.parquet was encoded by another tokenizer"):
        TrainingIndex.open(tiny_run.codes["train"], other)


def test_an_index_refuses_grids_of_another_size(index):
    with pytest.raises(ValueError, match=r"codes are of shape \(2, 2\): expected \(4, 4\)"):
        index.nearest(torch.zeros(2, 2, dtype=torch.long), 1)


def test_the_attribution_names_every_licence_and_line(index):
    text = index.attribution()
    source = index.cache.source
    assert all(name in text for name in source.licenses)
    assert all(line in text for line in source.attributions)
    assert text.startswith("16 training images.")


# Actions


def test_a_seeds_images_are_those_of_the_model(demo, model):
    made = demo.generate("melanoma", 3, 7, Sampling(temperature=0.9, guidance_scale=2.0, top_k=4, top_p=0.8))
    expected = model.generate(3, "melanoma", seed=7, temperature=0.9, guidance_scale=2.0, top_k=4, top_p=0.8)
    pixels = (expected.pixel_values * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (np.stack([np.asarray(image) for image in made.images]) == pixels).all()
    assert (made.codes == expected.codes).all()
    assert made.captions == [f"melanoma, seed 7, image {index}" for index in range(3)]
    assert made.command.endswith(
        " -n 3 --label melanoma --seed 7 --temperature 0.9 --top-k 4 --top-p 0.8 --guidance-scale 2.0"
    )


def test_the_command_that_the_page_names_writes_the_same_images(demo, run, tiny_run, tmp_path):
    made = demo.generate(ANY, 2, 5, Sampling(top_p=0.9))
    assert f"--model {tiny_run.prior / 'model'}" in made.command
    code, _, stderr = run(*shlex.split(made.command)[1:], "-o", tmp_path / "samples")
    assert code == 0, stderr
    for index, image in enumerate(made.images):
        written = Image.open(tmp_path / "samples" / f"image-{index:05d}.png")
        assert (np.asarray(written) == np.asarray(image)).all()
    assert made.captions[0] == "any diagnosis, seed 5, image 0"


def test_the_command_names_what_differs_from_the_checkpoints_own_settings(model):
    hot = copy.deepcopy(model)
    hot.prior.config.sampling = {"temperature": 3.0}
    demo = DemoModel(hot)
    assert "--temperature" not in demo.generate("nevus", 1, 0).command
    assert "--temperature 1.0" in demo.generate("nevus", 1, 0, Sampling()).command


def test_settings_that_are_off_are_not_passed_on(demo):
    assert demo.generate(ANY, 1, 0).command.endswith(" -n 1 --seed 0")


def test_the_shipped_checkpoint_needs_no_name():
    command = DemoModel(load_model(IsicVQModel)).generate(ANY, 1, 0).command
    assert command == "isic-vq generate -n 1 --seed 0"


def test_the_page_opens_on_an_image_of_each_class(demo, model):
    made = demo.generate_each_class()
    names = list(model.config.class_names.values())
    assert len(names) == 8
    assert (made.codes == model.generate(8, names, seed=0).codes).all()
    assert made.captions[:2] == ["melanoma, seed 0, image 0", "nevus, seed 0, image 1"]
    labels = " ".join(f"--label {name}" for name in names)
    assert made.command.endswith(f" -n 8 {labels} --seed 0")


def test_a_card_holds_its_own_pictures_and_links_no_file(tmp_path):
    (tmp_path / "outside.png").write_bytes(b"secret")
    folder = tmp_path / "model"
    (folder / "previews").mkdir(parents=True)
    (folder / "previews" / "a.png").write_bytes(b"pixels")
    (folder / "previews" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "README.md").write_text(
        "---\nlicense: x\n---\n# name\n![a](previews/a.png) ![b](../outside.png) ![c](previews/link.png) "
        "![d](/etc/passwd) ![e](config.json) [reports](reports/) [paper](https://arxiv.org/abs/1) ![f]("
        + "x" * 5000
        + ")"
    )
    assert card_text(folder) == (
        "# name\n![a](data:image/png;base64,cGl4ZWxz) b c d e reports [paper](https://arxiv.org/abs/1) f"
    )


def test_the_loading_notice_is_added_to_the_page_alone():
    async def answer(scope, receive, send):
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"20"), (b"a", b"b")],
            }
        )
        await send({"type": "http.response.body", "body": b"<head></head></head>"})

    def sent(path):
        messages = []

        async def send(message):
            messages.append(message)

        asyncio.run(LoadingNotice(answer)({"type": "http", "path": path, "method": "GET"}, None, send))
        return messages

    start, body = sent("/")
    assert start["headers"] == [(b"a", b"b")]
    assert body["body"] == b"<head>" + LOADING + b"</head>"
    start, body = sent("/other")
    assert dict(start["headers"])[b"content-length"] == b"20"
    assert body["body"] == b"<head></head></head>"


def test_an_explained_image_is_its_reconstruction_and_the_priors_bits(demo, model, square):
    explained = demo.explain(square)
    pixel_values = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255
    codes = model.encode(pixel_values)
    reconstruction = model.decode(codes)
    error = (pixel_values - reconstruction).double().square().mean().item()
    assert explained.psnr == pytest.approx(10 * math.log10(1 / error), abs=1e-4)
    levels = (reconstruction[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (np.asarray(explained.reconstruction) == levels).all()
    log_probabilities = model.prior(codes, None).logits.double().log_softmax(1)
    bits = -log_probabilities.gather(1, codes[:, None])[0, 0] / math.log(2)
    assert explained.bits_per_code == pytest.approx(bits.mean().item(), rel=1e-5)
    assert list(explained.use.counts) == torch.bincount(codes.flatten(), minlength=8).tolist()
    assert f"{explained.psnr:.2f} dB" in explained.table()
    assert f"{explained.use.num_used} of 8" in explained.table()
    cell = explained.code_map.width // codes.shape[2]
    for row, column in ((0, 0), (3, 1)):
        shown = explained.code_map.getpixel((column * cell + 1, row * cell + 1))
        assert shown == tuple(demo.colors[codes[0, row, column]].tolist())


def test_editing_changes_the_marked_patches_alone(demo, model, square):
    mask = demo.box_mask(4, 0, 8, 5)
    pictures = demo.edit(square, mask, "nevus", 2, 3, num_particles=4)
    captions = ["original", "region", "nevus, seed 3, variant 0", "nevus, seed 3, variant 1"]
    assert [caption for _, caption in pictures] == captions
    original, region, *variants = [np.asarray(image) for image, _ in pictures]
    touched = np.zeros((16, 16), dtype=bool)
    touched[0:8, 4:8] = True  # rows 0 to 4 touch two patches of four pixels
    assert (original == np.asarray(square)).all()
    assert ((region != original).any(-1) == touched).all()
    assert all((variant[~touched] == original[~touched]).all() for variant in variants)
    pixel_values = torch.from_numpy(original.copy()).permute(2, 0, 1)[None] / 255
    expected = model.inpaint(
        pixel_values.expand(2, -1, -1, -1), torch.from_numpy(mask), "nevus", seed=3, num_particles=4
    )
    levels = (expected.pixel_values * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (np.stack(variants) == levels).all()
    pasted = [
        np.asarray(image)
        for image, _ in demo.edit(square, mask, "nevus", 2, 3, num_particles=4, blend=False)[2:]
    ]
    assert all((image != variant)[touched].any() for image, variant in zip(pasted, variants, strict=True))


def test_a_painted_mask_holds_every_pixel_that_the_paint_touches(demo):
    layers = [Image.new("RGBA", (64, 64)) for _ in range(2)]
    ImageDraw.Draw(layers[0]).rectangle((8, 8, 15, 11), fill=(26, 102, 255, 153))
    ImageDraw.Draw(layers[1]).point((63, 63), fill=(26, 102, 255, 153))
    expected = np.zeros((16, 16), dtype=bool)
    expected[2, 2:4] = expected[15, 15] = True
    assert (demo.painted_mask(layers) == expected).all()


@pytest.mark.parametrize("layers", [[], [Image.new("RGBA", (64, 64))]], ids=["no layer", "an empty layer"])
def test_an_unpainted_picture_is_refused(demo, layers):
    with pytest.raises(ValueError, match="nothing is painted"):
        demo.painted_mask(layers)


@pytest.mark.parametrize("edges", [(8, 0, 8, 8), (0, 9, 8, 8)])
def test_an_empty_box_is_refused(demo, edges):
    with pytest.raises(
        ValueError, match=r"the box from .* is empty: expected left below right and top below"
    ):
        demo.box_mask(*edges)


def test_neighbours_are_shown_as_their_codes_decode(demo, model, index):
    codes = torch.from_numpy(index.cache.codes[2, 0].astype(np.int64))
    pictures = demo.neighbours(codes, index, 3)
    assert len(pictures) == 4
    assert pictures[0][1] == "your image, decoded from its codes"
    found = index.nearest(codes, 3)
    decoded = model.decode(torch.stack([codes, *(neighbour.codes for neighbour in found)]))
    levels = (decoded * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (np.stack([np.asarray(image) for image, _ in pictures]) == levels).all()
    assert (
        pictures[1][1]
        == f"{found[0].isic_id}, {found[0].diagnosis.replace('_', ' ')}: distance 0.00, 100% equal codes"
    )


def test_the_centred_square_is_what_the_model_sees(demo, photo):
    pixels = np.asarray(Image.open(photo))[:, 8:40]
    square = demo.read_square(str(photo))
    assert (np.asarray(square) == demo.processor.to_square(Image.fromarray(pixels))).all()
    assert (
        demo.pixel_values(square).numpy()[0] == np.asarray(square).transpose(2, 0, 1) / np.float32(255)
    ).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "note.png: expected a complete image"),
        ("5x5", "note.png: expected a shorter side of at least 16"),
    ],
)
def test_a_bad_upload_is_called_by_its_name_alone(demo, tmp_path, content, message):
    path = tmp_path / "note.png"
    if content == "5x5":
        Image.new("RGB", (5, 5)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as raised:
        demo.read_square(str(path))
    assert str(tmp_path) not in str(raised.value)


def test_what_is_missing_is_named(demo):
    with pytest.raises(ValueError, match="the seed is empty"):
        checked_seed(None)
    with pytest.raises(ValueError, match="there is no image yet"):
        chosen(None)
    with pytest.raises(ValueError, match="there is no generated image yet"):
        made_before(None)


# The command and the Space


def test_a_taken_port_is_one_line(run, tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, stdout, stderr = run("demo", "-m", tiny_run.prior / "model", "--port", port)
    assert (code, stdout) == (1, "")
    assert (
        stderr
        == f"error: cannot serve at 127.0.0.1, port {port} (Address already in use): choose another --port or --host\n"
    )


def test_a_port_that_is_none_is_one_line(run, tiny_run):
    for port in (0, 70000):
        code, _, stderr = run("demo", "-m", tiny_run.prior / "model", "--port", port)
        assert (code, stderr) == (1, f"error: port is {port}: expected 1 to 65535\n")


def test_missing_gradio_is_one_line(run, tiny_run, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # for the command to change, and to be as before afterwards
    for name in ("app", "controls"):
        monkeypatch.delitem(sys.modules, f"isic_vq.demo.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, stdout, stderr = run("demo", "-m", tiny_run.prior / "model", "--port", free_port())
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1] == 'error: the demo needs gradio: pip install "isic-vq[demo]"'


def test_an_index_of_another_tokenizer_is_one_line(run, tiny_run):
    code, stdout, stderr = run("demo", "--index", tiny_run.codes["train"], "--port", free_port())
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1] == (
        "error: train.parquet was encoded by another tokenizer: encode the images again with this one"
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_the_spaces_card_has_what_the_hub_asks_for():
    _, front, text = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio"
    assert (SPACE / card["app_file"]).is_file()
    assert card["license"] == "apache-2.0"
    pinned = re.search(r"^gradio==(.*)$", (SPACE.parents[1] / "constraints.txt").read_text(), re.MULTILINE)
    assert str(card["sdk_version"]) == pinned[1], "the version that is tested"
    assert "not a diagnostic device" in text
    assert "isic-vq[demo" in (SPACE / "requirements.txt").read_text()


@pytest.mark.slow  # a process of its own: a page leaves gradio's event loops open
def test_what_reads_an_uploaded_file_does_so_one_at_a_time(tiny_run):
    code = f"""
import gradio, PIL.Image
from isic_vq.demo.page import build_demo
from isic_vq.demo.training_index import TrainingIndex
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

model = load_model(IsicVQModel, {str(tiny_run.prior / "model")!r})
page = build_demo(model, TrainingIndex.open(__import__("pathlib").Path({str(tiny_run.codes["train"])!r}), model.vqvae))
reads = [f for f in page.fns.values() if any(isinstance(field, gradio.File) for field in f.inputs)]
print(len(reads), {{f.concurrency_limit for f in reads}}, 2 * PIL.Image.MAX_IMAGE_PIXELS)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"4 {{1}} {MAX_PIXELS}"


CALLS = """
import inspect, json, sys
from gradio_client import Client, handle_file
from isic_vq.demo.page import build_demo, launch_settings
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

page = build_demo(load_model(IsicVQModel, sys.argv[1]))
named = {f.api_name: f for f in page.fns.values() if f.api_visibility == "public"}
undocumented = [
    (name, parameter.name)
    for name, function in named.items()
    for parameter in inspect.signature(function.fn).parameters.values()
    if parameter.annotation is parameter.empty or f"{parameter.name}: " not in inspect.getdoc(function.fn)
]
_, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
client = Client(address, verbose=False)
generated, _ = client.predict(num_images=2, seed=3, api_name="/generate")
inpainted = client.predict(handle_file(generated[0]["image"]), num_variants=1, num_particles=2, left=2, top=2, right=9,
                           bottom=9, api_name="/inpaint")
try:
    client.predict(num_images=17, api_name="/generate")
    refused = ""
except Exception as error:
    refused = str(error)
print(json.dumps([sorted(named), undocumented, [item["image"] for item in generated],
                  [item["caption"] for item in inpainted], refused]))
page.close(verbose=False)
"""


@pytest.mark.slow
def test_programs_call_the_page_by_name_and_get_the_models_images(tiny_run, model, demo):
    command = [sys.executable, "-c", CALLS, str(tiny_run.prior / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    names, undocumented, files, captions, refused = json.loads(result.stdout.splitlines()[-1])
    assert names == ["generate", "inpaint", "reconstruct"]
    assert undocumented == []
    for file, image in zip(files, demo.generate(ANY, 2, 3).images, strict=True):
        assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), np.asarray(image))
    assert captions == ["original", "region", "any diagnosis, seed 0, variant 0"]
    assert "17" in refused
