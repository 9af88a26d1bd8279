"""The demonstration page: generate, reconstruct and edit images, and search the nearest training images.

`pictures`, `neighbours` and `actions` compute without gradio; `app`, `tabs` and `controls` lay out the page with it
(pip install "isic-vq[demo]"), and `server` serves it.
"""
