"""The page: tabs for one model. It needs no network and sends no analytics."""

from pathlib import Path
from typing import Any

import PIL.Image
from starlette.middleware import Middleware

from isic_vq.demo.actions import DemoModel
from isic_vq.demo.controls import PRIVATE, gr
from isic_vq.demo.front import LoadingNotice, card_text, introduction
from isic_vq.demo.tabs import edit_tab, generate_tab, nearest_tab, reconstruct_tab
from isic_vq.demo.training_index import TrainingIndex
from isic_vq.models.image_processing_isic_vq import MAX_PIXELS
from isic_vq.models.modeling_isic_vq import IsicVQModel

DELETE_EVERY, DELETE_AFTER = 600, 3600  # seconds: uploads and pictures
MAX_WAITING = 32  # requests; further ones are refused

CSS = """
.gradio-container { max-width: 1180px !important; width: 100%; min-width: 0; margin: 0 auto !important; }
.gradio-container main, .gradio-container .wrap { min-width: 0; max-width: 100%; }
.tab-container button.selected { color: var(--body-text-color); font-weight: 600; }
@media (max-width: 480px) { .tab-container button { padding: 0 5px; font-size: 13px; } }
#notice { border-left: 3px solid var(--color-accent); padding: 2px 12px; }

/* Pictures below their label and above their whole caption, as large as there is room. */
.pictures > label { position: static; border: none; }
.pictures .image-container, .pictures .image-frame, .pictures .image-frame button { height: auto; width: 100%; }
.pictures .image-frame img { width: 100%; max-width: 384px; height: auto; margin: 0 auto; object-fit: contain; }
.pictures .grid-wrap { min-height: 0; height: auto; max-height: none; padding: 0; overflow: visible; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(190px, 40%), 1fr)); padding: 8px; }
.pictures .thumbnail-lg { display: block; height: auto; aspect-ratio: auto; border: none; box-shadow: none;
  background: none; }
.pictures .thumbnail-lg img { aspect-ratio: 1; width: 100%; height: auto; }
.pictures .grid-wrap .caption-label { position: static; width: 100%; max-width: none; padding: 4px 0; border: none;
  background: none; text-align: left; white-space: normal; }
.pictures:has(.preview) .grid-wrap { display: none; }
.pictures .preview { position: static; height: 440px; }

.card img { max-width: 100%; }
.card table { display: block; overflow-x: auto; border: none !important; }
.card th, .card td { word-break: normal; overflow-wrap: normal; min-width: 7em; }
.card td img { min-width: 14em; }

.facts { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.facts, .facts tr { border-width: 0 !important; }
.facts caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
.facts th, .facts td { text-align: left; font-weight: 400; white-space: nowrap; padding: 4px 12px 4px 0 !important;
  border-width: 0 0 1px !important; border-style: solid; border-color: #8885 !important; }
.facts .swatch { display: inline-block; width: 1em; height: 1em; margin-right: 8px; vertical-align: -2px; }
.facts .wide { width: 60%; }
.facts .bar { display: block; height: 0.7em; background: var(--color-accent); opacity: 0.55; }
"""


def build_demo(model: IsicVQModel, index: TrainingIndex | None = None) -> gr.Blocks:
    """Lay out the page, which `launch(**launch_settings())` serves; without an index there is no tab Nearest."""
    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # for images that gradio reads; Pillow's limit is twice this
    demo, folder = DemoModel(model), Path(model.config.name_or_path)
    with gr.Blocks(
        title="isic-vq", analytics_enabled=False, delete_cache=(DELETE_EVERY, DELETE_AFTER), fill_width=True
    ) as page:
        gr.Markdown(f"# isic-vq\n{introduction(demo)}")
        gr.Markdown("A research tool, not a diagnostic device.", elem_id="notice")
        with gr.Tabs():
            with gr.Tab("Generate"):
                generated, selected = generate_tab(demo)
            with gr.Tab("Reconstruct"):
                reconstruct_tab(demo, generated, selected)
            with gr.Tab("Edit"):
                edit_tab(demo, generated, selected)
            if index is not None:
                with gr.Tab("Nearest"):
                    nearest_tab(demo, index, generated, selected)
            if (folder / "README.md").is_file():
                with gr.Tab("Card") as tab:
                    card = gr.Markdown(elem_classes="card")
                tab.select(lambda: card_text(folder), None, card, **PRIVATE)
    return page.queue(max_size=MAX_WAITING, api_open=False)


def launch_settings() -> dict[str, Any]:
    """Arguments of `Blocks.launch` other than the address; fonts are the system's, so that nothing is downloaded."""
    return {
        "theme": gr.themes.Default(
            primary_hue="slate",
            secondary_hue="slate",
            neutral_hue="stone",
            radius_size="sm",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css": CSS,
        "footer_links": [],
        "max_file_size": "20mb",
        "state_session_capacity": 200,
        "ssr_mode": False,
        "app_kwargs": {"middleware": [Middleware(LoadingNotice)]},
    }
