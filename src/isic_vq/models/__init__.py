"""Configurations, models, image processor and pipeline: the folder a Hub repository ships.

Flat on purpose: transformers copies single-dot relative imports of sibling files into an exported
repository and nothing else, so every module here imports siblings, torch, transformers,
huggingface_hub, safetensors, numpy and pillow only.
"""
