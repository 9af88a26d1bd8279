"""transformers' Trainer trains every model: it reports eval_loss, and ends with the best weights."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator


def train(model, examples, folder):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        learning_rate=0.5,  # so that later epochs are worse
        per_device_train_batch_size=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:4],
        data_collator=default_data_collator,
    )
    trainer.train()
    return trainer


def examples_of(kind, generator):
    pixel_values = {"pixel_values": torch.rand(3, 16, 16, generator=generator)}
    label = torch.randint(3, (), generator=generator)
    if kind == "vqvae":
        return pixel_values
    if kind == "composite":
        return {**pixel_values, "class_ids": label}
    shape, context = (
        ((4, 4), {}) if kind == "pixelcnn" else ((21,), {"context": torch.randn(20, 3, generator=generator)})
    )
    return {"codes": torch.randint(7, shape, generator=generator), "class_ids": label, **context}


@pytest.mark.parametrize("kind", ["vqvae", "pixelcnn", "var", "composite"])
def test_trainer_reports_eval_loss_and_ends_with_the_best_weights(
    kind, make_vqvae, make_prior, make_var, make_composite, tmp_path
):
    makers = {"vqvae": make_vqvae, "pixelcnn": make_prior, "var": make_var, "composite": make_composite}
    model, generator = makers[kind](), torch.Generator().manual_seed(0)
    examples = [examples_of(kind, generator) for _ in range(12)]
    trainer = train(model, examples, tmp_path)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    best = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())["best_model_checkpoint"]
    opened = type(model).from_pretrained(best).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in model.state_dict().items())


def test_trainer_reports_eval_loss_of_a_prior_without_classes(make_prior, tmp_path):
    codes = [{"codes": torch.randint(7, (4, 4))} for _ in range(8)]
    trainer = train(make_prior(), codes, tmp_path)
    assert trainer.state.best_metric > 0
