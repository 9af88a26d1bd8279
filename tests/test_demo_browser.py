"""The demonstration page in headless Chromium: what a person sees, by mouse, by keyboard and on a phone.

The server is a process of its own, on a tiny model. Set CHROMIUM to a browser's path where it is not `chromium`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pytest
from PIL import Image

from isic_vq.demo.actions import ANY, DemoModel
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason='pip install "isic-vq[dev]" for playwright'
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium: install it, or set CHROMIUM to its path", allow_module_level=True)

pytestmark = pytest.mark.slow
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"
PHONE = {"width": 390, "height": 844}
PATIENCE = 300  # seconds: what a busy machine may need to start a server or to show something
UPLOADS = 5  # attempts
playwright_api.expect.set_options(timeout=1000 * PATIENCE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """A process that serves a page."""

    def __init__(self, arguments: list[str], port: int, folder: Path, **environment: str):
        folder.mkdir()
        self.url = urlunsplit(("http", f"127.0.0.1:{port}", "/", "", ""))
        self.port, self.log = port, folder / "log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), **environment},
            )

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def servers(tiny_run, tmp_path_factory) -> Iterator[tuple[Server, Server]]:
    """`isic-vq demo` on the tiny model with its index, and the Space; both start at once."""
    folder, ports = tmp_path_factory.mktemp("servers"), (free_port(), free_port())
    command = ["-m", "isic_vq", "demo", "-m", str(tiny_run.prior / "model")]
    command += ["--index", str(tiny_run.codes["train"]), "--port", str(ports[0])]
    demo = Server(command, ports[0], folder / "demo")
    space = Server([str(SPACE / "app.py")], ports[1], folder / "space", GRADIO_SERVER_PORT=str(ports[1]))
    try:
        demo.wait()
        space.wait()
        yield demo, space
    finally:
        demo.stop()
        space.stop()
    log = demo.log.read_text()
    assert f"serving at {demo.url}" in log
    assert "Traceback" not in log, log
    assert list(demo.log.parent.iterdir()) == [demo.log], "uploads and pictures go with the server"


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, servers):
    """Open the page; at the end of the test, no error was logged and no other host was asked for anything."""
    errors, hosts, contexts = [], set(), []

    def opened(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(servers[0].url)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    assert hosts <= {"127.0.0.1", None}, "data: and blob: have no host"


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def demo(tiny_run):
    return DemoModel(load_model(IsicVQModel, str(tiny_run.prior / "model")))


def panel(page):
    return page.locator("[role=tabpanel]:visible")


def pictures(page, count):
    """Pixels of the visible tab's gallery, once it holds that many."""
    thumbnails = panel(page).locator(".thumbnail-lg img")
    playwright_api.expect(thumbnails).to_have_count(count)
    return [pixels(page, thumbnails.nth(number)) for number in range(count)]


def pixels(page, image):
    answer = page.request.get(image.get_attribute("src"))
    return np.asarray(Image.open(BytesIO(answer.body())).convert("RGB"))


def upload(page, path):
    """Give the visible tab a file; a page that does not show its name, which a busy machine brings about, is opened anew."""
    tab = page.get_by_role("tab", selected=True).inner_text()
    for _ in range(UPLOADS):
        panel(page).locator("input[type=file]").set_input_files(path)
        try:
            return panel(page).get_by_text(path.name).wait_for(timeout=1000 * PATIENCE / UPLOADS)
        except playwright_api.TimeoutError:
            page.reload()
            page.get_by_role("tab", name=tab).click()
    raise AssertionError(f"the page never showed {path.name}")


def test_the_page_opens_on_an_image_of_each_class(open_page, demo):
    page = open_page()
    shown = pictures(page, 8)
    made = demo.generate_each_class()
    assert all((a == np.asarray(b)).all() for a, b in zip(shown, made.images, strict=True))
    assert panel(page).locator(".thumbnail-lg img").first.bounding_box()["width"] >= 190
    assert "8 diagnoses, 16 x 16 pixels" in page.locator("body").inner_text()


def test_a_page_whose_scripts_have_not_come_says_that_it_is_loading(browser, servers):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(servers[0].url)
    content = "getComputedStyle(document.querySelector('gradio-app'), '::before').content"
    assert "the page is loading" in page.evaluate(content)
    context.close()
    page = browser.new_page()
    page.goto(servers[0].url)
    page.get_by_role("button", name="Generate", exact=True).wait_for(timeout=1000 * PATIENCE)
    assert page.evaluate(content) == "none"
    page.close()


def test_generated_images_are_the_models_own(open_page, demo):
    page = open_page()
    assert "not a diagnostic device" in page.locator("#notice").inner_text()
    page.get_by_label("Diagnosis").first.click()
    page.get_by_role("option", name="melanoma").click()
    page.get_by_label("Seed").first.fill("3")
    page.get_by_role("button", name="Generate", exact=True).click()
    made = demo.generate("melanoma", 4, 3)
    shown = pictures(page, 4)
    assert all((a == np.asarray(b)).all() for a, b in zip(shown, made.images, strict=True))
    captions = panel(page).locator(".thumbnail-lg .caption-label").all_inner_texts()
    assert captions == made.captions
    assert page.get_by_label("The same images from the command line").input_value() == made.command


def test_an_upload_is_reconstructed_and_a_bad_one_gets_a_message(open_page, demo, photo, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (5, 5)).save(tmp_path / "tiny.png")
    page = open_page()
    page.get_by_role("tab", name="Reconstruct").click()
    for name, message in (
        ("broken.png", "broken.png: expected a complete image that Pillow can decode"),
        ("tiny.png", "tiny.png: expected a shorter side of at least 16 px, got 5 x 5 px"),
    ):
        upload(page, tmp_path / name)
        toast = page.get_by_test_id("toast-body").filter(has_text=message)
        toast.wait_for()
        assert str(tmp_path) not in toast.inner_text()
        toast.get_by_label("Close").click()
        toast.wait_for(state="detached")
        panel(page).get_by_label("Remove this file").or_(panel(page).get_by_label("Clear")).first.click()
        panel(page).get_by_text(name).wait_for(state="detached")
    upload(page, photo)
    panel(page).get_by_text("dB").wait_for()
    square = demo.read_square(str(photo))
    explained = demo.explain(square)
    images = panel(page).locator(".image-frame img")
    playwright_api.expect(images).to_have_count(4)
    shown = [pixels(page, images.nth(number)) for number in range(4)]
    expected = [square, explained.reconstruction, explained.code_map, explained.surprise]
    assert all((a == np.asarray(b)).all() for a, b in zip(shown, expected, strict=True))
    assert f"{explained.psnr:.2f} dB" in panel(page).inner_text()


def test_a_generated_image_is_edited_in_a_box_and_under_a_brush(open_page, demo):
    page = open_page()
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name="Inpaint").click()
    page.get_by_text("there is no image yet: choose one first").wait_for()
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="Generate", exact=True).click()
    square = Image.fromarray(pictures(page, 4)[0])
    page.get_by_role("tab", name="Edit").click()
    panel(page).get_by_role("button", name="Take the image clicked in Generate").click()
    panel(page).locator(".image-frame img").wait_for()
    panel(page).get_by_role("spinbutton", name="Top edge").fill("12")
    panel(page).get_by_role("spinbutton", name="Bottom edge").fill("16")
    panel(page).get_by_role("spinbutton", name="Bottom edge").press("Tab")
    page.get_by_role("button", name="Inpaint").click()
    expected = demo.edit(square, demo.box_mask(4, 12, 12, 16), ANY, 3, 0)
    shown = pictures(page, 5)
    assert all((a == np.asarray(b)).all() for a, (b, _) in zip(shown, expected, strict=True))

    page.get_by_label("a brush").check()
    canvas = panel(page).locator("canvas").first
    canvas.wait_for()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    clip = {"x": x - 40, "y": y - 40, "width": 80, "height": 80}
    deadline = time.monotonic() + PATIENCE
    while np.ptp(np.asarray(Image.open(BytesIO(page.screenshot(clip=clip))).convert("L"))) < 8:
        assert time.monotonic() < deadline, "the canvas never shows the image"
        page.wait_for_timeout(250)
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=5)
    page.mouse.up()
    panel(page).get_by_role("spinbutton", name="Variants").fill("1")
    page.get_by_role("button", name="Inpaint").click()
    original, region, *variants = pictures(page, 3)
    tinted = (region != original).any(-1)
    assert tinted[7:9, 7:9].all(), "the middle is painted"
    assert not tinted[0].any(), "the top is not"
    assert all((variant[~tinted] == original[~tinted]).all() for variant in variants)


def test_the_nearest_training_images_are_found(open_page, demo, tiny_run):
    page = open_page()
    page.get_by_role("tab", name="Nearest").click()
    page.get_by_role("button", name="Search for the uploaded image").click()
    page.get_by_text("there is no image yet").wait_for()
    image = sorted(tiny_run.images["train"].glob("*.png"))[2]
    upload(page, image)
    page.get_by_role("button", name="Search for the uploaded image").click()
    pictures(page, 8)
    captions = panel(page).locator(".thumbnail-lg .caption-label").all_inner_texts()
    assert "distance 0.00, 100% equal codes" in captions[1], "a training image is its own neighbour"
    assert "16 training images. Licence" in panel(page).inner_text()


def test_the_page_is_usable_by_keyboard(open_page):
    page = open_page()
    for _ in range(30):
        page.keyboard.press("Tab")
        if (
            page.evaluate("document.activeElement.innerText") == "Generate"
            and page.evaluate("document.activeElement.getAttribute('role')") != "tab"
        ):
            break
    else:
        raise AssertionError("Tab never reaches the button")
    page.keyboard.press("Enter")
    pictures(page, 4)
    unlabelled = page.evaluate(
        """[...document.querySelectorAll('input, button, textarea, select')].filter(control => control.offsetParent
        && !control.labels?.length && !control.ariaLabel && !control.innerText && !control.title
        && !control.getAttribute('aria-labelledby')).map(control => control.outerHTML.slice(0, 200))"""
    )
    assert unlabelled == []


def test_the_page_fits_a_phone(open_page, photo):
    page = open_page(viewport=PHONE, has_touch=True)
    page.get_by_role("button", name="Generate", exact=True).click()
    pictures(page, 4)
    for tab in ("Generate", "Reconstruct", "Edit", "Nearest"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Reconstruct":
            upload(page, photo)
            panel(page).get_by_text("dB").wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{tab} is {width} px wide"


def test_the_space_serves_the_same_page(browser, servers):
    page = browser.new_page()
    page.goto(servers[1].url)
    page.get_by_role("button", name="Generate", exact=True).wait_for(timeout=1000 * PATIENCE)
    tabs = page.get_by_role("tab").all_inner_texts()
    assert tabs == ["Generate", "Reconstruct", "Edit", "Card"], "no index, no tab for it"
    assert page.title() == "isic-vq"
    pictures(page, 7)
    page.get_by_role("tab", name="Card").click()
    panel(page).get_by_role("heading", name="isic-vq-128").wait_for()
    drawn = panel(page).locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(drawn) > 8
    assert min(drawn) > 100
    page.close()
