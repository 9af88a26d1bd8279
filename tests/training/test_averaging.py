"""Averaged parameters follow their formula, come and go without a trace, and survive a checkpoint."""

import numpy as np
import pytest
import torch
from torch import nn

from isic_vq.training.averaging import AveragedParameters


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[2].bias.requires_grad_(False)
    return model


def walk(model, seed):
    """Move every parameter, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_five_updates_equal_the_formula_in_numpy(model, decay):
    averaged = AveragedParameters(model, decay)
    expected = {name: value.double().numpy() for name, value in values(model).items()}
    for step in range(1, 6):
        walk(model, step)
        averaged.update(model)
        warm = min(decay, (1 + step) / (10 + step))
        for name, value in values(model).items():
            expected[name] = warm * expected[name] + (1 - warm) * value.double().numpy()
    assert set(averaged.shadow) == set(expected) - {"2.bias"}, "a frozen parameter is not followed"
    for name, shadow in averaged.shadow.items():
        np.testing.assert_allclose(shadow.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_decay_warms_up_to_its_limit():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averaged = AveragedParameters(model, 0.9)
    nn.init.ones_(model.weight)
    averaged.update(model)
    assert averaged.shadow["weight"].item() == pytest.approx(1 - 2 / 11), "the first decay is 2/11, not 0.9"
    averaged.num_updates = 1000
    before = averaged.shadow["weight"].item()
    averaged.update(model)
    assert averaged.shadow["weight"].item() == pytest.approx(0.9 * before + 0.1)


def test_a_trained_models_parameters_count_from_the_first_step():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averaged = AveragedParameters(model, 0.9, warms_up=False)
    nn.init.ones_(model.weight)
    averaged.update(model)
    assert averaged.shadow["weight"].item() == pytest.approx(0.1), "nine tenths are what it began with"


def test_buffers_are_left_out(model):
    assert not any("running" in name for name in AveragedParameters(model, 0.9).shadow)


def test_swapped_in_shows_the_average_and_restores_the_raw_parameters(model):
    averaged = AveragedParameters(model, 0.9)
    walk(model, 1)
    averaged.update(model)
    raw, shadow = values(model), {name: value.clone() for name, value in averaged.shadow.items()}
    with averaged.swapped_in(model):
        for name, value in shadow.items():
            assert torch.equal(values(model)[name], value), name
    for name, value in raw.items():
        assert torch.equal(values(model)[name], value), name
    for name, value in shadow.items():
        assert torch.equal(averaged.shadow[name], value), f"{name}: the average must survive the swap, too"


def test_swapped_in_restores_after_an_error(model):
    averaged = AveragedParameters(model, 0.9)
    walk(model, 1)
    raw = values(model)
    with pytest.raises(RuntimeError, match="validation broke"), averaged.swapped_in(model):
        raise RuntimeError("validation broke")
    for name, value in raw.items():
        assert torch.equal(values(model)[name], value), name


def test_copy_to_overwrites_trainable_parameters_only(model):
    averaged = AveragedParameters(model, 0.9)
    start = values(model)
    walk(model, 1)
    walked = values(model)
    averaged.copy_to(model)
    for name, value in values(model).items():
        assert torch.equal(value, walked[name] if name == "2.bias" else start[name]), name


def test_the_average_is_its_own_memory(model):
    averaged = AveragedParameters(model, 0.9)
    before = averaged.shadow["0.weight"].clone()
    walk(model, 1)
    assert torch.equal(averaged.shadow["0.weight"], before), (
        "a view of the parameters would follow them at once"
    )


def test_state_round_trip_continues_bit_for_bit(model):
    first = AveragedParameters(model, 0.9)
    walk(model, 1)
    first.update(model)
    second = AveragedParameters(model, 0.9)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert second.num_updates == first.num_updates == 1
    walk(model, 2)
    first.update(model)
    second.update(model)
    for name, value in first.shadow.items():
        assert torch.equal(second.shadow[name], value), name


def test_state_of_another_model_is_refused(model):
    state = AveragedParameters(model, 0.9).state_dict()
    del state["0.weight"]
    with pytest.raises(KeyError, match=r"0\.weight"):
        AveragedParameters(model, 0.9).load_state_dict(state)
