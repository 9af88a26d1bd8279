"""The page's four tabs: their fields, and callbacks that call `DemoModel`."""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gradio as gr
from PIL import Image

from isic_vq.demo.actions import MAX_IMAGES, DemoModel, Generated, Pictures, chosen, made_before
from isic_vq.demo.code_maps import MOST_BITS, use_table
from isic_vq.demo.controls import (
    COMPUTING,
    LENDS_GPU,
    PRIVATE,
    READING,
    computed,
    diagnosis_field,
    gallery,
    on_gpu,
    picture,
    public,
    seed_field,
    slider,
    step_counter,
    take_button,
    upload_field,
    with_messages,
)
from isic_vq.demo.training_index import TrainingIndex
from isic_vq.models.sampling import Sampling

MAX_VARIANTS = 8
MAX_NEIGHBOURS = 24
STATE_SECONDS = 3600
EDITOR_SIZE = 384  # pixels of the canvas, larger than the image so that its pixels can be hit
BRUSH = gr.Brush(default_size=20, colors=[("#1a66ff", 0.6)], color_mode="fixed")


def generate_fields(demo: DemoModel) -> SimpleNamespace:
    """Lay out the settings and pictures of the tab Generate."""
    field, usual = SimpleNamespace(), demo.model.default_sampling
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            warmth = "Below 1 more typical, above 1 more varied."
            field.settings = [
                diagnosis_field(demo),
                slider(1, MAX_IMAGES, 4, "Number of images", "More take longer."),
                seed_field(),
                slider(0.1, 2, usual.temperature, "Temperature", warmth, 0.05),
            ]
            advanced = [
                (0, 5, usual.guidance_scale, "Guidance scale", "1 is off; more follows the diagnosis.", 0.1),
                (
                    0,
                    demo.num_codes,
                    usual.top_k or 0,
                    "Top-k",
                    "Draw from so many likeliest codes; 0 is off.",
                    1,
                ),
                (
                    0.05,
                    1,
                    usual.top_p or 1,
                    "Top-p",
                    "Draw from codes of so much probability; 1 is off.",
                    0.05,
                ),
            ]
            with gr.Accordion("Advanced", open=False):
                field.settings += [slider(*setting) for setting in advanced]
            field.button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=3, min_width=320):
            field.images = gallery(
                "Generated images: click one to enlarge it, and to use it in the other tabs"
            )
            field.command = gr.Textbox(label="The same images from the command line", interactive=False)
    return field


def generate_tab(demo: DemoModel) -> tuple[gr.State, gr.State]:
    """Lay out the tab Generate, which opens on an image of each class.

    Returns:
        The states of the images and of the number that was clicked last.
    """
    generated, selected = gr.State(None, time_to_live=STATE_SECONDS), gr.State(0)
    field = generate_fields(demo)

    def show(made: Generated) -> tuple[Pictures, str, Generated, int]:
        return list(zip(made.images, made.captions, strict=True)), made.command, made, 0

    generate_each_class = functools.cache(on_gpu(demo.generate_each_class))
    if not LENDS_GPU:
        generate_each_class()  # before anybody opens the page; a lent GPU is there only for a visitor

    @with_messages
    def open_page() -> tuple[Pictures, str, Generated, int]:
        return show(generate_each_class())

    @computed
    def generate(
        diagnosis: str,
        num_images: int,
        seed: int | None,
        temperature: float,
        guidance_scale: float,
        top_k: int,
        top_p: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Pictures, str, Generated, int]:
        """Generate synthetic dermoscopy images; they are no diagnostic material.

        Args:
            diagnosis: a diagnosis of the model, such as "melanoma", or "any".
            num_images: how many, from 1 to 16.
            seed: image i depends on (seed, i) alone.
            temperature: below 1 more typical, above 1 more varied.
            guidance_scale: 1 is off; more follows the diagnosis.
            top_k: most likely codes to keep; 0 keeps all.
            top_p: probability to keep; 1 keeps all.
            progress: set by gradio.

        Returns:
            Images with captions, and the command that makes the same ones.
        """
        on_step = step_counter(progress, demo.num_steps)
        sampling = Sampling(temperature, int(top_k) or None, None if top_p == 1 else top_p, guidance_scale)
        return show(demo.generate(diagnosis, num_images, seed, sampling, on_step))

    def select(event: gr.SelectData) -> int:
        return event.index

    outputs = [field.images, field.command, generated, selected]
    gr.on(None, open_page, None, outputs, show_progress_on=field.images, **COMPUTING)  # when a page is loaded
    field.button.click(generate, field.settings, outputs, show_progress_on=field.images, **public("generate"))
    field.images.select(select, None, selected, **PRIVATE)
    return generated, selected


def reconstruct_tab(demo: DemoModel, generated: gr.State, selected: gr.State) -> None:
    """Lay out the tab Reconstruct, for an uploaded or a generated image."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            file, take = upload_field(), take_button()
            numbers = gr.HTML(padding=False)
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                seen, reconstruction = picture("Centred square"), picture("Reconstruction")
            with gr.Row():
                codes, surprise = picture("Codes"), picture("Surprise")
            gr.Markdown(
                "Codes: a colour each, alike for alike codes. Surprise: bits of each code under the prior, from pale "
                f"(0) to dark ({MOST_BITS * math.log2(demo.num_codes):.1f} or more)."
            )
            table = gr.HTML(padding=False)

    outputs = [seen, reconstruction, codes, surprise, numbers, table]

    def explain(square: Image.Image) -> tuple[Any, ...]:
        explained = demo.explain(square)
        pictures = [square, explained.reconstruction, explained.code_map, explained.surprise]
        return (*pictures, explained.table(), use_table(explained.use, demo.colors))

    @computed
    def reconstruct(path: str | None) -> tuple[Any, ...] | list[None]:
        """Encode an image to discrete codes and decode them.

        Args:
            path: an image file.

        Returns:
            The centred square, its reconstruction, its codes as colours, how many bits each costs, and two tables in HTML.
        """
        return [None] * len(outputs) if path is None else explain(demo.read_square(path))

    @computed
    def reconstruct_generated(made: Generated | None, number: int) -> tuple[Any, ...]:
        return explain(made_before(made).images[number])

    file.change(lambda: [None] * len(outputs), None, outputs, **PRIVATE).then(
        reconstruct, file, outputs, show_progress_on=reconstruction, **public("reconstruct")
    )
    take.click(
        reconstruct_generated, [generated, selected], outputs, show_progress_on=reconstruction, **COMPUTING
    )


def edit_fields(demo: DemoModel) -> SimpleNamespace:
    """Lay out the fields and pictures of the tab Edit."""
    size, field = demo.size, SimpleNamespace()
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            field.file, field.take = upload_field(), take_button()
            methods, info = (
                [("a box", "box"), ("a brush", "brush")],
                "What is marked is drawn anew, the rest stays.",
            )
            field.method = gr.Radio(methods, value="box", label="Mark the region with", info=info)
            with gr.Group() as field.box:
                quarter = size // 4
                values = {"Left": quarter, "Top": quarter, "Right": size - quarter, "Bottom": size - quarter}
                field.edges = [
                    slider(0, size, value, f"{name} edge, in pixels") for name, value in values.items()
                ]
            field.diagnosis, field.seed = diagnosis_field(demo), seed_field()
            field.variants = slider(1, MAX_VARIANTS, 3, "Variants", "How many answers to show.")
            with gr.Accordion("Advanced", open=False):
                info = "Candidates per variant; more fit the rest better."
                field.particles = slider(1, 256, 64, "Particles", info)
                info = "Off: the decoded patches are pasted as they are."
                field.blend = gr.Checkbox(True, label="Blend the region's edges into the image", info=info)
            field.button = gr.Button("Inpaint", variant="primary")
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                field.region = picture("Region to inpaint")
                field.editor = gr.ImageEditor(
                    label="Paint the region",
                    type="pil",
                    format="png",
                    sources=[],
                    transforms=[],
                    layers=False,
                    brush=BRUSH,
                    canvas_size=(EDITOR_SIZE, EDITOR_SIZE),
                    buttons=[],
                    visible=False,
                )
            field.results = gallery("Original, region, variants")
    return field


def inpaint_endpoint(demo: DemoModel) -> Callable[..., Pictures]:
    """Make the function that programs call to inpaint a box; the page's own takes a painted region, too."""

    @computed
    def inpaint(
        path: str | None,
        diagnosis: str,
        num_variants: int,
        seed: int | None,
        num_particles: int,
        blend: bool,
        left: int,
        top: int,
        right: int,
        bottom: int,
    ) -> Pictures:
        """Inpaint a box of an image's centred square, at the model's size, given a diagnosis and the rest of the image.

        Args:
            path: an image file.
            diagnosis: a diagnosis of the model, such as "melanoma", or "any".
            num_variants: how many, from 1 to 8.
            seed: variant i depends on (seed, i) and the image.
            num_particles: candidates per variant; more fit better.
            blend: blend the region's edges into the image.
            left: edge of the box, in pixels.
            top: edge of the box, in pixels.
            right: edge of the box, in pixels.
            bottom: edge of the box, in pixels.

        Returns:
            The original, the marked region and the variants, with captions.
        """
        image = None if path is None else demo.read_square(path)
        mask = demo.box_mask(left, top, right, bottom)
        return demo.edit(image, mask, diagnosis, num_variants, seed, num_particles, blend)

    return inpaint


def edit_tab(demo: DemoModel, generated: gr.State, selected: gr.State) -> None:
    """Lay out the tab Edit, which inpaints a box or a painted region."""
    square, field = gr.State(None, time_to_live=STATE_SECONDS), edit_fields(demo)

    def to_editor(image: Image.Image | None) -> Any:
        canvas = image and image.resize((EDITOR_SIZE, EDITOR_SIZE), Image.Resampling.BICUBIC)
        return {"background": canvas, "layers": [], "composite": None}

    @with_messages
    def show_region(image: Image.Image | None, *box_edges: int) -> Image.Image | None:
        left, top, right, bottom = box_edges
        if image is None or left >= right or top >= bottom:  # on the way to another box
            return None
        return demo.region(image, demo.box_mask(*box_edges))

    @with_messages
    def read(path: str | None) -> Any:
        image = None if path is None else demo.read_square(path)
        return image, to_editor(image)

    @with_messages
    def take_generated(made: Generated | None, number: int) -> Any:
        image = made_before(made).images[number]
        return image, to_editor(image)

    @computed
    def edit(
        image: Image.Image | None,
        how: str,
        painted: Any,
        name: str,
        count: int,
        number: int | None,
        candidates: int,
        blend: bool,
        *box_edges: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        layers = painted["layers"] if painted else []
        mask = demo.box_mask(*box_edges) if how == "box" else demo.painted_mask(layers)
        on_step = step_counter(progress, count * demo.num_steps)
        return demo.edit(image, mask, name, count, number, candidates, blend, on_step)

    def show_method(how: str) -> Any:
        by_box = how == "box"
        return gr.Group(visible=by_box), gr.Image(visible=by_box), gr.ImageEditor(visible=not by_box)

    region, inputs, read_into = field.region, [square, *field.edges], [square, field.editor]
    field.file.change(lambda: (None, None), None, [square, region], **PRIVATE).then(
        read, field.file, read_into, **READING
    ).success(show_region, inputs, region, **PRIVATE)
    field.take.click(take_generated, [generated, selected], read_into, **PRIVATE).success(
        show_region, inputs, region, **PRIVATE
    )
    changes = [edge.change for edge in field.edges]
    gr.on(changes, show_region, inputs, region, trigger_mode="always_last", **PRIVATE)
    field.method.change(show_method, field.method, [field.box, region, field.editor], **PRIVATE).then(
        to_editor, square, field.editor, **PRIVATE
    )  # a canvas that was not visible shows no image
    settings = [field.diagnosis, field.variants, field.seed, field.particles, field.blend, *field.edges]
    field.button.click(edit, [square, field.method, field.editor, *settings], field.results, **COMPUTING)
    gr.on(
        [], inpaint_endpoint(demo), [field.file, *settings], field.results, **public("inpaint")
    )  # for programs alone


def nearest_tab(demo: DemoModel, index: TrainingIndex, generated: gr.State, selected: gr.State) -> None:
    """Lay out the tab Nearest, which searches the training images."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            file = upload_field()
            search = gr.Button("Search for the uploaded image", variant="primary")
            take = gr.Button("Search for the image clicked in Generate")
            count = slider(1, MAX_NEIGHBOURS, 7, "Training images to show", "The nearest first.")
            gr.Markdown(index.attribution())
        with gr.Column(scale=3, min_width=320):
            results = gallery("Nearest training images, decoded from their codes")
            gr.Markdown(
                "Distance: root mean squared distance of the quantized latents; 0 means equal codes. Training images "
                "are decoded from their codes, not shown as photographs."
            )

    @computed
    def search_upload(path: str | None, count: int) -> Pictures:
        """Find the training images whose codes are nearest to those of an image.

        Args:
            path: an image file.
            count: how many, from 1 to 24.

        Returns:
            The image and the training images, nearest first, all as their codes decode, with captions.
        """
        square = chosen(None if path is None else demo.read_square(path))
        return demo.neighbours(demo.encode(square), index, count)

    @computed
    def search_generated(made: Generated | None, image: int, number: int) -> Any:
        return demo.neighbours(made_before(made).codes[image], index, number)

    search.click(search_upload, [file, count], results, **public("nearest"))
    take.click(search_generated, [generated, selected, count], results, **COMPUTING)
