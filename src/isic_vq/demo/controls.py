"""The page's fields and pictures, and settings that its events share: errors, progress, limits."""

import functools
import html
from collections.abc import Callable
from typing import Any

from isic_vq.demo.actions import ANY, DemoModel, readable

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the demo needs gradio: pip install "isic-vq[demo]"') from error

try:
    import spaces  # of Spaces on ZeroGPU, where a GPU is lent for a call
except ImportError:
    spaces = None

LENDS_GPU = spaces is not None
MAX_SEED = 2**53 - 1  # the largest integer that a browser holds exactly

# Events are private to the page unless `public` names them. Those that compute run one at a time; the others do not wait.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
COMPUTING: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
# A file of 20 MB may be an image of 0.6 GB: one at a time, but not behind computations.
READING: dict[str, Any] = {**PRIVATE, "concurrency_limit": 1, "concurrency_id": "files"}
PICTURES: dict[str, Any] = {
    "format": "png",
    "buttons": ["download", "fullscreen"],
    "interactive": False,
    "elem_classes": "pictures",
    "min_width": 140,
}


def on_gpu(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Run a callback on a lent GPU, in a Space that has them; elsewhere leave it as it is."""
    return spaces.GPU(callback) if LENDS_GPU else callback


def public(name: str) -> dict[str, Any]:
    """Settings of an event that computes and that programs may call, by gradio_client or as an MCP tool."""
    return {**COMPUTING, "api_visibility": "public", "api_name": name}


def with_messages(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a callback so that the page shows the text of a ValueError, and of other errors only that one occurred."""

    @functools.wraps(callback)
    def shown(*arguments: Any, **keywords: Any) -> Any:
        try:
            return callback(*arguments, **keywords)
        except ValueError as error:
            # The page renders messages as HTML, and they may hold file names of users.
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, duration=None, print_exception=False) from error

    return shown


def computed(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that computes with the model an event's: on a lent GPU where there is one, its errors shown."""
    return with_messages(on_gpu(callback))


def step_counter(progress: gr.Progress, total: int) -> Callable[[], None]:
    """Make a function that moves the progress bar by one of `total` sampling steps."""
    steps = iter(range(1, total + 1))
    return lambda: progress((next(steps), total), desc="sampling codes", unit="steps")


def upload_field() -> gr.File:
    """Make a field for an image file, which the image processor checks."""
    return gr.File(label="Image file (its centred square)", file_types=["image"], height=150)


def take_button() -> gr.Button:
    """Make a button that takes the image clicked last in the tab Generate, the first if none was clicked."""
    return gr.Button("Take the image clicked in Generate", size="md")


def diagnosis_field(demo: DemoModel) -> gr.Dropdown:
    """Make a choice of the model's diagnoses, or none."""
    names = [(readable(name), name) for name in demo.diagnoses]
    choices, info = [("any (unconditional)", ANY), *names], "What the images are to show."
    return gr.Dropdown(choices, value=ANY, label="Diagnosis", info=info)


def seed_field() -> gr.Number:
    """Make a field for the seed."""
    info = "Any whole number; the same seed draws the same images."
    return gr.Number(0, label="Seed", info=info, precision=0, minimum=0, maximum=MAX_SEED)


def slider(
    low: float, high: float, value: float, label: str, info: str | None = None, step: float = 1
) -> gr.Slider:
    """Make a field for a number from a range."""
    return gr.Slider(low, high, value=value, step=step, label=label, info=info)


def gallery(label: str) -> gr.Gallery:
    """Make a gallery of captioned pictures, sent losslessly."""
    return gr.Gallery(label=label, object_fit="contain", **PICTURES)


def picture(label: str) -> gr.Image:
    """Make a field of one picture, sent losslessly."""
    return gr.Image(label=label, type="pil", **PICTURES)
