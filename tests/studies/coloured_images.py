"""Images whose colour is their diagnosis, and classifiers small enough to learn it in a second."""

import numpy as np
from PIL import Image

from isic_vq.evaluation.student import Student

COLOURS = {"melanoma": (60, 30, 30), "nevus": (150, 100, 60), "vascular_lesion": (200, 40, 80)}
NET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
STUDENT = Student(steps=40, batch_size=12, image_size=16, learning_rate=1e-2, colour_strength=0.05, model=NET)


def write_coloured(folder, per_class, seed):
    """Noisy images whose colour is their diagnosis."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    lines = ["file_name,isic_id,diagnosis"]
    for name, number in per_class.items():
        for index in range(number):
            pixels = np.array(COLOURS[name]) + generator.integers(-20, 21, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}{index}.png")
            lines.append(f"{name}{index}.png,ISIC_{seed}_{name}{index},{name}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return f"folder:{folder}"
