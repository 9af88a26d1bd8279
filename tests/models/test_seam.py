"""The edge of an edited region in photographs, by the shipped checkpoint. `-s` prints the figures."""

import io
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from isic_vq import IsicVQImageProcessor, IsicVQModel
from isic_vq.models.editing import BLENDS, pixel_mask

CHECKPOINT = Path(__file__).resolve().parents[2] / "model_cards" / "isic-vq-128"


def seams(images, masks):
    """For each image, the mean step in grey across the mask's border over that 2 to 6 pixels from it: 1 shows no edge."""
    grey, ratios = images.mean(1, keepdim=True), []
    steps, borders = [], []
    for axis in (2, 3):
        steps.append(grey.diff(dim=axis).abs())
        borders.append(masks.int().diff(dim=axis) != 0)
    for index in range(len(images)):
        across, near = [], []
        for step, border in zip(steps, borders, strict=True):
            line = border[index].float()
            around = F.max_pool2d(line, 13, 1, 6) > F.max_pool2d(line, 3, 1, 1)
            across.append(step[index][border[index]])
            near.append(step[index][around])
        ratios.append(torch.cat(across).mean() / torch.cat(near).mean())
    return torch.stack(ratios)


def test_seams_are_measured():
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 8:24, 8:24] = True
    slope = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    assert seams(slope, mask).item() == pytest.approx(1, abs=0.1)
    edge = slope + 0.5 * mask
    # Across half of the border's pixels the slope is level; each of the four sides adds a step of 0.5.
    assert seams(edge, mask).item() > 20


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif("ISIC_VQ_DATA" not in os.environ, reason="needs ISIC_VQ_DATA")
def test_a_blended_edit_shows_no_edge_in_ten_photographs():
    table = pq.read_table(next(Path(os.environ["ISIC_VQ_DATA"]).glob("ham10000/validation-*.parquet")))
    rows = table.slice(0, 600).to_pylist()[::60][:10]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    model = IsicVQModel.from_pretrained(CHECKPOINT)
    images = IsicVQImageProcessor(size=128)(pictures, return_tensors="pt")["pixel_values"]
    masks = torch.zeros(10, 128, 128, dtype=torch.bool)
    masks[:5, 32:96, 32:96] = True  # the middle
    masks[5:, :, 64:] = True  # the right half
    measured = {}
    for blend in BLENDS:
        edit = model.inpaint(images, masks, num_particles=8, seed=0, blend=blend)
        drawn = pixel_mask(edit.mask, 128)
        measured[blend] = seams(edit.pixel_values, drawn)
    measured["original"] = seams(images, drawn)
    for name, ratios in measured.items():
        print(f"{name}: mean {ratios.mean():.2f}, most {ratios.max():.2f}")  # noqa: T201
    assert measured["paste"].mean() > 2
    assert measured["poisson"].mean() < 1.25
    assert measured["poisson"].max() < measured["paste"].min()
