"""What the page shows around its tabs: a notice while it loads, which model it is, and the model's card."""

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from isic_vq.demo.actions import DemoModel

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Of the page before its scripts have run, which a busy server may take a minute to send.
LOADING = b"""<style>
gradio-app:not(:has([role=tab]))::before { content: "isic-vq: the page is loading. On a busy server this takes up to a minute.";
  font-family: system-ui, sans-serif; padding: 3rem 1rem; text-align: center; }
</style></head>"""


class LoadingNotice:
    """ASGI middleware that adds the notice to the page's HTML; gradio's own `head` is added by its scripts, too late."""

    def __init__(self, app: "ASGIApp"):
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request."""

        async def send_with_notice(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                message = {**message, "body": message["body"].replace(b"</head>", LOADING, 1)}
            await send(message)

        is_page = scope["type"] == "http" and scope["path"] == "/" and scope["method"] == "GET"
        await self.app(scope, receive, send_with_notice if is_page else send)


def card_text(folder: Path) -> str:
    """Read a model's card as Markdown that holds its pictures; other files of the folder are not linked."""
    text = (folder / "README.md").read_text(encoding="utf-8")

    def resolved(link: re.Match[str]) -> str:
        mark, words, target = link.groups()
        if re.match("https?:|#", target):
            return link[0]
        if mark and re.fullmatch(r"(previews|figures)/[\w.-]{1,200}\.png", target):
            path = (folder / target).resolve()
            if path.is_file() and path.is_relative_to(folder.resolve()):
                return f"![{words}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
        return words

    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]*)\)", resolved, body)


def introduction(demo: DemoModel) -> str:
    """Say which model the page shows; the name of a Hub repository links its card."""
    source = demo.model.config.name_or_path
    name = Path(source).name if Path(source).is_dir() else f"[{source}]({constants.ENDPOINT}/{source})"
    classes = f"{len(demo.diagnoses)} diagnoses" if demo.diagnoses else "no diagnoses"
    return (
        f"Synthetic dermoscopy images, as grids of discrete codes. Model: {name or 'without a name'}, {classes}, "
        f"{demo.size} x {demo.size} pixels."
    )
