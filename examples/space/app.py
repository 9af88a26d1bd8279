"""The demonstration page as a Hugging Face Space: the shipped model, and an index of its training images if given."""

from pathlib import Path

import torch

from isic_vq import IsicVQModel
from isic_vq.demo.page import build_demo, launch_settings
from isic_vq.demo.training_index import TrainingIndex
from isic_vq.hub.pretrained import load_model

model = load_model(IsicVQModel)  # or load_model(IsicVQModel, "user/my-model")
model.to("cuda" if torch.cuda.is_available() else "cpu")
codes = Path(__file__).with_name("codes.parquet")
demo = build_demo(model, TrainingIndex.open(codes, model.vqvae) if codes.is_file() else None)

if __name__ == "__main__":
    demo.launch(mcp_server=True, **launch_settings())
