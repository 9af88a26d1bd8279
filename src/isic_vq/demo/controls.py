"""The page's fields and pictures, made one way, and what they have in common: errors, progress, limits."""

import functools
import html
from collections.abc import Callable
from typing import Any

from isic_vq.demo.actions import ANY, DemoModel, readable

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the demo needs gradio: pip install "isic-vq[demo]"') from error

MAX_SEED = 2**53 - 1  # the largest whole number that a browser counts to

# Events are for the page, not for other programs. What computes waits for its turn; the rest does not.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
COMPUTING: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
# A file of 20 MB may be an image of 0.6 GB: one at a time, but not behind what computes.
READING: dict[str, Any] = {**PRIVATE, "concurrency_limit": 1, "concurrency_id": "files"}


def with_messages(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Show the text of a ValueError in the page; of other errors it shows only that there was one."""

    @functools.wraps(callback)
    def shown(*arguments: Any, **keywords: Any) -> Any:
        try:
            return callback(*arguments, **keywords)
        except ValueError as error:
            # The page takes messages for HTML, and they may hold the name of somebody's file.
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, duration=None, print_exception=False) from error

    return shown


def step_counter(progress: gr.Progress, total: int) -> Callable[[], None]:
    """A function to call after each of `total` steps of drawing codes; it moves the progress bar."""
    steps = iter(range(1, total + 1))
    return lambda: progress((next(steps), total), desc="drawing codes", unit="steps")


def upload_field() -> gr.File:
    """Where an image file goes; what is wrong with one is for the image processor to say."""
    return gr.File(label="Image file", file_types=["image"], height=120)


def diagnosis_field(demo: DemoModel) -> gr.Dropdown:
    """A choice among the model's diagnoses and none of them."""
    names = [(readable(name), name) for name in demo.diagnoses]
    return gr.Dropdown([("any (unconditional)", ANY), *names], value=ANY, label="Diagnosis")


def seed_field() -> gr.Number:
    """A seed."""
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)


def slider(
    low: float, high: float, value: float, label: str, info: str | None = None, step: float = 1
) -> gr.Slider:
    """A number from a range."""
    return gr.Slider(low, high, value=value, step=step, label=label, info=info)


def gallery(label: str) -> gr.Gallery:
    """Pictures with captions, sent to the browser as they are."""
    return gr.Gallery(
        label=label,
        format="png",
        object_fit="contain",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes="pictures",
        min_width=140,
    )


def picture(label: str) -> gr.Image:
    """One picture, sent to the browser as it is."""
    return gr.Image(
        label=label,
        format="png",
        type="pil",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes="pictures",
        min_width=140,
    )
