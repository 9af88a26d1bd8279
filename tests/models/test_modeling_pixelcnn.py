import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from isic_vq import PixelCNNConfig
from isic_vq.models.code_convolution import CodeConv2d
from isic_vq.models.modeling_pixelcnn import PixelCNNCausalConv2d, gate
from isic_vq.models.pixelcnn_cache import open_cache
from isic_vq.models.sampling import draw, exclude_unlikely, guided_logits

ARCHITECTURES = ["gated", "plain"]
GRID = 4
POSITIONS = GRID * GRID


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, make_prior):
    """Eval mode; not to be changed."""
    return make_prior(architecture=request.param)


def random_codes(count, model, seed=0):
    grid = model.config.grid_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.num_codes, (count, grid, grid), generator=generator)


def random_uniforms(count, positions=POSITIONS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, positions, generator=generator, dtype=torch.float64)


# --- causality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("first_kernel_size", [3, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_no_logit_depends_on_its_own_or_a_later_code(
    make_prior, architecture, first_kernel_size, kernel_size
):
    model = make_prior(
        architecture=architecture, first_kernel_size=first_kernel_size, kernel_size=kernel_size
    )
    labels = torch.arange(POSITIONS) % 4
    codes = random_codes(1, model).expand(POSITIONS, GRID, GRID)
    later = (
        torch.arange(POSITIONS)[None, :] >= torch.arange(POSITIONS)[:, None]
    )  # row t: position t and later
    altered = torch.where(
        later.view(-1, GRID, GRID), (codes + 1 + random_codes(POSITIONS, model) % 6) % 7, codes
    )
    assert (altered != codes)[later.view(-1, GRID, GRID)].all(), "premise: every one of them is altered"
    before = model(codes, labels).logits.flatten(2)
    after = model(altered, labels).logits.flatten(2)
    for t in range(POSITIONS):
        assert torch.equal(before[t, :, : t + 1], after[t, :, : t + 1]), (
            f"codes from {t} on changed logits up to {t}"
        )


def dependencies(model):
    """Boolean (positions, positions): does the logit at row p depend on the code at column q?"""
    model, grid = model.double(), model.config.grid_size
    codes = torch.randperm(grid * grid).view(
        1, grid, grid
    )  # each code once: its vector stands for its position
    logits = model(codes).logits.flatten(2)
    weights = torch.randn(logits.shape[1], dtype=torch.float64)
    vectors = model.code_embedding.weight
    rows = [
        torch.autograd.grad((logits[0, :, p] * weights).sum(), vectors, retain_graph=True)[0]
        for p in range(grid * grid)
    ]
    return torch.stack([row.abs().sum(-1)[codes.flatten()] > 0 for row in rows])


EARLIER = torch.ones(25, 25, dtype=torch.bool).tril(-1)


def test_gated_logits_depend_on_every_earlier_code(make_prior):
    wide = {"hidden_size": 12, "head_size": 32}  # no position where every ReLU of the head is shut
    seen = dependencies(make_prior(grid_size=5, num_codes=25, num_layers=5, **wide))
    blind = [divmod(int(i), 25) for i in (EARLIER & ~seen).flatten().nonzero()]
    assert not blind, f"blind spots (position, earlier position it cannot see): {blind}"
    assert torch.equal(seen, EARLIER)


def test_plain_logits_have_the_blind_spot_that_the_gated_net_removes(make_prior):
    seen = dependencies(make_prior(architecture="plain", grid_size=5, num_codes=25, num_layers=5))
    assert not (seen & ~EARLIER).any()
    last, row_above_right = 2 * 5 + 0, 1 * 5 + 4
    assert not seen[last, row_above_right], "a 3x3 masked stack cannot see far right in the row above"


def test_few_layers_see_only_their_receptive_field(make_prior):
    seen = dependencies(make_prior(grid_size=5, num_codes=25, num_layers=0))[2 * 5 + 2].view(5, 5)
    assert seen.long().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("kernel", "padding"), [((2, 5), (2, 2, 2, -1)), ((1, 3), (3, -1, 0, 0)), ((3, 3), (1, 1, 1, 1))]
)
def test_convolution_by_look_ups_is_the_convolution_of_the_embedding(kernel, padding):
    embedding, conv = nn.Embedding(6, 4).double(), nn.Conv2d(4, 3, kernel).double()
    codes = torch.randint(6, (2, 5, 7))
    expected = conv(F.pad(embedding(codes).permute(0, 3, 1, 2), padding))
    result = CodeConv2d.forward(conv, codes, embedding.weight, padding)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    inputs = [embedding.weight, conv.weight, conv.bias]
    weights = torch.randn_like(expected)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * weights).sum(), inputs) for x in (result, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


# --- layers --------------------------------------------------------------------------------------------------------

MASKS = {
    (3, False): [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
    (3, True): [[1, 1, 1], [1, 1, 0], [0, 0, 0]],
    (5, False): [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    (5, True): [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize(("kernel_size", "sees_itself"), MASKS)
@torch.no_grad()
def test_causal_convolution_is_the_full_convolution_with_the_mask(kernel_size, sees_itself):
    mask = torch.tensor(MASKS[kernel_size, sees_itself], dtype=torch.float64)
    weight = torch.randn(4, 3, kernel_size, kernel_size, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    reach = kernel_size // 2
    conv = PixelCNNCausalConv2d(3, 4, kernel_size, sees_itself).double()
    conv.above.weight.copy_(weight[:, :, :reach])
    conv.above.bias.copy_(bias)
    conv.left.weight.copy_(weight[:, :, reach : reach + 1, : reach + sees_itself])
    features = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = F.conv2d(features, weight * mask, bias, padding=reach)
    torch.testing.assert_close(conv(features), expected)


def test_gate_is_tanh_times_sigmoid():
    features = torch.tensor([0.5, -1.0, 0.0, 2.0]).view(1, 4, 1, 1)
    expected = [math.tanh(0.5) * 0.5, math.tanh(-1) / (1 + math.exp(-2))]
    assert gate(features).flatten().tolist() == pytest.approx(expected)


# --- likelihood ----------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_cross_entropy_in_nats(model):
    codes, labels = random_codes(3, model), torch.tensor([0, 3, 2])
    with torch.no_grad():
        output = model(codes, labels)
    logits = output.logits.double().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, codes.numpy()[:, None], axis=1)
    assert output.loss.item() == pytest.approx(-picked.mean(), rel=1e-6)
    targets = random_codes(3, model, seed=9)
    picked = output.logits.double().log_softmax(1).gather(1, targets[:, None])
    assert model(codes, labels, targets=targets).loss.item() == pytest.approx(-picked.mean().item(), rel=1e-6)


@torch.no_grad()
def test_a_prior_that_knows_nothing_pays_log_k(make_prior):
    model = make_prior()
    for parameter in model.head[-1].parameters():
        parameter.zero_()
    assert model(random_codes(2, model)).loss.item() == pytest.approx(math.log(7), rel=1e-6)


ALL_GRIDS = torch.tensor(list(itertools.product(range(3), repeat=9))).view(-1, 3, 3)


@torch.no_grad()
def probabilities_of_all_grids(model, label):
    """Probability of each of the 3^9 grids, from one forward pass over all of them."""
    log_probabilities = model(ALL_GRIDS, torch.full((len(ALL_GRIDS),), label)).logits.log_softmax(1)
    return log_probabilities.gather(1, ALL_GRIDS[:, None]).flatten(1).sum(1).exp()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def enumerable(request, make_prior):
    """A 3x3 prior over three codes, whose 19683 grids can be listed."""
    return make_prior(architecture=request.param, num_codes=3, grid_size=3, hidden_size=4).double()


def test_probabilities_of_all_grids_sum_to_one(enumerable):
    probabilities = probabilities_of_all_grids(enumerable, label=1)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    assert probabilities.max() > 10 / len(ALL_GRIDS), "premise: the prior is far from uniform"


def test_sampled_frequencies_agree_with_the_probabilities(enumerable):
    count, probabilities = 20_000, probabilities_of_all_grids(enumerable, label=1)
    samples = enumerable.sample(random_uniforms(count, 9), torch.full((count,), 1)).flatten(1)
    grids, pairs = ALL_GRIDS.flatten(1), list(itertools.combinations(range(9), 2))
    for first, second in pairs:  # the joint of every two positions: 9 cells each
        expected = (
            torch.zeros(9).double().index_add_(0, 3 * grids[:, first] + grids[:, second], probabilities)
        )
        seen = torch.bincount(3 * samples[:, first] + samples[:, second], minlength=9) / count
        allowed = (
            4.5 * (expected * (1 - expected) / count).sqrt() + 1.5 / count
        )  # one stray count is no error
        worst = ((seen - expected).abs() / allowed).max()
        assert worst < 1, f"positions {first} and {second}: frequencies {seen} for probabilities {expected}"


# --- sampling ------------------------------------------------------------------------------------------------------

SETTINGS = {
    "bare": {},
    "temperature and top_p": {"temperature": 0.7, "top_p": 0.8},
    "guidance": {"guidance_scale": 2.5},
    "guidance, temperature, top_k and top_p": {
        "guidance_scale": 1.7,
        "temperature": 1.3,
        "top_k": 4,
        "top_p": 0.9,
    },
}


@torch.no_grad()
def sample_by_full_passes(
    model, uniforms, labels, temperature=1.0, top_k=None, top_p=None, guidance_scale=1.0
):
    """The slow and obvious sampler: a pass of the whole network for every code."""
    grid = model.config.grid_size
    codes = torch.zeros(len(uniforms), grid, grid, dtype=torch.long)
    for position in range(grid * grid):
        row, column = divmod(position, grid)
        logits = model(codes, labels).logits[:, :, row, column].float()
        if guidance_scale != 1:
            unconditional = model(codes).logits[:, :, row, column].float()
            logits = guided_logits(logits, unconditional, guidance_scale)
        logits = exclude_unlikely(logits / temperature, top_k, top_p)
        codes[:, row, column] = draw(logits, uniforms[:, position])
    return codes


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kernels", [(3, 3), (5, 3), (3, 5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_sampling_equals_full_passes_draw_for_draw(make_prior, architecture, kernels, settings):
    first, later = kernels
    model = make_prior(architecture=architecture, first_kernel_size=first, kernel_size=later).double()
    uniforms, labels = random_uniforms(6), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = sample_by_full_passes(model, uniforms, labels, **settings)
    assert torch.equal(model.sample(uniforms, labels, **settings), expected)
    assert len(expected.unique()) > 2, "premise: the samples are not all alike"


@torch.inference_mode()
def test_cached_logits_are_those_of_the_full_pass(model):
    codes, labels = random_codes(4, model), torch.tensor([0, 1, 2, 3])
    cache = open_cache(model, labels)
    expected = model(codes, labels).logits
    for row in range(GRID):
        cache.start_row(row)
        for column in range(GRID):
            torch.testing.assert_close(
                cache.logits(column), expected[:, :, row, column], atol=1e-5, rtol=1e-5
            )
            cache.put(column, codes[:, row, column])


def test_a_sample_depends_on_its_own_noise_alone(model):
    uniforms = random_uniforms(5)
    alone = [model.sample(row[None]) for row in uniforms]
    assert torch.equal(model.sample(uniforms), torch.cat(alone))


def test_zero_temperature_limit_takes_the_most_likely_code(model):
    greedy = model.sample(random_uniforms(2), top_k=1)
    assert torch.equal(greedy[0], greedy[1]), "with one code left the noise has nothing to choose"
    with torch.no_grad():
        assert torch.equal(model(greedy).logits.argmax(1), greedy)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_runs_in_eval_mode_and_restores_the_mode(make_prior, training):
    model = make_prior(architecture="plain", dropout=0.5)
    expected = model.sample(random_uniforms(4))
    running = model.layers[0].norm.running_mean.clone()
    assert torch.equal(model.train(training).sample(random_uniforms(4)), expected)
    assert model.training is training
    assert torch.equal(model.layers[0].norm.running_mean, running)


def test_on_row_is_called_once_per_row(model):
    rows = []
    model.sample(random_uniforms(2), on_step=lambda: rows.append(1))
    assert len(rows) == GRID


# --- classes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_labels_change_the_logits(model):
    codes = random_codes(1, model).expand(4, GRID, GRID)
    logits = model(codes, torch.arange(4)).logits
    assert all(not torch.allclose(logits[i], logits[j]) for i, j in itertools.combinations(range(4), 2))


@torch.no_grad()
def test_no_label_is_the_unconditional_id(model):
    codes = random_codes(2, model)
    assert torch.equal(model(codes).logits, model(codes, torch.full((2,), 3)).logits)


@torch.no_grad()
def share_of_dropped_labels(model):
    codes = random_codes(1, model).expand(400, GRID, GRID)
    unconditional = model(codes[:1]).logits
    logits = model(codes, torch.zeros(400, dtype=torch.long)).logits
    return (logits - unconditional).flatten(1).abs().max(1).values.lt(1e-6).double().mean().item()


def test_train_mode_drops_labels_at_the_stated_rate(make_prior):
    model = make_prior(class_dropout=0.25).train()  # no dropout, no BatchNorm: nothing else differs from eval
    unconditional_in_eval = share_of_dropped_labels(model)
    assert 0.25 - 5 * 0.022 < unconditional_in_eval < 0.25 + 5 * 0.022  # 5 standard errors of 400 draws


def test_eval_mode_drops_no_label(make_prior):
    assert share_of_dropped_labels(make_prior(class_dropout=0.9)) == 0


@torch.no_grad()
def test_eval_mode_is_deterministic_and_train_mode_is_not(make_prior):
    model = make_prior(dropout=0.5)
    codes = random_codes(2, model)
    assert torch.equal(model(codes).logits, model(codes).logits)
    model.train()
    assert not torch.equal(model(codes).logits, model(codes).logits)


@torch.no_grad()
def test_new_prior_treats_every_class_as_no_class():
    from isic_vq import PixelCNNModel

    config = PixelCNNConfig(num_codes=5, grid_size=4, hidden_size=4, num_layers=1, id2label={0: "a", 1: "b"})
    model = PixelCNNModel(config).eval()
    codes = random_codes(1, model).expand(3, GRID, GRID)
    logits = model(codes, torch.arange(3)).logits
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prior_without_classes_works_without_labels(make_prior, architecture):
    model = make_prior(architecture=architecture, id2label={})
    assert model.config.unconditional_id == 0
    codes = model.sample(random_uniforms(2))
    assert torch.isfinite(model(codes).loss)
    assert torch.equal(model(codes).logits, model(codes, torch.zeros(2, dtype=torch.long)).logits)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 5), (1, 3, 3), (1, 1, 4, 4)])
def test_codes_of_another_grid_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"codes have shape .*: expected \(batch, 4, 4\)"):
        model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("labels", [[4, 0], [-1, 0]])
def test_labels_the_model_does_not_have_are_refused(model, labels):
    with pytest.raises(ValueError, match="expected class ids below 3, or 3 for unconditional"):
        model(random_codes(2, model), torch.tensor(labels))


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [[0, 1]]])
def test_labels_must_be_one_per_image(model, labels):
    with pytest.raises(ValueError, match=r"labels have shape .*: expected \(2,\), one per image"):
        model(random_codes(2, model), torch.tensor(labels))


def test_a_label_for_a_prior_without_classes_is_refused(make_prior):
    model = make_prior(id2label={})
    with pytest.raises(ValueError, match="expected class ids below 0, or 0 for unconditional"):
        model(random_codes(1, model), torch.tensor([1]))


def test_uniforms_of_another_grid_are_refused(model):
    with pytest.raises(ValueError, match=r"uniforms have shape \(2, 9\): expected \(batch, 16\)"):
        model.sample(torch.rand(2, 9))


def test_sampling_settings_are_checked(model):
    with pytest.raises(ValueError, match="temperature is 0: expected more than 0"):
        model.sample(random_uniforms(1), temperature=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"architecture": "snail"}, "architecture is 'snail': expected 'gated' or 'plain'"),
        ({"kernel_size": 4}, "kernel_size is 4: expected an odd number of at least 3"),
        ({"first_kernel_size": 1}, "first_kernel_size is 1: expected an odd number"),
        ({"num_layers": -1}, "must be positive"),
        ({"dropout": 1.0}, r"dropout is 1.0: expected a probability in \[0, 1\)"),
        ({"class_dropout": -0.1}, "class_dropout is -0.1"),
        # With these ids len(id2label) = 2 would be both "nevus" and "no class".
        ({"id2label": {1: "melanoma", 2: "nevus"}}, r"id2label has the ids \[1, 2\]: expected 0, 1, 2"),
        ({"id2label": {"0": "melanoma", "2": "nevus"}}, r"id2label has the ids \[0, 2\]"),
        ({"id2label": {0: "nevus", 1: "nevus"}}, r"id2label names \['nevus'\] more than once"),
    ],
)
def test_settings_that_make_no_prior_are_refused(settings, text):
    with pytest.raises(StrictDataclassError, match=text):
        PixelCNNConfig(**settings)
