import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isic_vq.models.vector_quantizer import (
    CHUNK,
    GROUP,
    VQVAEVectorQuantizer,
    assignment_sums,
    kmeans,
    nearest_codes,
    row_argmin,
    usage_and_perplexity,
)

CODEBOOK = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [2.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, -3.0],
    ]
)
# Latents, and the code of each with the squared distances to the four vectors that make it so.
LATENTS = torch.tensor(
    [
        [0.1, 0.0, 0.0, 0.0, 0.0],  # 0.01, 4.81, 3.61, 9.01
        [0.9, 1.0, 1.2, 1.0, 0.8],  # 4.89, 0.09, ...
        [5.0, 0.0, 0.0, 0.0, 0.0],  # 25, 20, 9, 34
        [0.0, 0.0, 0.0, 0.0, -1.6],  # 2.56, 10.76, 6.56, 1.96
        [0.0, 0.0, 0.0, 0.0, -1.4],  # 1.96, 9.76, 5.96, 2.56
        [1.0, 0.0, 0.0, 0.0, 0.0],  # 1, 4, 1, 10: a tie
    ]
)
IDS = [0, 1, 2, 3, 0, 0]

sizes = {"num_codes": st.integers(1, 7), "dim": st.integers(1, 7), "seed": st.integers(0, 2**32 - 1)}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def brute_force(latents, codebook):
    differences = latents.double().numpy()[:, None] - codebook.double().numpy()[None]
    return np.square(differences).sum(-1).argmin(1)


def make_quantizer(num_codes=4, code_dim=5, update="ema", decay=0.9, epsilon=1e-5, dead_code_threshold=0.0):
    quantizer = VQVAEVectorQuantizer(
        num_codes,
        code_dim,
        update=update,
        decay=decay,
        epsilon=epsilon,
        dead_code_threshold=dead_code_threshold,
    )
    with torch.no_grad():
        codebook = CODEBOOK if (num_codes, code_dim) == CODEBOOK.shape else normal(num_codes, code_dim)
        quantizer.start_from(codebook, torch.ones(num_codes))
    return quantizer


def as_grid(latents):
    """Latents (N, D) as one image (1, D, 1, N)."""
    return latents.t()[None, :, None, :].contiguous()


def state_of(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


# --- nearest code --------------------------------------------------------------------------------------------------


def test_hand_written_latents_get_their_ids_and_ties_the_lowest():
    assert nearest_codes(LATENTS, CODEBOOK).tolist() == IDS


@settings(max_examples=20, deadline=None)
@given(num_latents=st.integers(0, 20), **sizes)
def test_nearest_is_brute_force(num_latents, num_codes, dim, seed):
    latents, codebook = normal(num_latents, dim, seed=seed), normal(num_codes, dim, seed=seed + 1)
    np.testing.assert_array_equal(nearest_codes(latents, codebook).numpy(), brute_force(latents, codebook))


def test_nearest_is_brute_force_across_chunks():
    latents, codebook = normal(2 * CHUNK + 3, 3), normal(5, 3, seed=1)
    codes = nearest_codes(latents, codebook)
    assert len(codes) == 2 * CHUNK + 3
    np.testing.assert_array_equal(codes.numpy(), brute_force(latents, codebook))


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(0, 9),
    num_columns=st.one_of(st.integers(1, 3 * GROUP), st.sampled_from([GROUP, 4 * GROUP])),
    levels=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_row_argmin_is_the_first_of_the_least(num_rows, num_columns, levels, seed):
    scores = np.random.default_rng(seed).integers(
        levels, size=(num_rows, num_columns)
    )  # ties within, across groups
    assert row_argmin(torch.from_numpy(scores)).tolist() == scores.argmin(1).tolist()


def test_ties_of_a_large_codebook_go_to_the_lowest_code():
    distinct = torch.arange(GROUP, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, -2.0, 3.0]
    )  # no rounding
    codebook = distinct.repeat(4, 1)  # every vector four times, in four groups
    assert nearest_codes(codebook, codebook).tolist() == list(range(GROUP)) * 4


def test_nearest_codes_of_tracked_tensors_carry_no_graph():
    latents, codebook = normal(4, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    assert not nearest_codes(latents, codebook).requires_grad


def test_no_latents_give_no_codes():
    codes = nearest_codes(torch.zeros(0, 5), CODEBOOK)
    assert codes.shape == (0,)
    assert codes.dtype == torch.long


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_a_codebook_vector_gets_its_own_index(num_codes, dim, seed):
    codebook = normal(num_codes, dim, seed=seed, dtype=torch.float32)
    assert nearest_codes(codebook, codebook).tolist() == list(range(num_codes))


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_permuting_the_codebook_permutes_the_codes(num_codes, dim, seed):
    latents, codebook = normal(12, dim, seed=seed), normal(num_codes, dim, seed=seed + 1)
    permutation = torch.from_numpy(np.random.default_rng(seed).permutation(num_codes))
    permuted = nearest_codes(latents, codebook[permutation])
    assert torch.equal(permutation[permuted], nearest_codes(latents, codebook))


# --- the layer -----------------------------------------------------------------------------------------------------


def test_codes_and_vectors_keep_their_place_on_the_grid():
    quantizer = make_quantizer().eval()
    latents = LATENTS.view(1, 2, 3, 5).permute(0, 3, 1, 2)
    output = quantizer(latents)
    assert output.codes.tolist() == [[IDS[:3], IDS[3:]]]
    for row in range(2):
        for column in range(3):
            expected = CODEBOOK[IDS[3 * row + column]]
            torch.testing.assert_close(output.quantized[0, :, row, column], expected, atol=1e-6, rtol=0)


def test_lookup_of_the_codes_is_the_quantized_grid():
    quantizer = make_quantizer(6, 3).eval()
    output = quantizer(normal(2, 3, 4, 4, dtype=torch.float32))
    torch.testing.assert_close(quantizer.lookup(output.codes), output.quantized, atol=1e-6, rtol=0)


def test_losses_are_the_mean_squared_distance_to_the_chosen_vectors():
    output = make_quantizer().eval()(as_grid(LATENTS))
    expected = np.square(LATENTS.numpy() - CODEBOOK.numpy()[IDS]).mean()  # over N and D
    assert output.commitment_loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.codebook_loss.item() == pytest.approx(expected, rel=1e-6)


def test_moving_average_codebook_gets_its_loss_without_a_gradient():
    output = make_quantizer(update="ema")(as_grid(LATENTS).requires_grad_())
    assert output.codebook_loss.item() == output.commitment_loss.item()
    assert output.commitment_loss.requires_grad
    assert not output.codebook_loss.requires_grad, "adding it to a loss would double the commitment"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_memory_format_of_the_latents_is_kept_and_changes_nothing(memory_format, update):
    latents = normal(2, 5, 3, 4, dtype=torch.float32)
    expected = make_quantizer(update=update).eval()(latents)
    output = make_quantizer(update=update).eval()(latents.contiguous(memory_format=memory_format))
    assert output.quantized.is_contiguous(memory_format=memory_format), "the decoder would change its format"
    assert torch.equal(output.quantized, expected.quantized)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.commitment_loss, expected.commitment_loss)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_both_gradients_add_up_in_the_latents(memory_format):
    quantizer = make_quantizer().eval()
    latents = normal(2, 5, 3, 4, dtype=torch.float32).contiguous(memory_format=memory_format).requires_grad_()
    incoming = normal(2, 5, 3, 4, seed=1, dtype=torch.float32)
    output = quantizer(latents)
    torch.autograd.backward((output.quantized, output.commitment_loss), (incoming, torch.tensor(3.0)))
    vectors = CODEBOOK[output.codes].permute(0, 3, 1, 2)
    expected = incoming + 3 * 2 * (latents.detach() - vectors) / latents.numel()
    torch.testing.assert_close(latents.grad, expected)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_straight_through_gradient_is_the_identity(num_codes, dim, seed):
    quantizer = make_quantizer(num_codes, dim).eval()
    latents = normal(2, dim, 3, 3, seed=seed, dtype=torch.float32).requires_grad_()
    incoming = normal(2, dim, 3, 3, seed=seed + 1, dtype=torch.float32)
    (arrived,) = torch.autograd.grad(quantizer(latents).quantized, latents, incoming)
    assert torch.equal(arrived, incoming), "the quantizer changed the decoder's gradient on its way through"


def gradients_of(loss_name):
    """Gradient of one loss with respect to latents (N, D) and codebook (K, D)."""
    quantizer = make_quantizer(update="gradient").eval()
    grid = as_grid(LATENTS).requires_grad_()
    loss = getattr(quantizer(grid), loss_name)
    to_latents, to_codebook = torch.autograd.grad(loss, [grid, quantizer.codebook], allow_unused=True)
    return None if to_latents is None else to_latents[0, :, 0].t(), to_codebook


def test_commitment_loss_pulls_latents_and_leaves_the_codebook():
    to_latents, to_codebook = gradients_of("commitment_loss")
    assert to_codebook is None, "beta must weigh ||z - sg(e)||^2: this term moves the encoder alone"
    expected = 2 * (LATENTS - CODEBOOK[IDS]) / LATENTS.numel()
    torch.testing.assert_close(to_latents, expected)


def test_codebook_loss_pulls_the_codebook_and_leaves_latents():
    to_latents, to_codebook = gradients_of("codebook_loss")
    assert to_latents is None, "||sg(z) - e||^2 must not reach the encoder"
    expected = np.zeros(CODEBOOK.shape)
    for latent, code in zip(LATENTS.numpy(), IDS, strict=True):
        expected[code] += 2 * (CODEBOOK.numpy()[code] - latent) / LATENTS.numel()
    np.testing.assert_allclose(to_codebook.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_moving_average_codebook_is_no_parameter():
    assert not list(make_quantizer(update="ema").parameters())
    assert [name for name, _ in make_quantizer(update="gradient").named_parameters()] == ["codebook"]


def test_quantizes_in_float32_under_bfloat16_autocast():
    near = torch.tensor([[1.0], [1.003]])
    assert torch.equal(near[1].bfloat16(), near[0].bfloat16()), "premise: bfloat16 cannot tell the two apart"
    quantizer = make_quantizer(2, 1).eval()
    quantizer.start_from(near, torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(torch.full((1, 1, 1, 1), 1.003))
    assert output.codes.item() == 1
    assert output.quantized.dtype == output.commitment_loss.dtype == torch.float32


def test_bfloat16_latents_come_back_in_the_codebooks_precision():
    output = make_quantizer().eval()(as_grid(LATENTS).bfloat16())
    assert output.quantized.dtype == torch.float32


# --- learning ------------------------------------------------------------------------------------------------------


def test_moving_averages_equal_a_numpy_recomputation_over_three_steps():
    decay, epsilon = 0.7, 0.05
    quantizer = make_quantizer(decay=decay, epsilon=epsilon).double().train()
    codebook = CODEBOOK.double().numpy().copy()
    sizes, sums = np.ones(4), codebook.copy()
    for step in range(3):
        latents = normal(9, 5, seed=step)
        quantizer(as_grid(latents))
        codes = brute_force(latents, torch.from_numpy(codebook))
        counts = np.bincount(codes, minlength=4)
        batch_sums = np.stack([latents.numpy()[codes == code].sum(0) for code in range(4)])
        sizes = decay * sizes + (1 - decay) * counts
        sums = decay * sums + (1 - decay) * batch_sums
        smoothed = (sizes + epsilon) / (sizes.sum() + 4 * epsilon) * sizes.sum()
        codebook = sums / smoothed[:, None]
        np.testing.assert_allclose(quantizer.cluster_size.numpy(), sizes, rtol=1e-12)
        np.testing.assert_allclose(quantizer.code_sums.numpy(), sums, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(quantizer.codebook.numpy(), codebook, rtol=1e-12, atol=1e-14)
    assert quantizer.num_updates.item() == 3


def test_each_pass_in_train_mode_moves_the_codebook():
    quantizer = make_quantizer().train()
    for step in range(3):
        before = quantizer.codebook.clone()
        quantizer(as_grid(normal(9, 5, seed=step, dtype=torch.float32)))
        assert not torch.equal(quantizer.codebook, before), f"pass {step} taught the codebook nothing"


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_eval_mode_leaves_every_statistic_unchanged(update):
    quantizer = make_quantizer(update=update, dead_code_threshold=1e9).eval()
    before = state_of(quantizer)
    quantizer(as_grid(LATENTS))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"eval mode changed {name}"


def test_gradient_codebook_waits_for_the_optimizer():
    quantizer = make_quantizer(update="gradient").train()
    before = quantizer.codebook.detach().clone()
    quantizer(as_grid(LATENTS))
    assert torch.equal(quantizer.codebook, before)
    assert not torch.equal(quantizer.cluster_size, torch.ones(4)), "usage is counted all the same"


FAR = 100.0


def make_quantizer_with_a_dead_code(threshold=0.4, update="ema"):
    """Code 2 is far from everything; with decay 0.5 its count falls to 0.5 after one pass."""
    quantizer = make_quantizer(3, 2, decay=0.5, dead_code_threshold=threshold, update=update)
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0], [FAR, FAR]])
    quantizer.start_from(codebook, torch.tensor([1.0, 1.0, 0.5]))
    return quantizer.train()


def batch_around_two_codes(count=40, seed=0):
    latents = normal(count, 2, seed=seed, dtype=torch.float32)
    latents[::2] += 4
    return latents


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_code_moves_onto_a_latent_of_the_batch(update):
    quantizer, latents = make_quantizer_with_a_dead_code(update=update), batch_around_two_codes()
    quantizer(as_grid(latents))
    assert (latents == quantizer.codebook[2].detach()).all(1).any(), "the dead code lies on no latent"


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_code_restarts_with_count_and_sum_of_the_threshold(update):
    quantizer = make_quantizer_with_a_dead_code(update=update)
    quantizer(as_grid(batch_around_two_codes()))
    assert quantizer.cluster_size[2].item() == pytest.approx(0.4)
    expected = quantizer.codebook[2].detach() * quantizer.cluster_size[2]
    torch.testing.assert_close(
        quantizer.code_sums[2], expected, msg="the next average would throw the code back to where it died"
    )


def test_moved_code_is_used_by_the_next_pass_and_stays_near():
    quantizer, latents = make_quantizer_with_a_dead_code(), batch_around_two_codes()
    quantizer(as_grid(latents))
    assert (quantizer(as_grid(latents)).codes == 2).any(), "the moved code attracts no latent"
    assert quantizer.codebook[2].abs().max() < FAR / 10


def test_living_codes_do_not_feel_the_reset():
    with_reset, without = make_quantizer_with_a_dead_code(), make_quantizer_with_a_dead_code(threshold=0.0)
    latents = batch_around_two_codes()
    with_reset(as_grid(latents))
    without(as_grid(latents))
    for name in ("codebook", "cluster_size", "code_sums"):
        assert torch.equal(getattr(with_reset, name)[:2], getattr(without, name)[:2]), name


def test_threshold_zero_moves_nothing():
    quantizer = make_quantizer_with_a_dead_code(threshold=0.0)
    for seed in range(5):
        quantizer(as_grid(batch_around_two_codes(seed=seed)))
    assert quantizer.codebook[2].min() > FAR / 2


def test_reset_draw_does_not_depend_on_the_global_seed():
    moved = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        quantizer = make_quantizer_with_a_dead_code()
        quantizer(as_grid(batch_around_two_codes()))
        moved.append(quantizer.codebook[2])
    assert torch.equal(*moved), "a resumed run, whose global state differs, would go elsewhere"


def test_reset_draw_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make_quantizer_with_a_dead_code()(as_grid(batch_around_two_codes()))
    assert torch.equal(torch.get_rng_state(), before)


def test_reset_draw_differs_from_update_to_update():
    moved = []
    for updates in range(6):
        quantizer = make_quantizer_with_a_dead_code()
        quantizer.num_updates.fill_(updates)
        quantizer(as_grid(batch_around_two_codes()))
        moved.append(tuple(quantizer.codebook[2].tolist()))
    assert len(set(moved)) > 3, "the same latent is picked at every update"


# --- learning by the step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_deferred_passes_are_noted_and_teach_nothing_yet(update):
    quantizer = make_quantizer(update=update, dead_code_threshold=1e9).train()
    quantizer.defer()
    before = state_of(quantizer)
    passes = [normal(9, 5, seed=seed, dtype=torch.float32) for seed in (0, 1)]
    codes = [quantizer(as_grid(latents)).codes.flatten() for latents in passes]
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"a deferred pass changed {name}"
    noted = quantizer.take_deferred()
    for latents, ids, (noted_latents, noted_ids) in zip(passes, codes, noted, strict=True):
        assert torch.equal(noted_latents, latents)
        assert torch.equal(noted_ids, ids)
        assert not noted_latents.requires_grad
    assert quantizer.take_deferred() == [], "handed over once"


def test_deferred_passes_keep_no_graph_alive():
    quantizer = make_quantizer().train()
    quantizer.defer()
    quantizer(as_grid(normal(9, 5, dtype=torch.float32)).requires_grad_())
    ((latents, _),) = quantizer.take_deferred()
    assert latents.grad_fn is None, "the encoder's activations would stay in memory until the update"


def test_eval_mode_notes_nothing():
    quantizer = make_quantizer()
    quantizer.defer()
    quantizer.eval()(as_grid(LATENTS))
    assert quantizer.take_deferred() == []


def test_update_with_the_sums_of_a_pass_is_what_the_pass_teaches():
    by_pass, by_update = make_quantizer_with_a_dead_code(), make_quantizer_with_a_dead_code()
    latents = batch_around_two_codes()
    codes = nearest_codes(latents, by_update.codebook)
    by_pass(as_grid(latents))
    by_update.update(*assignment_sums(latents, codes, 3), lambda rows: latents[rows])
    for name, tensor in by_pass.state_dict().items():
        assert torch.equal(tensor, by_update.state_dict()[name]), name


def test_update_asks_for_latents_only_when_a_code_is_dead():
    quantizer = make_quantizer_with_a_dead_code(threshold=0.0)
    latents = batch_around_two_codes()
    codes = nearest_codes(latents, quantizer.codebook)
    quantizer.update(
        *assignment_sums(latents, codes, 3), lambda rows: pytest.fail("a collective for nothing")
    )


def test_deferral_is_not_saved():
    quantizer = make_quantizer()
    names = set(quantizer.state_dict())
    quantizer.defer()
    quantizer.train()(as_grid(LATENTS))
    assert set(quantizer.state_dict()) == names


def test_start_from_sets_codebook_counts_and_sums():
    quantizer = make_quantizer()
    counts = torch.tensor([1.0, 2.0, 3.0, 4.0])
    quantizer.start_from(CODEBOOK + 1, counts)
    assert torch.equal(quantizer.codebook, CODEBOOK + 1)
    assert torch.equal(quantizer.cluster_size, counts)
    assert torch.equal(quantizer.code_sums, (CODEBOOK + 1) * counts[:, None])


def test_started_codebook_stays_where_it_is_if_the_batch_agrees_with_it():
    quantizer = make_quantizer(epsilon=1e-9).train()
    quantizer.start_from(CODEBOOK, torch.full((4,), 3.0))
    quantizer(as_grid(CODEBOOK.repeat(3, 1)))
    torch.testing.assert_close(quantizer.codebook, CODEBOOK, atol=1e-6, rtol=1e-6)


# --- k-means -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_kmeans_recovers_two_separated_clusters_from_any_start(seed):
    noise = normal(20, 3, seed=seed)
    centres = torch.tensor([[0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0]], dtype=torch.float64)
    latents = noise + centres.repeat_interleave(10, 0)
    centroids = kmeans(latents, 2, torch.Generator().manual_seed(seed))
    expected = torch.stack([latents[:10].mean(0), latents[10:].mean(0)])
    torch.testing.assert_close(centroids[centroids[:, 0].argsort()], expected)


def test_more_iterations_of_kmeans_never_raise_the_error():
    latents = normal(200, 2)
    errors = []
    for iterations in range(6):
        centroids = kmeans(latents, 8, torch.Generator().manual_seed(0), iterations)
        nearest = centroids[nearest_codes(latents, centroids)]
        errors.append((latents - nearest).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_kmeans_of_one_latent_per_code_returns_the_latents():
    latents = normal(5, 3)
    centroids = kmeans(latents, 5, torch.Generator().manual_seed(0))
    assert nearest_codes(latents, centroids).sort().values.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(centroids.sort(0).values, latents.sort(0).values)


def test_kmeans_depends_on_its_generator_alone():
    latents = normal(50, 3)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(kmeans(latents, 4, torch.Generator().manual_seed(0)))
    assert torch.equal(*runs)


def test_kmeans_with_duplicate_latents_stays_finite():
    centroids = kmeans(torch.ones(6, 2), 4, torch.Generator().manual_seed(0))
    assert torch.equal(centroids, torch.ones(4, 2)), "an empty cluster must restart at a latent, not at 0/0"


def test_kmeans_refuses_fewer_latents_than_codes():
    with pytest.raises(ValueError, match="at least 4 latents, one per code, but got 3.*lower num_codes"):
        kmeans(torch.zeros(3, 2), 4, torch.Generator())


# --- counting ------------------------------------------------------------------------------------------------------


def test_assignment_sums_by_hand():
    latents = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    counts, sums = assignment_sums(latents, torch.tensor([2, 0, 2]), 4)
    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[10, 20], [0, 0], [101, 202], [0, 0]]


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity"),
    [
        ([5, 0, 0, 0], 0.25, 1.0),
        ([2, 2, 0, 0], 0.5, 2.0),
        ([1, 1, 1, 1], 1.0, 4.0),
        ([3, 1, 0, 0], 0.5, 4 / 3**0.75),  # exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4)
    ],
)
def test_usage_and_perplexity_by_hand(counts, usage, perplexity):
    assert usage_and_perplexity(torch.tensor(counts)) == pytest.approx((usage, perplexity), rel=1e-12)


def test_usage_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no code was counted: expected at least one image"):
        usage_and_perplexity(torch.zeros(4))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 2, 2, 5), (5, 2, 2), (6, 5)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"latents have shape .*: expected \(batch, 5, height, width\)"):
        make_quantizer()(torch.zeros(shape))


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_outside_the_codebook_are_refused(code):
    with pytest.raises(ValueError, match=r"expected \[0, 4\); they come from another tokenizer"):
        make_quantizer().lookup(torch.tensor([[[0, code]]]))
