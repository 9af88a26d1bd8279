"""Figures of a training run: loss curves, codebook use, reconstructions and generated images.

Draws what the report this project reproduces shows (its section 2), from files a run left behind, never from a model:
`runs` reads them, `numbers` computes what is shown, `plots` draws it and `write` puts picture and numbers side by
side. `grid` lays out images without any plotting library. Only `plots` touches matplotlib, and only `write_figures`
imports `plots`.
"""

from .grid import image_grid
from .write import write_figures

__all__ = ["image_grid", "write_figures"]
