"""Residual quantization over scales against sums written out, and what each scale adds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import stirred

from isic_vq import VQVAEConfig, VQVAEModel
from isic_vq.models.residual_quantizer import PHI_SHARE, VQVAEResidualQuantizer
from isic_vq.models.vector_quantizer import VQVAEVectorQuantizer, nearest_codes

CODEBOOK = torch.tensor([[0.0], [1.0], [-1.0], [0.25]])


def toy(scales=(1, 2), num_phi=1, codebook=CODEBOOK, update="ema", threshold=0.0):
    """A quantizer whose convolutions are the identity until a test changes them."""
    quantizer = VQVAEResidualQuantizer(
        scales,
        num_phi,
        len(codebook),
        codebook.shape[1],
        update=update,
        decay=0.9,
        epsilon=1e-5,
        dead_code_threshold=threshold,
    )
    quantizer.start_from(codebook, torch.ones(len(codebook)))
    for phi in quantizer.phi:
        torch.nn.init.dirac_(phi.weight)
        torch.nn.init.zeros_(phi.bias)
    quantizer.num_updates.zero_()
    return quantizer.eval()


def test_two_scales_by_hand():
    """Mean 0.9 takes the code of 1; what is missing, -0.2, 0.3, -0.8 and 0.3, takes those of 0, 0.25, -1 and 0.25."""
    latents = torch.tensor([[[[0.8, 1.3], [0.2, 1.3]]]])
    quantizer = toy()
    result = quantizer(latents)
    assert result.codes.tolist() == [[1, 0, 3, 2, 3]]
    assert result.quantized.flatten().tolist() == pytest.approx([1.0, 1.25, 0.0, 1.25])
    first = np.mean(np.square([0.2, 0.3, 0.8, 0.3]))
    both = np.mean(np.square([0.2, 0.05, 0.2, 0.05]))
    assert result.commitment_loss.item() == pytest.approx((first + both) / 2)
    assert result.codebook_loss.item() == pytest.approx((first + both) / 2)
    coarse = quantizer.lookup(result.codes[:, :1])
    assert coarse.tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]
    assert quantizer.context(result.codes).tolist() == [[[1.0]] * 4]
    residuals = quantizer.rows_to_learn(latents).flatten().tolist()
    assert residuals == pytest.approx([0.9, -0.2, 0.3, -0.8, 0.3])
    lossless = quantizer.rows_to_learn(latents, quantized=False).flatten().tolist()
    assert lossless == pytest.approx([0.9, -0.1, 0.4, -0.7, 0.4])


def test_phi_is_half_the_features_and_half_a_convolution():
    quantizer = toy()
    with torch.no_grad():
        quantizer.phi[0].weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
        quantizer.phi[0].bias.fill_(0.5)
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # Kernel 0 1 2 / 3 4 5 / 6 7 8 around each place, zeros outside.
    convolved = torch.tensor(
        [
            [4 * 1 + 5 * 2 + 7 * 3 + 8 * 4, 3 * 1 + 4 * 2 + 6 * 3 + 7 * 4],
            [1 * 1 + 2 * 2 + 4 * 3 + 5 * 4, 0 * 1 + 1 * 2 + 3 * 3 + 4 * 4],
        ]
    )
    expected = (1 - PHI_SHARE) * vectors + PHI_SHARE * (convolved + 0.5)
    found = quantizer.add_scale(None, vectors[None, :, :, None], 1)
    torch.testing.assert_close(found[0, 0], expected)


@pytest.fixture
def quantizer():
    generator = torch.Generator().manual_seed(0)
    made = toy((1, 2, 3, 6), 3, torch.randn(11, 4, generator=generator))
    return stirred(made)


@pytest.fixture
def latents():
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def residual_sums(quantizer, latents):
    """The whole of it once more, scale after scale, with plain interpolation and convolution."""
    features, codes, prefixes = torch.zeros_like(latents), [], []
    for index, side in enumerate(quantizer.scales):
        missing = F.adaptive_avg_pool2d(latents - features, side)
        flat = missing.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        distances = (flat[:, None] - quantizer.codebook[None]).square().sum(2)
        codes.append(distances.argmin(1).view(len(latents), -1))
        vectors = quantizer.codebook[codes[-1]].view(len(latents), side, side, -1).permute(0, 3, 1, 2)
        large = F.interpolate(vectors, (6, 6), mode="bicubic", align_corners=False)
        phi = quantizer.phi[[0, 0, 1, 2][index]]
        features = features + 0.5 * large + 0.5 * F.conv2d(large, phi.weight, phi.bias, padding=1)
        prefixes.append(features)
    return torch.cat(codes, 1), prefixes


@torch.no_grad()
def test_several_scales_against_a_second_implementation(quantizer, latents):
    codes, prefixes = residual_sums(quantizer, latents)
    result = quantizer(latents)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.quantized, prefixes[-1])
    expected = torch.stack([F.mse_loss(prefix, latents) for prefix in prefixes]).mean()
    torch.testing.assert_close(result.commitment_loss, expected)
    for number, prefix in enumerate(prefixes, 1):
        length = sum(side**2 for side in quantizer.scales[:number])
        torch.testing.assert_close(quantizer.lookup(codes[:, :length]), prefix)
    inputs = [
        F.adaptive_avg_pool2d(p, side).flatten(2).mT for p, side in zip(prefixes, (2, 3, 6), strict=False)
    ]
    torch.testing.assert_close(quantizer.context(codes), torch.cat(inputs, 1))


@torch.no_grad()
def test_encode_and_forward_agree_and_grids_are_whole_scales(quantizer, latents):
    codes = quantizer.encode(latents)
    assert torch.equal(codes, quantizer(latents).codes)
    assert codes.shape == (3, 50)
    grids = quantizer.grids(codes)
    assert [grid.shape for grid in grids] == [(3, 1, 1), (3, 2, 2), (3, 3, 3), (3, 6, 6)]
    assert torch.equal(torch.cat([grid.flatten(1) for grid in grids], 1), codes)
    assert len(quantizer.grids(codes[:, :5])) == 2
    for wrong in (codes[:, :6], codes[:, None], torch.cat([codes, codes], 1)):
        with pytest.raises(ValueError, match=r"expected \(batch, 50\), the scales \(1, 2, 3, 6\)"):
            quantizer.grids(wrong)


@torch.no_grad()
def test_extend_scale_by_scale_is_context_and_lookup(quantizer, latents):
    codes = quantizer.encode(latents)
    features, inputs = None, []
    for index, grid in enumerate(quantizer.grids(codes)):
        features, following = quantizer.extend(features, grid.flatten(1), index)
        inputs.append(following)
    assert inputs.pop() is None
    assert torch.equal(torch.cat(inputs, 1), quantizer.context(codes))
    assert torch.equal(features, quantizer.lookup(codes))


@torch.no_grad()
def test_context_of_a_scale_knows_nothing_of_that_scale_or_finer_ones(quantizer, latents):
    codes = quantizer.encode(latents)
    before = quantizer.context(codes)
    starts = [0, 1, 5, 14, 50]
    for index in range(4):
        changed = codes.clone()
        changed[:, starts[index] :] = (changed[:, starts[index] :] + 1) % 11
        unaffected = max(starts[index + 1] - 1, 0)  # inputs begin with the second scale
        after = quantizer.context(changed)
        assert torch.equal(after[:, :unaffected], before[:, :unaffected])
        if index < 3:
            assert not torch.equal(after, before)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gradients_reach_the_encoder_through_and_phi_by_the_codebook_loss(update, latents):
    quantizer = stirred(toy((1, 3, 6), 2, torch.randn(9, 4), update))
    assert quantizer.learns_by_loss
    latents = latents.clone().requires_grad_()
    result = quantizer(latents)
    weights = torch.randn(result.quantized.shape)
    (gradient,) = torch.autograd.grad((result.quantized * weights).sum(), latents, retain_graph=True)
    assert torch.equal(gradient, weights)
    assert torch.autograd.grad(result.codebook_loss, latents, retain_graph=True, allow_unused=True) == (None,)
    phis = torch.autograd.grad(result.codebook_loss, quantizer.phi.parameters(), retain_graph=True)
    assert all(phi.any() for phi in phis)
    (gradient,) = torch.autograd.grad(result.commitment_loss, latents, retain_graph=True)
    assert gradient.any()
    if update == "gradient":
        (gradient,) = torch.autograd.grad(result.codebook_loss, quantizer.codebook)
        assert gradient.any()


def test_the_codebook_learns_from_the_residuals_of_all_scales_as_a_single_grid_learns_from_latents(latents):
    codebook = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    quantizer = toy((1, 3, 6), 2, codebook, threshold=0.5).train()
    plain = VQVAEVectorQuantizer(9, 4, update="ema", decay=0.9, epsilon=1e-5, dead_code_threshold=0.5)
    plain.start_from(codebook, torch.ones(9))
    plain.num_updates.zero_()
    seen = quantizer.rows_to_learn(latents)
    assert seen.shape == (3 * 46, 4)
    quantizer(latents)
    plain.train()(seen.t()[None, :, :, None].contiguous())
    for name in ("codebook", "cluster_size", "code_sums", "num_updates"):
        torch.testing.assert_close(getattr(quantizer, name), getattr(plain, name), msg=name)


def test_rows_are_numbered_image_by_image(quantizer, latents):
    """So that two processes with an image each number the rows as one process with both does."""
    together = quantizer.rows_to_learn(latents)
    apart = torch.cat([quantizer.rows_to_learn(image[None]) for image in latents])
    torch.testing.assert_close(together, apart)
    assert torch.equal(nearest_codes(together, quantizer.codebook).view(3, -1), quantizer.encode(latents))


@torch.no_grad()
def test_autocast_changes_nothing_between_codes_and_features(quantizer, latents):
    codes = quantizer.encode(latents)
    expected = quantizer.context(codes), quantizer.lookup(codes)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer.context(codes), quantizer.lookup(codes)
        assert torch.equal(quantizer.encode(latents), codes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_latents_of_another_size_are_refused(quantizer):
    with pytest.raises(ValueError, match="expected height and width 6, the finest scale"):
        quantizer(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"expected \(batch, 4, height, width\)"):
        quantizer(torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scales": (1, 2)}, "expected sides that grow from at least 1 to 4"),
        ({"scales": (1, 3, 2, 4)}, "expected sides that grow"),
        ({"scales": (0, 4)}, "expected sides that grow"),
        ({"scales": (2, 2, 4)}, "expected sides that grow"),
        ({"scales": (1, 4), "num_phi": 3}, "num_phi is 3: expected 1 to 2"),
        ({"scales": (1, 4), "num_phi": 0}, "num_phi is 0: expected 1 to 2"),
    ],
)
def test_scales_that_are_none_are_refused(settings, text):
    with pytest.raises(Exception, match=text):
        VQVAEConfig(image_size=16, hidden_sizes=(6, 8), **settings)


@torch.no_grad()
def test_a_tokenizer_decodes_all_scales_and_the_first_ones(make_vqvae):
    model = make_vqvae(scales=(1, 2, 4), num_phi=2)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output = model(images)
    assert torch.equal(model.encode(images), output.codes)
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction)
    assert model.config.code_shape == (21,)
    assert model.config.sides == (1, 2, 4)
    previews = [model.decode(output.codes[:, :length]) for length in (1, 5, 21)]
    assert [preview.shape for preview in previews] == [(2, 3, 16, 16)] * 3
    assert not torch.equal(previews[0], previews[2])
    with pytest.raises(ValueError, match="they come from another tokenizer"):
        model.decode(output.codes + 7)


def test_loss_of_a_tokenizer_with_scales_counts_what_teaches_phi(make_vqvae):
    model = make_vqvae(scales=(1, 2, 4), num_phi=2)
    output = model(torch.rand(2, 3, 16, 16))
    config = model.config
    expected = config.l1_weight * output.l1_loss + config.mse_weight * output.mse_loss
    expected = expected + config.beta * output.commitment_loss + output.codebook_loss
    torch.testing.assert_close(output.loss, expected)


def test_scales_take_the_phi_that_the_authors_give_them():
    """What `PhiPartiallyShared` of their code answers for si / (SN - 1); the shipped tokenizer has 8 scales and 4 phi."""
    expected = {
        (4, 8): [0, 0, 1, 1, 2, 2, 3, 3],
        (4, 10): [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
        (3, 10): [0, 0, 0, 0, 1, 1, 1, 2, 2, 2],
        (2, 3): [0, 0, 1],
        (1, 2): [0, 0],
    }
    for (num_phi, num_scales), phi_of in expected.items():
        assert toy(range(1, num_scales + 1), num_phi).phi_of == phi_of


def test_a_quantizer_built_alone_has_a_random_codebook_and_draws_nothing_from_the_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    quantizer = VQVAEVectorQuantizer(64, 8, update="ema", decay=0.9, epsilon=1e-5, dead_code_threshold=0)
    assert torch.equal(torch.rand(3), expected)
    assert quantizer.codebook.std().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(quantizer.code_sums, quantizer.codebook * quantizer.cluster_size[:, None])


def test_phi_of_a_new_tokenizer_is_the_identity():
    model = VQVAEModel(VQVAEConfig(image_size=16, hidden_sizes=(6, 8), code_dim=3, scales=(1, 4), num_phi=2))
    features = torch.randn(1, 3, 4, 4)
    for phi in model.quantizer.phi:
        torch.testing.assert_close(phi(features), features)


def test_a_single_code_draws_what_a_grid_of_it_decodes_to(make_vqvae):
    model = make_vqvae()
    grid = torch.full((1, 3, 3), 5)
    torch.testing.assert_close(model.decode_alone(torch.tensor([5]), 3), model.decode(grid))
