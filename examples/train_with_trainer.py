"""Train a tokenizer, then a prior over its codes, with transformers' Trainer; join and save them.

python examples/train_with_trainer.py my_images   # my_images/nevus/1.jpg, my_images/melanoma/2.jpg, ...
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from isic_vq import IsicVQImageProcessor, IsicVQModel, PixelCNNConfig, PixelCNNModel, VQVAEConfig, VQVAEModel


def fit(model: PreTrainedModel, examples: list[dict], folder: Path, epochs: int) -> PreTrainedModel:
    """Train on all but every fifth example, and keep the epoch that does best on those."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        prediction_loss_only=True,
        report_to="none",
    )
    train = [example for index, example in enumerate(examples) if index % 5]
    Trainer(model, arguments, train_dataset=train, eval_dataset=examples[::5]).train()
    return model.cpu().eval()


def main() -> None:
    """Parse arguments, train both stages, join, save."""
    parser = argparse.ArgumentParser(description="Train with transformers' Trainer.")
    parser.add_argument("images", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--output", type=Path, default="my_model")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    runs, size, epochs = arguments.output / "runs", arguments.size, arguments.epochs

    classes = sorted(path.name for path in arguments.images.iterdir() if path.is_dir())
    files = sorted(path for name in classes for path in (arguments.images / name).iterdir())
    pixel_values = IsicVQImageProcessor(size=size)(files, return_tensors="pt")["pixel_values"]
    tokenizer = VQVAEModel(VQVAEConfig(image_size=size))
    fit(tokenizer, [{"pixel_values": image} for image in pixel_values], runs / "tokenizer", epochs)

    codes = [tokenizer.encode(image)[0] for image in pixel_values.split(1)]
    labels = [torch.tensor(classes.index(file.parent.name)) for file in files]
    config = PixelCNNConfig(grid_size=tokenizer.config.grid_size, id2label=dict(enumerate(classes)))
    examples = [{"codes": c, "class_ids": label} for c, label in zip(codes, labels, strict=True)]
    prior = fit(PixelCNNModel(config), examples, runs / "prior", epochs)
    IsicVQModel.from_parts(tokenizer, prior).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
