"""Weights that other libraries keep elsewhere, adapt or quantize."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from diffusers.hooks import apply_group_offloading

from isic_vq import IsicVQModel, IsicVQPipeline

CPU = torch.device("cpu")


def grouped(model, tmp_path):
    for part in (model.vqvae, model.prior):
        apply_group_offloading(part, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


WAYS = {
    "cpu_offload": lambda model, _: cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, {"vqvae": "disk", "prior": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
    "group offload": grouped,
    "model offload": lambda model, _: IsicVQPipeline(model.vqvae, model.prior).enable_model_cpu_offload(
        device="cpu"
    ),
}


def everything(model):
    pixel_values = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    made = model.generate(2, "nevus", seed=1, guidance_scale=1.5)
    codes = model.encode(pixel_values)
    edited = model.inpaint(pixel_values, torch.ones(16, 16).triu().bool(), 1, seed=2, num_particles=2)
    with torch.no_grad():
        output = model(pixel_values, torch.tensor([0, 1]))
    alone = model.vqvae.decode_alone(torch.arange(3))
    return [
        made.codes,
        made.pixel_values,
        codes,
        model.decode(codes),
        edited.codes,
        output.loss,
        output.logits,
        alone,
    ]


@pytest.mark.parametrize("settings", [{}, {"scales": True}], ids=["pixelcnn", "var"])
def test_offloaded_weights_give_what_weights_at_hand_give(make_composite, settings, tmp_path):
    model = make_composite(**settings)
    # A codebook that learns by gradient is a parameter, which is offloaded; one by moving averages may be left there.
    model.vqvae.quantizer.learns_by = "gradient"
    codebook = model.vqvae.quantizer._buffers.pop("codebook")
    model.vqvae.quantizer.codebook = torch.nn.Parameter(codebook)
    expected = everything(model)
    for name, offload in WAYS.items():
        offloaded = copy.deepcopy(model)
        offload(offloaded, tmp_path / name)
        for _ in range(2):
            for a, b in zip(everything(offloaded), expected, strict=True):
                assert torch.equal(a, b), name


def test_weights_left_on_the_disk_are_refused_with_the_way_out(make_composite, tmp_path):
    make_composite().save_pretrained(tmp_path)
    for settings in (
        {"device_map": {"vqvae": "cpu", "prior": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 6000}},
    ):
        with pytest.raises(ValueError, match="accelerate.disk_offload"):
            IsicVQModel.from_pretrained(tmp_path, **settings)
    opened = IsicVQModel.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    assert opened.generate(1, seed=0).codes.shape == (1, 4, 4)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks for it
@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, ["output", "vertical_to_horizontal", "head.1"]),
        ({"scales": True}, ["queries_keys_values", "output", "features"]),
    ],
    ids=["pixelcnn", "var"],
)
def test_adapters_learn_and_samples_are_those_of_the_merged_weights(make_composite, settings, layers):
    from peft import LoraConfig, get_peft_model

    model = make_composite(**settings)
    codes = model.generate(4, "nevus", seed=0).codes
    inputs = {
        "codes": codes,
        "class_ids": torch.tensor([1, 1, 0, 3]),
        "context": model.vqvae.context(codes),
    }
    adapted = get_peft_model(model.prior, LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.05)
    before = adapted(**inputs).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        adapted_logits = adapted(**inputs).logits
        assert adapted(**inputs).loss < before
    if settings:
        samples = model.generate(4, "nevus", seed=1).codes
    else:
        with pytest.raises(ValueError, match="merge adapters into them first"):
            model.generate(4, "nevus", seed=1)
    model.prior = adapted.merge_and_unload()
    torch.testing.assert_close(
        model.predict(codes, inputs["class_ids"]), adapted_logits, atol=1e-4, rtol=1e-4
    )
    merged = model.generate(4, "nevus", seed=1).codes
    if settings:
        assert torch.equal(samples, merged)


@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_linear_layers_in_int8_predict_nearly_the_same_and_generate(make_composite):
    model = make_composite(scales=True)
    codes = model.generate(4, "nevus", seed=0).codes
    expected = model.predict(codes)
    model.prior = torch.ao.quantization.quantize_dynamic(model.prior, {torch.nn.Linear}, dtype=torch.qint8)
    assert sum("quantized" in type(layer).__module__ for layer in model.prior.modules()) >= 10
    difference = (model.predict(codes) - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()
    assert model.generate(4, "nevus", seed=0).codes.shape == codes.shape
