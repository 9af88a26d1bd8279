"""The VAR prior: against a second implementation, by scale causal, cached as in full, and drawing what it says."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import CLASSES, SCALES, joined

from isic_vq import IsicVQModel, VARConfig, VARModel
from isic_vq.models.editing import code_masks, filter_particles, redraw_codes
from isic_vq.models.sampling import image_generators

ENDS = (1, 5, 21)  # of the scales 1, 2 and 4


@pytest.fixture
def model(make_var):
    return make_var()


@pytest.fixture
def codes():
    return torch.randint(7, (3, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def context():
    return torch.randn(3, 20, 3, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 2, 3])


def uniforms(count, length=21, seed=0):
    return torch.rand(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the forward pass ----------------------------------------------------------------------------------------------


def norm(rows):
    return (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-6)


def by_hand(model, context, label):
    """Logits `(21, 7)` of one image, in numpy, every attention row over the list of what it may see."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}

    def linear(name, rows):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    classes = weights["class_embedding.weight"][label]
    driven = classes / (1 + np.exp(-classes))
    hidden = np.vstack([classes[None], linear("features", context)]) + weights["position_embedding"]
    scale_of = np.repeat([0, 1, 2], [1, 4, 16])
    for layer in range(2):
        name = f"layers.{layer}"
        m = linear("modulation", driven).reshape(6, 8) + weights[f"{name}.modulation"]
        qkv = linear(f"{name}.attention.queries_keys_values", norm(hidden) * (1 + m[0]) + m[1])
        q, k, v = qkv.reshape(21, 3, 2, 4).transpose(1, 2, 0, 3)
        seen = np.empty((21, 2, 4))
        for head in range(2):
            heat = math.exp(weights[f"{name}.attention.log_scale"][head].item())
            for row in range(21):
                allowed = [c for c in range(21) if scale_of[c] <= scale_of[row]]
                unit = q[head, row] / np.linalg.norm(q[head, row])
                scores = np.array([heat * unit @ k[head, c] / np.linalg.norm(k[head, c]) for c in allowed])
                shares = np.exp(scores - scores.max())
                seen[row, head] = shares / shares.sum() @ v[head, allowed]
        hidden = hidden + linear(f"{name}.attention.output", seen.reshape(21, 8)) * m[2]
        inner = linear(f"{name}.feed_forward.0", norm(hidden) * (1 + m[3]) + m[4])
        inner = inner / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        hidden = hidden + linear(f"{name}.feed_forward.2", inner) * m[5]
    scale, shift = linear("head.modulation", driven).reshape(2, 8)
    return linear("head.logits", norm(hidden) * (1 + scale) + shift)


@torch.no_grad()
def test_logits_against_a_second_implementation(model, codes, context):
    logits = model(codes, LABELS, context).logits
    assert logits.shape == (3, 7, 21)
    for image, label in enumerate(LABELS.tolist()):
        expected = by_hand(model, context[image].double().numpy(), label)
        np.testing.assert_allclose(logits[image].T.numpy(), expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_in_nats(model, codes, context):
    output = model(codes, LABELS, context)
    probabilities = output.logits.double().softmax(1).gather(1, codes[:, None])[:, 0]
    assert output.loss.item() == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)
    targets = codes.flip(1)
    probabilities = output.logits.double().softmax(1).gather(1, targets[:, None])
    loss = model(codes, LABELS, context, targets=targets).loss
    assert loss.item() == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)
    assert (
        model(codes, None, context, return_dict=False)[0] == model(codes, torch.full((3,), 3), context).loss
    )


def test_a_new_model_finds_all_codes_alike_and_sees_no_labels(codes, context):
    model = VARModel(
        VARConfig(num_codes=7, scales=SCALES, code_dim=3, hidden_size=8, num_heads=2, id2label=CLASSES)
    ).eval()
    assert model(codes, LABELS, context).loss.item() == pytest.approx(math.log(7))
    with torch.no_grad():
        model.head.logits.weight.normal_()
        classes = model.modulation(F.silu(model.class_embedding.weight))
    assert not classes.any()


@torch.no_grad()
def test_causality_by_scale_is_exact_to_the_last_bit(model, codes, context):
    """What a scale is given of its own and finer scales changes nothing in the logits of coarser ones."""
    before = model(codes, LABELS, context).logits
    for first, last in itertools.pairwise((0, *ENDS)):
        changed = context.clone()
        changed[:, max(first - 1, 0) :] += 1  # from the inputs of this scale on; the first has none
        after = model(codes, LABELS, changed).logits
        assert torch.equal(after[:, :, :first], before[:, :, :first])
        if first:
            assert (after[:, :, first:last] != before[:, :, first:last]).any(1).all(), (
                "a code sees no context"
            )


@torch.no_grad()
def test_causality_by_scale_holds_from_codes_to_logits_through_the_tokenizer(var_composite, codes):
    before = var_composite.predict(codes, LABELS)
    for first, last in itertools.pairwise((0, *ENDS)):
        changed = codes.clone()
        changed[:, first:last] = (changed[:, first:last] + 1) % 7
        after = var_composite.predict(changed, LABELS)
        assert torch.equal(after[:, :, :last], before[:, :, :last])
        if last < 21:
            assert not torch.equal(after[:, :, last:], before[:, :, last:])


def test_every_code_sees_its_whole_scale_and_all_coarser_ones(model):
    mask = model.mask()
    assert mask.sum(1).tolist() == [1] + [5] * 4 + [21] * 16
    assert mask[1:5, :5].all()


@torch.no_grad()
def test_attention_is_the_same_by_every_implementation_and_is_set_for_whole_and_part(
    var_composite, tmp_path, codes
):
    expected = var_composite.predict(codes, LABELS)
    var_composite.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa", {"prior_config": "eager"}):
        model = IsicVQModel.from_pretrained(tmp_path, attn_implementation=attention)
        name = attention if isinstance(attention, str) else "eager"
        assert model.prior.config._attn_implementation == name
        torch.testing.assert_close(model.predict(codes, LABELS), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            model.generate(2, "nevus", seed=1).codes, var_composite.generate(2, "nevus", seed=1).codes
        )
    for_part = VARModel.from_pretrained(tmp_path, subfolder="prior", attn_implementation="eager")
    context = var_composite.vqvae.context(codes)
    torch.testing.assert_close(for_part(codes, LABELS, context).logits, expected, atol=1e-6, rtol=0)


# --- the walk, cached ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_cached_logits_equal_the_full_forward(var_composite, codes):
    model = var_composite
    full = model.predict(codes, LABELS)
    walk, parts = model.prior.walk(LABELS, model.vqvae.extend), []
    for (group,) in walk.steps:
        parts.append(walk.logits(group))
        walk.put(group, codes[:, group])
    assert [part.shape[1] for part in parts] == [1, 4, 16]
    torch.testing.assert_close(torch.cat(parts, 1).mT, full, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_walk_reordered_goes_on_as_if_the_images_had_been_others(var_composite, codes):
    model, order = var_composite, torch.tensor([2, 2, 0])
    label = torch.ones(3, dtype=torch.long)
    walk, other = (model.prior.walk(label, model.vqvae.extend) for _ in range(2))
    for (group,) in walk.steps[:2]:
        for each, grids in ((walk, codes), (other, codes[order])):
            each.logits(group)
            each.put(group, grids[:, group])
    walk.reorder(order)
    torch.testing.assert_close(walk.logits(slice(5, 21)), other.logits(slice(5, 21)))


@pytest.mark.parametrize(("power", "scales"), [(None, [1, 2, 3]), (2.0, [1, 1 + 2 * 0.1464466094, 3])])
def test_samples_are_the_draws_of_the_walk_with_guidance_that_grows(var_composite, power, scales):
    model, noise = var_composite, uniforms(3)
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "guidance_scale": 3.0, "guidance_power": power}
    found = model.prior.sample(noise, LABELS, **settings, extend=model.vqvae.extend)
    drawn = torch.zeros(3, 21, dtype=torch.long)
    for index, (first, last) in enumerate(itertools.pairwise((0, *ENDS))):
        conditional = model.predict(drawn, LABELS)[:, :, first:last].mT.double()
        unconditional = model.predict(drawn)[:, :, first:last].mT.double()
        logits = (unconditional + scales[index] * (conditional - unconditional)) / 0.8
        ordered, order = logits.sort(-1, descending=True)
        shares = ordered[..., :5].softmax(-1)
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= 0.9, 0)
        kept = torch.zeros_like(logits).scatter(-1, order[..., :5], shares)
        cumulative = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
        drawn[:, first:last] = (cumulative <= noise[:, first:last, None]).sum(-1)
    assert torch.equal(found, drawn)


def test_samples_follow_the_models_distribution(make_var):
    """4000 draws of codes of 1x1 and 2x2 of two values, against all 32 grids."""
    prior = make_var(num_codes=2, scales=(1, 2))
    model = joined(prior)
    grids = torch.tensor(list(itertools.product(range(2), repeat=5)))
    labels = torch.ones(len(grids), dtype=torch.long)
    with torch.no_grad():
        chosen = model.predict(grids, labels).double().log_softmax(1).gather(1, grids[:, None])[:, 0]
    expected = chosen.sum(1).exp().numpy()
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    samples = prior.sample(uniforms(4000, 5), torch.ones(4000, dtype=torch.long), extend=model.vqvae.extend)
    places = (samples @ 2 ** torch.arange(4, -1, -1)).numpy()
    observed = np.bincount(places, minlength=32)
    often = 4000 * expected >= 5
    assert often.sum() > 10
    chi_square = ((observed - 4000 * expected) ** 2 / (4000 * expected))[often].sum()
    assert chi_square < often.sum() + 4 * math.sqrt(2 * often.sum())


def test_on_step_is_called_once_per_scale(var_composite):
    steps = []
    var_composite.prior.sample(
        uniforms(2), on_step=lambda: steps.append(1), extend=var_composite.vqvae.extend
    )
    assert len(steps) == var_composite.config.prior_config.num_steps == 3


# --- training ------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient(make_var, codes, context):
    gradients = []
    for checkpointing in (False, True):
        model = make_var(dropout=0.3).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(codes, LABELS, context).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_dropout_and_class_dropout_act_in_train_mode_only(make_var, codes, context):
    model = make_var(dropout=0.5)
    assert torch.equal(model(codes, LABELS, context).logits, model(codes, LABELS, context).logits)
    model.train()
    assert not torch.equal(model(codes, LABELS, context).logits, model(codes, LABELS, context).logits)
    always = make_var(class_dropout=0.999).train()
    torch.manual_seed(0)
    none = torch.full((3,), 3)
    assert torch.equal(always(codes, LABELS, context).logits, always.eval()(codes, none, context).logits)


def test_a_model_that_has_learned_a_rule_knows_it(make_var):
    """Codes of the last scale all repeat the first; told the first by its context, the net learns to tell them."""
    torch.manual_seed(0)
    model = make_var(num_codes=4, scales=(1, 3), code_dim=4, hidden_size=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        first = torch.randint(4, (32, 1))
        context = F.one_hot(first, 4).float().expand(-1, 9, -1)
        loss = model(first.expand(-1, 10), None, context).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < math.log(4) / 10 + 0.1, "only the first code is news"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_and_scores(make_composite, dtype):
    model = make_composite(scales=True).to(dtype)
    assert model.vqvae.quantizer.codebook.dtype == dtype  # `to` casts all; `from_pretrained` keeps it
    output = model.generate(2, seed=0)
    assert torch.isfinite(output.pixel_values).all()
    assert torch.isfinite(model.score(torch.rand(2, 3, 16, 16)).bits).all()


# --- the composite -------------------------------------------------------------------------------------------------


def test_images_depend_on_seed_and_index_alone(var_composite):
    whole = var_composite.generate(5, "nevus", seed=7, batch_size=4)
    assert whole.codes.shape == (5, 21)
    assert whole.pixel_values.shape == (5, 3, 16, 16)
    later = var_composite.generate(2, "nevus", seed=7, first_index=2, batch_size=4)
    assert torch.equal(later.pixel_values, whole.pixel_values[2:4])
    torch.testing.assert_close(var_composite.decode(whole.codes), whole.pixel_values)


def test_a_saved_model_comes_back_whole_and_by_its_config_alone(var_composite, tmp_path):
    var_composite.save_pretrained(tmp_path)
    loaded = IsicVQModel.from_pretrained(tmp_path)
    assert type(loaded.prior) is VARModel
    assert torch.equal(
        loaded.generate(2, seed=0).pixel_values, var_composite.generate(2, seed=0).pixel_values
    )
    prior = VARModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(prior.parameters(), var_composite.prior.parameters(), strict=True)
    )


def test_bits_lie_where_their_codes_do(var_composite):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = var_composite.score(images)
    assert scores.bits.shape == (2, 21)
    assert scores.bits_map.shape == (2, 4, 4)
    first, second, third = scores.bits.split([1, 4, 16], 1)
    by_hand = third.view(2, 4, 4) + second.view(2, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    torch.testing.assert_close(scores.bits_map, by_hand + first[:, :, None] / 16)
    torch.testing.assert_close(scores.bits_per_code, scores.bits.mean(1))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scales": (1, 4)}, "the tokenizer makes 21 codes but the prior models 17"),
        ({"num_codes": 8}, "num_codes of the tokenizer is 7 but the prior.s is 8"),
        ({"code_dim": 5}, "code_dim of the tokenizer is 3 but the prior's is 5"),
    ],
)
def test_a_prior_made_for_other_scales_is_refused(make_vqvae, make_var, settings, text):
    with pytest.raises(ValueError, match=text):
        IsicVQModel.from_parts(make_vqvae(scales=SCALES, num_phi=2), make_var(**settings))


def test_a_pixelcnn_is_refused_by_a_tokenizer_with_scales_and_the_reverse(make_vqvae, make_prior, make_var):
    with pytest.raises(ValueError, match="the tokenizer makes 21 codes but the prior models 4x4"):
        IsicVQModel.from_parts(make_vqvae(scales=SCALES, num_phi=2), make_prior())
    with pytest.raises(ValueError, match="the tokenizer makes 4x4 codes but the prior models 21"):
        IsicVQModel.from_parts(make_vqvae(), make_var())


def test_what_a_var_is_not_given_right_it_refuses(model, codes, context):
    with pytest.raises(ValueError, match=r"context has shape None: expected \(3, 20, 3\)"):
        model(codes)
    with pytest.raises(ValueError, match=r"context has shape \(3, 21, 3\)"):
        model(codes, None, torch.zeros(3, 21, 3))
    with pytest.raises(ValueError, match="backend is 'compiled': expected 'eager'"):
        model.sample(uniforms(2), backend="compiled", extend=print)
    with pytest.raises(ValueError, match="extend is None"):
        model.sample(uniforms(2))
    with pytest.raises(ValueError, match=r"uniforms have shape \(2, 20\): expected \(batch, 21\)"):
        model.sample(uniforms(2, 20), extend=print)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hidden_size": 9}, "hidden_size is 9: expected a multiple of num_heads, 2"),
        ({"num_layers": 0}, "must be positive"),
        ({"scales": (2, 1)}, "expected sides that grow"),
        ({"scales": ()}, "expected sides that grow"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"dropout": 1.0}, "dropout is 1.0: expected a probability"),
    ],
)
def test_a_config_without_a_meaning_is_refused(make_var, settings, text):
    with pytest.raises(Exception, match=text):
        make_var(**settings)


# --- editing -------------------------------------------------------------------------------------------------------


def test_coarser_codes_go_where_more_than_half_of_their_area_is_drawn_anew():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :8, :6] = True  # the codes of rows 0 and 1, columns 0 and 1
    one, two, four = code_masks(mask, 1, 16, (1, 2, 4))
    assert four[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert two[0].tolist() == [[True, False], [False, False]]
    assert not one.any(), "a quarter of the image"
    mask[:, 8:, :6] = True
    one, two, _ = code_masks(mask, 1, 16, (1, 2, 4))
    assert not one.any(), "half of the image: the other half hangs on that code as much"
    assert two[0].tolist() == [[True, False], [True, False]]
    mask[:, :1, 8:9] = True  # one code more
    assert code_masks(mask, 1, 16, (1, 2, 4))[0].all()


@pytest.fixture(scope="module")
def two_scales(make_var):
    """A model of 1x1 and 2x2 codes of three values, sharp enough for weights to matter, and log p of all 243 grids."""
    prior = make_var(num_codes=3, scales=(1, 2))
    model = joined(prior)
    grids = torch.tensor(list(itertools.product(range(3), repeat=5)))
    with torch.no_grad():
        prior.head.logits.weight.mul_(4)
        prior.features.weight.mul_(4)
        logits = model.predict(grids, torch.ones(len(grids), dtype=torch.long))
    return model, grids, logits.double().log_softmax(1).gather(1, grids[:, None])[:, 0]


@pytest.mark.parametrize("masked", [[0], [0, 1, 2], [0, 4], [1, 3]])
def test_particles_approach_the_exact_posterior(two_scales, masked):
    model, grids, factors = two_scales
    kept_codes = torch.tensor([1, 2, 0, 2, 1])
    mask = torch.zeros(5, dtype=torch.bool)
    mask[masked] = True
    fits = (grids[:, ~mask] == kept_codes[~mask]).all(1)
    exact = factors.sum(1).masked_fill(~fits, -torch.inf).softmax(0).numpy()
    with torch.inference_mode():
        walk = model.prior.walk(torch.ones(20_000, dtype=torch.long), model.vqvae.extend)
        particles = filter_particles(walk, kept_codes, mask, uniforms(20_000, 5), uniforms(1, 5, 1)[0])
    places = (particles.codes @ 3 ** torch.arange(4, -1, -1)).numpy()
    found = np.bincount(places, particles.log_weights.softmax(0).numpy(), minlength=len(grids))
    assert np.abs(found - exact).sum() / 2 < 0.02
    assert particles.codes[:, ~mask].eq(kept_codes[~mask]).all()
    assert len(particles.ess) == 2


def test_everything_drawn_anew_is_exact_with_one_particle(two_scales):
    model, _, _ = two_scales
    output = redraw_codes(
        model, torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool),
        torch.ones(2, dtype=torch.long), 8, image_generators(0, 2),
    )  # fmt: skip
    assert output.num_particles.tolist() == [1, 1]
    assert output.log_evidence.tolist() == [0, 0]


def test_inpainting_keeps_codes_and_pixels_outside_the_mask(var_composite):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[4:12, 4:12] = True
    output = var_composite.inpaint(images, region, "nevus", seed=0)
    encoded = var_composite.encode(images)
    assert output.mask.shape == output.codes.shape == (2, 21)
    assert output.ess.shape == (2, 3)
    assert torch.equal(output.codes[~output.mask], encoded[~output.mask])
    assert not torch.equal(output.codes, encoded)
    assert torch.equal(output.pixel_values[:, :, ~region], images[:, :, ~region])
    again = var_composite.inpaint(images, region, "nevus", seed=0)
    assert torch.equal(again.codes, output.codes)
    assert var_composite.counterfactual(images, "melanoma", seed=0).labels.tolist() == [0, 0]


def test_depth_and_heads_have_transformers_names_beside_those_of_old_configs(make_prior, tmp_path):
    old = VARConfig(num_layers=3, num_heads=2, hidden_size=8)
    assert (old.num_hidden_layers, old.num_attention_heads) == (3, 2)
    new = VARConfig(num_hidden_layers=3, num_attention_heads=2, hidden_size=8)
    assert new.to_dict() == old.to_dict()
    assert len(VARModel(new).layers) == 3
    new.save_pretrained(tmp_path)
    assert VARConfig.from_pretrained(tmp_path).num_layers == 3
    assert make_prior(num_hidden_layers=4).config.num_layers == 4
    with pytest.raises(Exception, match="must be positive"):
        VARConfig(num_hidden_layers=0)


def test_embeddings_begin_with_the_spread_of_the_config():
    for spread in (0.5, 0.02):
        config = VARConfig(num_codes=7, scales=(1, 2, 8), initializer_range=spread)
        model = VARModel(config)
        for weight in (model.position_embedding, model.class_embedding.weight):
            assert weight.std().item() == pytest.approx(spread, rel=0.2)
