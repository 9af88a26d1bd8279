"""The demonstration page: generate, reconstruct and edit images, and search the nearest training images.

`code_maps`, `training_index`, `actions` and `front` do without gradio; `page`, `tabs` and `controls` lay out the page with
it (pip install "isic-vq[demo]"), and `server` serves it.
"""
