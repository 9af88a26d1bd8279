"""The page's four tabs: their fields, and callbacks that hand these to `DemoModel` and pictures back."""

import math
from typing import Any

import gradio as gr
from PIL import Image

from isic_vq.demo.actions import DemoModel, Generated, chosen, made_before
from isic_vq.demo.controls import (
    COMPUTING,
    PRIVATE,
    READING,
    diagnosis_field,
    gallery,
    picture,
    seed_field,
    step_counter,
    upload_field,
    with_messages,
)
from isic_vq.demo.neighbours import TrainingIndex
from isic_vq.demo.pictures import MOST_BITS, use_table
from isic_vq.models.sampling import Sampling

MAX_IMAGES = 16  # of one seed; computed as one block
MAX_VARIANTS = 8
MAX_NEIGHBOURS = 24
STATE_SECONDS = 3600
EDITOR_SIZE = 384  # pixels of the canvas: a pixel of the image must be large enough to hit
BRUSH = gr.Brush(default_size=20, colors=[("#1a66ff", 0.6)], color_mode="fixed")


def generate_tab(demo: DemoModel) -> tuple[gr.State, gr.State]:
    """Generate images; returns the states that hold them and the number of the one that was clicked."""
    generated, selected = gr.State(None, time_to_live=STATE_SECONDS), gr.State(0)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            diagnosis = diagnosis_field(demo)
            num_images = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Number of images")
            seed = seed_field()
            temperature = gr.Slider(
                0.1, 2, value=1, step=0.05, label="Temperature", info="Below 1 safer, above 1 wilder."
            )
            with gr.Accordion("Advanced", open=False):
                guidance = gr.Slider(
                    0,
                    5,
                    value=1,
                    step=0.1,
                    label="Guidance scale",
                    info="1 is off; more follows the diagnosis.",
                )
                top_k = gr.Slider(
                    0,
                    demo.num_codes,
                    value=0,
                    step=1,
                    label="Top-k",
                    info="Most likely codes to keep; 0 is off.",
                )
                top_p = gr.Slider(
                    0.05, 1, value=1, step=0.05, label="Top-p", info="Probability to keep; 1 is off."
                )
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2, min_width=280):
            images = gallery("Generated images")
            command = gr.Textbox(label="The same images from the command line", interactive=False)

    @with_messages
    def generate(
        name: str,
        count: int,
        number: int | None,
        heat: float,
        scale: float,
        most_likely: int,
        probability: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        on_step = step_counter(progress, demo.num_steps)
        sampling = Sampling(heat, int(most_likely) or None, None if probability == 1 else probability, scale)
        made = demo.generate(name, count, number, sampling, on_step)
        return list(zip(made.images, made.captions, strict=True)), made.command, made, 0

    def select(event: gr.SelectData) -> int:
        return event.index

    fields = [diagnosis, num_images, seed, temperature, guidance, top_k, top_p]
    button.click(
        generate, fields, [images, command, generated, selected], show_progress_on=images, **COMPUTING
    )
    images.select(select, None, selected, **PRIVATE)
    return generated, selected


def reconstruct_tab(demo: DemoModel) -> None:
    """Show an uploaded image through the tokenizer's eyes."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = upload_field()
            numbers = gr.HTML(padding=False)
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                seen = picture("Centred square")
                reconstruction = picture("Reconstruction")
            with gr.Row():
                codes = picture("Codes")
                surprise = picture("Surprise")
            gr.Markdown(
                "Codes: a colour each, alike for alike codes. Surprise: bits of each code under the prior, from pale "
                f"(0) to dark ({MOST_BITS * math.log2(demo.num_codes):.1f} or more)."
            )
            table = gr.HTML(padding=False)

    outputs = [seen, reconstruction, codes, surprise, numbers, table]

    @with_messages
    def reconstruct(path: str | None) -> Any:
        if path is None:
            return [None] * len(outputs)
        square = demo.read_square(path)
        found = demo.explain(square)
        pictures = [square, found.reconstruction, found.code_map, found.surprise]
        return [*pictures, found.table(), use_table(found.use, demo.colors)]

    file.change(lambda: [None] * len(outputs), None, outputs, **PRIVATE).then(
        reconstruct, file, outputs, show_progress_on=reconstruction, **COMPUTING
    )


def edit_tab(demo: DemoModel, generated: gr.State, selected: gr.State) -> None:
    """Draw a region of an image anew; the region is a box, or painted."""
    square = gr.State(None, time_to_live=STATE_SECONDS)
    size = demo.size
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = upload_field()
            take = gr.Button("Take the generated image", size="md")
            method = gr.Radio(
                [("a box", "box"), ("a brush", "brush")], value="box", label="Mark the region with"
            )
            with gr.Group() as box:
                edges = [
                    gr.Slider(0, size, value=value, step=1, label=f"{name} edge, in pixels")
                    for name, value in (
                        ("Left", size // 4),
                        ("Top", size // 4),
                        ("Right", size - size // 4),
                        ("Bottom", size - size // 4),
                    )
                ]
            diagnosis, seed = diagnosis_field(demo), seed_field()
            variants = gr.Slider(1, MAX_VARIANTS, value=3, step=1, label="Variants")
            with gr.Accordion("Advanced", open=False):
                particles = gr.Slider(
                    1,
                    256,
                    value=64,
                    step=1,
                    label="Particles",
                    info="Candidates per variant; more fit better.",
                )
            button = gr.Button("Draw anew", variant="primary")
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                region = picture("What will be drawn anew")
                editor = gr.ImageEditor(
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
            results = gallery("Original, region, variants")

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

    @with_messages
    def edit(
        image: Image.Image | None,
        how: str,
        painted: Any,
        name: str,
        count: int,
        number: int | None,
        candidates: int,
        *box_edges: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        mask = (
            demo.box_mask(*box_edges)
            if how == "box"
            else demo.painted_mask(painted["layers"] if painted else [])
        )
        on_step = step_counter(progress, count * demo.num_steps)
        return demo.edit(image, mask, name, count, number, candidates, on_step)

    def show_method(how: str) -> Any:
        by_box = how == "box"
        return gr.Group(visible=by_box), gr.Image(visible=by_box), gr.ImageEditor(visible=not by_box)

    inputs = [square, *edges]
    file.change(lambda: (None, None), None, [square, region], **PRIVATE).then(
        read, file, [square, editor], **READING
    ).success(show_region, inputs, region, **PRIVATE)
    take.click(take_generated, [generated, selected], [square, editor], **PRIVATE).success(
        show_region, inputs, region, **PRIVATE
    )
    gr.on([edge.change for edge in edges], show_region, inputs, region, trigger_mode="always_last", **PRIVATE)
    method.change(show_method, method, [box, region, editor], **PRIVATE)
    button.click(
        edit, [square, method, editor, diagnosis, variants, seed, particles, *edges], results, **COMPUTING
    )


def nearest_tab(demo: DemoModel, index: TrainingIndex, generated: gr.State, selected: gr.State) -> None:
    """Look for the training images nearest to an image."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = upload_field()
            search = gr.Button("Search for the uploaded image", variant="primary")
            take = gr.Button("Search for the generated image")
            count = gr.Slider(1, MAX_NEIGHBOURS, value=7, step=1, label="Training images to show")
            gr.Markdown(index.attribution())
        with gr.Column(scale=2, min_width=280):
            found = gallery("Nearest training images, as their codes decode")
            gr.Markdown(
                "Distance: root mean squared distance of the quantized latents; 0 means equal codes. Training images "
                "are shown as their codes decode, not as photographs."
            )

    @with_messages
    def search_upload(path: str | None, number: int) -> Any:
        square = chosen(None if path is None else demo.read_square(path))
        return demo.neighbours(demo.encode(square), index, number)

    @with_messages
    def search_generated(made: Generated | None, image: int, number: int) -> Any:
        return demo.neighbours(made_before(made).codes[image], index, number)

    search.click(search_upload, [file, count], found, **COMPUTING)
    take.click(search_generated, [generated, selected, count], found, **COMPUTING)
