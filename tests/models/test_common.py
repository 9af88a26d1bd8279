"""The contract every model keeps, whatever it models."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from isic_vq.models import modes


@dataclass
class Case:
    """A model in eval mode, what it takes, and the losses that reach all of it."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    loss: Callable[[PreTrainedModel], Tensor]
    wrong_input: Tensor
    error: str


def batches_of(case: Case) -> list[dict[str, Tensor]]:
    """The case's inputs for 2, 1 and 5 images."""

    def take(value: Tensor, size: int) -> Tensor:
        return value.repeat(3, *[1] * (value.ndim - 1))[:size]

    return [{name: take(value, size) for name, value in case.inputs.items()} for size in (2, 1, 5)]


def tokenizer_case(model: PreTrainedModel) -> Case:
    pixel_values = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Case(
        model,
        {"pixel_values": pixel_values},
        loss=lambda model: model(pixel_values).loss,
        wrong_input=torch.zeros(2, 3, 16, 12),
        error=r"pixel_values has shape \(2, 3, 16, 12\): expected \(batch, 3, side, side\)",
    )


def prior_case(model: PreTrainedModel) -> Case:
    codes = torch.randint(7, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 3])
    return Case(
        model,
        {"codes": codes, "class_ids": labels},
        loss=lambda model: model(codes, labels).loss,
        wrong_input=torch.zeros(2, 4, 5, dtype=torch.long),
        error=r"codes have shape \(2, 4, 5\): expected \(batch, 4, 4\)",
    )


def var_case(model: PreTrainedModel) -> Case:
    generator = torch.Generator().manual_seed(0)
    codes, context = (
        torch.randint(7, (2, 21), generator=generator),
        torch.randn(2, 20, 3, generator=generator),
    )
    labels = torch.tensor([1, 3])
    return Case(
        model,
        {"codes": codes, "class_ids": labels, "context": context},
        loss=lambda model: model(codes, labels, context).loss,
        wrong_input=torch.zeros(2, 20, dtype=torch.long),
        error=r"codes have shape \(2, 20\): expected \(batch, 21\)",
    )


def composite_case(model: PreTrainedModel) -> Case:
    return tokenizer_case(model)


KINDS = [
    "vqvae-ema",
    "vqvae-gradient",
    "vqvae-scales",
    "pixelcnn-gated",
    "pixelcnn-plain",
    "var",
    "composite",
    "composite-scales",
]


@pytest.fixture(params=KINDS)
def case(request, make_vqvae, make_prior, make_var, make_composite) -> Case:
    kind, _, variant = request.param.partition("-")
    if request.param == "vqvae-scales":
        return tokenizer_case(make_vqvae(scales=(1, 2, 4), num_phi=2))
    if kind == "var":
        return var_case(make_var())
    if kind == "vqvae":
        return tokenizer_case(make_vqvae(codebook_update=variant))
    if kind == "pixelcnn":
        return prior_case(make_prior(architecture=variant))
    return composite_case(make_composite(scales=variant == "scales"))


@pytest.fixture
def folder(case, tmp_path):
    case.model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def reload(case, folder, **settings: Any) -> tuple[PreTrainedModel, dict]:
    return type(case.model).from_pretrained(folder, output_loading_info=True, **settings)


# --- saving and loading --------------------------------------------------------------------------------------------


def test_reloaded_parameters_and_buffers_are_bit_equal(case, folder):
    loaded = reload(case, folder)[0].state_dict()
    saved = case.model.state_dict()
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), f"{name} changed on the way through the folder"


@torch.no_grad()
def test_reloaded_model_gives_bit_equal_outputs(case, folder):
    loaded = reload(case, folder)[0]
    assert not loaded.training
    for name, value in case.model(**case.inputs).items():
        assert torch.equal(loaded(**case.inputs)[name], value), name


def test_reloading_misses_no_tensor_and_finds_no_foreign_one(case, folder):
    info = reload(case, folder)[1]
    assert not any(info.values()), info


def test_config_survives_the_json_file(case, folder):
    config = case.model.config
    assert type(config).from_pretrained(folder).to_dict() == config.to_dict()


def test_config_survives_a_json_string(case):
    config = case.model.config
    assert type(config).from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_saving_twice_gives_the_same_bytes(case, folder, tmp_path):
    reload(case, folder)[0].save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_initialisation_fills_what_is_missing_and_touches_nothing_loaded(case, folder):
    missing = set()
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        name = next(
            name
            for name in tensors
            if name.endswith(("project.weight", "code_embedding.weight", "class_embedding.weight"))
        )
        del tensors[name]
        missing.add(name)
        save_file(tensors, path, metadata={"format": "pt"})
    loaded, info = reload(case, folder)
    assert set(info["missing_keys"]) == missing
    for name, tensor in case.model.state_dict().items():
        if name in missing:
            assert torch.isfinite(loaded.state_dict()[name]).all(), f"{name} was left uninitialised"
        else:
            assert torch.equal(loaded.state_dict()[name], tensor), (
                f"initialisation overwrote the loaded {name}"
            )


def test_bfloat16_keeps_the_codebook_in_float32(case, folder):
    loaded = reload(case, folder, dtype=torch.bfloat16)[0]
    for name, tensor in loaded.state_dict().items():
        if (
            name.endswith(("quantizer.codebook", "quantizer.cluster_size", "quantizer.code_sums"))
            or "quantizer.phi" in name
        ):
            assert tensor.dtype == torch.float32, f"{name}: distances in bfloat16 pick the wrong codes"
        elif name.endswith(("num_updates", "num_batches_tracked")):
            assert tensor.dtype == torch.int64, name
        else:
            assert tensor.dtype == torch.bfloat16, name


@torch.no_grad()
def test_bfloat16_runs_finite_and_near_float32(case, folder):
    loaded = reload(case, folder, dtype=torch.bfloat16)[0]
    output, expected = loaded(**case.inputs), case.model(**case.inputs)
    assert all(torch.isfinite(value).all() for value in output.values())
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_that_a_cpu_lacks_is_warned_of_once(make_composite, dtype, caplog):
    modes.warn_if_slow.cache_clear()
    model = make_composite().to(dtype)
    for _ in range(2):
        model.encode(model.generate(2, seed=0).pixel_values)
    supported = getattr(
        torch.ops.mkldnn, f"_is_mkldnn_{'fp' if dtype == torch.float16 else 'bf'}16_supported"
    )()
    assert caplog.text.count("dtype=torch.float32") == (not supported)


# --- calling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tuple_output_holds_the_values_of_the_named_one(case):
    named = case.model(**case.inputs)
    plain = case.model(**case.inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named)
    assert all(torch.equal(a, b) for a, b in zip(plain, named.values(), strict=True))


@torch.no_grad()
def test_the_config_and_the_call_say_what_is_returned(case):
    named, without = case.model(**case.inputs), case.model(**case.inputs, return_loss=False)
    assert "loss" not in without
    assert all(torch.equal(value, named[name]) for name, value in without.items())
    model = type(case.model)(
        type(case.model.config).from_dict({**case.model.config.to_dict(), "return_dict": False})
    )
    model.load_state_dict(case.model.state_dict())
    plain = model.eval()(**case.inputs)
    assert isinstance(plain, tuple)
    assert all(torch.equal(a, b) for a, b in zip(plain, named.values(), strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_exported_models_compute_what_eager_does_for_any_batch(case):
    batches = batches_of(case)
    dynamic = {name: {0: torch.export.Dim("batch")} for name in case.inputs}
    model = torch.export.export(case.model, (), batches[0], dynamic_shapes=dynamic).module()
    for inputs in batches:
        for name, value in case.model(**inputs).items():
            assert torch.equal(model(**inputs)[name], value), name


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", ["vqvae-ema", "pixelcnn-gated", "var"], indirect=True)
def test_compiled_models_compute_what_eager_does_for_any_batch(case):
    torch._dynamo.reset()
    model = torch.compile(case.model, fullgraph=True, backend="aot_eager", dynamic=True)
    for inputs in batches_of(case):
        for name, value in case.model(**inputs).items():
            assert torch.equal(model(**inputs)[name], value), name


def test_every_parameter_gets_a_gradient(case):
    case.loss(case.model).backward()
    idle = [
        name
        for name, parameter in case.model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not idle, f"no gradient reaches {idle}"


def test_same_seed_makes_the_same_new_model(case):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(type(case.model)(case.model.config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.isfinite(tensor).all() for tensor in states[0].values())


def test_wrong_shape_is_refused_in_words(case):
    with pytest.raises(ValueError, match=case.error):
        case.model(case.wrong_input)
