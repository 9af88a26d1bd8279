"""Clusters beside the class: found by hand, summed out by enumeration, sampled, scored and edited as they are told."""

import itertools
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import joined

from isic_vq import IsicVQModel, IsicVQPipeline, PixelCNNConfig, PixelCNNModel
from isic_vq.models.clusters import cluster_scores
from isic_vq.models.editing import redraw_codes
from isic_vq.models.likelihood import score_codes
from isic_vq.models.pipeline_isic_vq import UnconditionalImageGenerationPipeline
from isic_vq.models.sampling import draw, guided_logits, image_generators

C = 4


@torch.no_grad()
def clustered(prior):
    """Give a prior's buffers numbers that matter."""
    generator = torch.Generator().manual_seed(2)
    prior.cluster_scores.copy_(torch.randn(prior.cluster_scores.shape, generator=generator))
    prior.cluster_weights.copy_(torch.randint(1, 30, prior.cluster_weights.shape, generator=generator))
    return prior


@pytest.fixture(scope="module", params=["gated", "plain", "var"])
def model(request, make_prior, make_var):
    """Not to be changed."""
    if request.param == "var":
        return joined(clustered(make_var(num_clusters=C)))
    return joined(clustered(make_prior(num_clusters=C, architecture=request.param)))


def random_codes(model, count, seed=0):
    config = model.prior.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.num_codes, (count, *config.code_shape), generator=generator)


def test_the_cluster_of_codes_is_the_nearest_centre_of_their_mean_vector(model):
    prior, quantizer = model.prior, model.vqvae.quantizer
    codes, codebook = random_codes(model, 50), quantizer.codebook.double()
    centres = torch.randn(C, codebook.shape[1], generator=torch.Generator().manual_seed(1)).double() * 0.3
    edges = np.cumsum([0, *prior.config.sizes])
    grids = [codes.flatten(1)[:, first:last] for first, last in itertools.pairwise(edges)]
    mean = torch.stack([codebook[grid].mean(1) for grid in grids]).mean(0)
    expected = (mean[:, None] - centres).norm(dim=2).argmin(1)
    kept = prior.cluster_scores.clone()
    prior.cluster_scores.copy_(cluster_scores(codebook, centres))
    found = prior.clusters_of(codes)
    prior.cluster_scores.copy_(kept)
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 1, "premise: they differ"


# Likelihood


@pytest.fixture(scope="module")
def enumerated(make_prior):
    """A model over all 81 grids of 2 x 2 codes, and p(cluster | y) p(grid | cluster, y) by hand, (y, cluster, grid)."""
    model = joined(clustered(make_prior(num_codes=3, grid_size=2, num_clusters=C)))
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    joint = np.empty((4, C, 81))
    for label, cluster in itertools.product(range(4), range(C)):
        conditions = [torch.full((81,), value) for value in (label, cluster)]
        with torch.no_grad():
            logits = model.prior(grids, conditions[0], clusters=conditions[1]).logits.double().numpy()
        softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        weights = model.prior.cluster_weights[label].double().numpy()
        likelihood = np.take_along_axis(softmax, grids.numpy()[:, None], 1).reshape(81, -1).prod(1)
        joint[label, cluster] = weights[cluster] / weights.sum() * likelihood
    assert joint.sum((1, 2)) == pytest.approx(np.ones(4), abs=1e-5)
    return model, grids, joint


def test_the_bits_are_those_of_the_own_cluster_and_bound_the_sum_over_all(enumerated):
    model, grids, joint = enumerated
    own = model.prior.clusters_of(grids).numpy()
    assert len(set(own)) > 1, "premise: several clusters occur"
    for label in range(4):
        labels = torch.full((81,), label)
        bits = score_codes(model, grids, labels).flatten(1).sum(1).numpy()
        of_own = joint[label, own, range(81)]
        assert bits == pytest.approx(-np.log2(of_own), abs=1e-4)
        posterior = of_own / joint[label].sum(0)
        exact = -np.log2(joint[label].sum(0))
        assert bits - exact == pytest.approx(-np.log2(posterior), abs=1e-4), "what the bound gives away"
    unconditional = score_codes(model, grids)
    assert torch.equal(unconditional, score_codes(model, grids, torch.full((81,), 3)))


def test_a_mixture_of_classes_sums_the_bounds(enumerated):
    model, grids, joint = enumerated
    own, pi = model.prior.clusters_of(grids).numpy(), torch.tensor([5.0, 0.0, 3.0])
    bits = score_codes(model, grids, marginalize=True, class_weights=pi).flatten(1).sum(1).numpy()
    expected = (pi.numpy()[:, None] / 8 * joint[:3, own, range(81)]).sum(0)
    assert bits == pytest.approx(-np.log2(expected), abs=1e-4)


def test_the_bound_is_exact_where_codes_tell_their_cluster():
    torch.manual_seed(0)
    config = PixelCNNConfig(
        num_codes=3, grid_size=2, hidden_size=8, num_layers=1, head_size=8, num_clusters=3
    )
    prior = PixelCNNModel(config)
    prior.cluster_scores.copy_(torch.eye(3))
    prior.cluster_weights.copy_(torch.tensor([[1, 2, 5]]))
    grids = torch.arange(3)[:, None, None].expand(3, 2, 2).contiguous()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=0.02)
    for _ in range(400):  # all grids are of one code: the cluster's
        optimizer.zero_grad()
        prior(grids).loss.backward()
        optimizer.step()
    model = joined(prior.eval())
    with torch.no_grad():
        log_likelihoods = []
        for cluster in range(3):
            logits = prior(grids, clusters=torch.full((3,), cluster)).logits.double()
            log_likelihoods.append(logits.log_softmax(1).gather(1, grids[:, None]).flatten(1).sum(1))
    log_weights = torch.tensor([1 / 8, 2 / 8, 5 / 8]).double().log()
    exact = -(torch.stack(log_likelihoods) + log_weights[:, None]).logsumexp(0) / math.log(2)
    bits = score_codes(model, grids).flatten(1).sum(1)
    assert bits.tolist() == pytest.approx(exact.tolist(), abs=1e-4)
    assert bits.tolist() == pytest.approx([3, 2, math.log2(8 / 5)], abs=0.1), (
        "nothing but the cluster is news"
    )


# Sampling


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_cached_sampling_draws_from_the_full_pass_of_the_same_clusters(model, guidance_scale):
    prior = model.prior
    labels, clusters = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([3, 0, 1, 2, 2])
    uniforms = torch.rand(5, prior.config.num_positions, dtype=torch.float64)
    settings = {"guidance_scale": guidance_scale, "extend": model.vqvae.extend, "clusters": clusters}
    codes = prior.sample(uniforms, labels, **settings)
    context = model.vqvae.context(codes)
    with torch.no_grad():
        with_class, without = (
            prior(codes, given, context, clusters=clusters).logits.movedim(1, -1).flatten(1, 2)
            if codes.ndim == 3
            else prior(codes, given, context, clusters=clusters).logits.movedim(1, -1)
            for given in (labels, None)
        )
    share = torch.ones(prior.config.num_positions)
    if prior.config.model_type == "isic_var":  # grows over the scales
        steps = len(prior.config.sizes)
        share = (torch.arange(steps) / (steps - 1)).repeat_interleave(torch.tensor(prior.config.sizes))
    scale = 1 + share[:, None] * (guidance_scale - 1)
    expected = draw(guided_logits(with_class, without, scale), uniforms)
    assert torch.equal(codes.flatten(1), expected)
    assert not torch.equal(codes, prior.sample(uniforms, labels, **settings | {"clusters": clusters.flip(0)}))


def test_compiled_kernels_are_told_the_cluster(make_prior):
    pytest.importorskip("numba")
    prior = clustered(make_prior(num_clusters=C))
    uniforms, clusters = torch.rand(6, 16, dtype=torch.float64), torch.arange(6) % C
    eager = prior.sample(uniforms, clusters=clusters, guidance_scale=1.5)
    assert torch.equal(
        prior.sample(uniforms, clusters=clusters, guidance_scale=1.5, backend="compiled"), eager
    )


def test_generate_draws_clusters_by_their_frequencies_given_the_class(model):
    made = model.generate(400, "nevus", seed=0, batch_size=200)
    weights = model.prior.cluster_weights[1].double()
    shares = torch.bincount(made.clusters, minlength=C) / 400
    assert shares.tolist() == pytest.approx(
        (weights / weights.sum()).tolist(), abs=0.08
    )  # 3.3 standard errors
    part = model.generate(5, "nevus", seed=0, first_index=8, batch_size=200)
    assert torch.equal(part.clusters, made.clusters[8:13]), "the image's own, whatever is asked for with it"
    assert torch.equal(part.codes, made.codes[8:13])
    again = model.generate(5, "nevus", seed=0, first_index=8, batch_size=200, cluster=made.clusters[8:13])
    assert torch.equal(again.codes, part.codes), "a cluster that is given leaves the noise as it is"
    assert model.generate(3, seed=0, cluster=2).clusters.tolist() == [2, 2, 2]
    assert model.generate(2, seed=0, cluster=[1, 3]).clusters.tolist() == [1, 3]


def test_both_pipelines_pass_clusters_on(model):
    expected = model.generate(3, "nevus", seed=1, cluster=[1, 0, 3], batch_size=2)
    pipe = UnconditionalImageGenerationPipeline(model)
    made = pipe("nevus", num_images=3, seed=1, batch_size=2, cluster=[1, 0, 3], return_codes=True)
    assert torch.equal(made["codes"], expected.codes)
    assert made["clusters"].tolist() == [1, 0, 3]
    diffusers = pytest.importorskip("diffusers")
    assert diffusers
    latents = IsicVQPipeline(model.vqvae, model.prior)(
        "nevus", 3, seed=1, batch_size=2, cluster=[1, 0, 3], output_type="latent"
    ).images
    assert torch.equal(latents, expected.codes)


def test_clusters_that_are_not_the_priors_are_refused(model, composite):
    for cluster, message in (
        (C, "clusters lie in"),
        (-1, "clusters lie in"),
        ([0, 1], "expected whole numbers of shape"),
        (0.5, "expected whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(3, seed=0, cluster=cluster)
    with pytest.raises(ValueError, match="clusters are None: expected whole numbers"):
        model.prior.sample(torch.rand(1, model.prior.config.num_positions, dtype=torch.float64))
    with pytest.raises(ValueError, match="this prior has none, its num_clusters is 0"):
        composite.generate(1, seed=0, cluster=0)
    with pytest.raises(StrictDataclassError, match="num_clusters is -1: expected at least 0"):
        PixelCNNConfig(num_clusters=-1)


# Editing


def test_an_edit_is_given_the_images_own_cluster(make_prior):
    model = joined(clustered(make_prior(num_codes=3, grid_size=2, num_clusters=C)))
    codes, mask = torch.tensor([[[2, 0], [1, 2]]]), torch.tensor([[[True, False], [False, False]]])
    options = codes.repeat(3, 1, 1)
    options[:, 0, 0] = torch.arange(3)
    own = model.prior.clusters_of(codes)
    with torch.no_grad():
        logits = model.prior(options, torch.ones(3, dtype=torch.long), clusters=own.expand(3)).logits.double()
    joint = logits.log_softmax(1).gather(1, options[:, None]).flatten(1).sum(1)
    edit = redraw_codes(model, codes, mask, torch.tensor([1]), 4000, image_generators(0, 1))
    assert edit.log_evidence.item() == pytest.approx(joint.logsumexp(0).item(), abs=0.03)


# Files


def test_a_saved_model_comes_back_with_its_clusters(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    back = IsicVQModel.from_pretrained(tmp_path / "saved")
    for name in ("cluster_scores", "cluster_weights"):
        assert torch.equal(getattr(back.prior, name), getattr(model.prior, name))
    assert torch.equal(back.generate(4, seed=0).codes, model.generate(4, seed=0).codes)
