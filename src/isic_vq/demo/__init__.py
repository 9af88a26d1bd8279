"""The demonstration page: generate, reconstruct, edit, and look for the nearest training images.

`pictures`, `neighbours` and `actions` compute what the page shows and know nothing of it; `app` lays the page out and
`server` serves it on one machine. Only `app` and the tabs need gradio: pip install "isic-vq[demo]".
"""
