"""NaN and infinite numbers stop the work wherever they would become codes, pixels or scores that look sound."""

import copy
import math

import pytest
import torch

from isic_vq.models.checks import check_finite
from isic_vq.models.sampling import Sampling

MASK = torch.zeros(16, 16, dtype=torch.bool)
MASK[4:8, 4:8] = True


def broken(model, name, value):
    """A copy in which one number of a parameter is another."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    return model


def last_bias(model):
    """Name of the bias of the last layer of a prior's head: the logit of code 0 and none other."""
    return [name for name, _ in model.named_parameters() if name.startswith("prior.head") and "bias" in name][
        -1
    ]


@pytest.fixture(scope="module")
def composites(composite, var_composite):
    return {"pixelcnn": composite, "var": var_composite}


def backends(name):
    return ("eager", "compiled") if name == "pixelcnn" else ("eager",)


def test_finite_numbers_pass_even_where_their_sum_is_not():
    large = torch.full((2, 3), 3e38)
    assert check_finite(large, "x", "y") is large
    assert check_finite(torch.full((2, 99999), 1.0, dtype=torch.float16), "x", "y").shape == (2, 99999)
    assert check_finite(torch.empty(0, 3), "x", "y").shape == (0, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_named(value):
    batch = torch.zeros(9, 3)
    batch[[1, 4]] = value
    with pytest.raises(ValueError, match=r"pixels of image 1, 4 are not finite \(NaN or infinite\): do it"):
        check_finite(batch, "pixels", "do it")
    with pytest.raises(ValueError, match=r"image 0, 1, 2, 3, 4, \.\.\. are not finite"):
        check_finite(torch.full((9, 1), value), "pixels", "do it")


def test_pixels_that_are_not_finite_have_no_codes(composites):
    for model in composites.values():
        for value, dtype in ((math.nan, torch.float32), (math.inf, torch.float32), (1e300, torch.float64)):
            pixels = torch.rand(2, 3, 16, 16, dtype=dtype)
            pixels[1, 0, 0, 0] = value
            for action in (model.encode, model.score, lambda x, m=model: m.inpaint(x, MASK)):
                with pytest.raises(
                    ValueError, match="pixel_values of image [01] are not finite.*expected RGB"
                ):
                    action(pixels)


def test_images_of_another_range_or_type_have_no_codes_and_no_score(composites):
    pixels = torch.rand(2, 3, 16, 16)
    wrong = {
        r"pixel_values lie in \[0.*, 2\d\d.*\]: expected RGB in \[0, 1\].*divide": pixels * 255,
        r"pixel_values lie in \[-.*, .*\]: expected RGB.*\(x \+ 1\) / 2": pixels * 2 - 1,
        "pixel_values are torch.uint8: expected a tensor of floats": (pixels * 255).to(torch.uint8),
    }
    for model in composites.values():
        for text, images in wrong.items():
            for action in (model.encode, model.vqvae.encode, model.score):
                with pytest.raises(ValueError, match=text):
                    action(images)
        with pytest.raises(ValueError, match='pixel_values are ndarray: .*return_tensors="pt"'):
            model.encode(pixels.numpy())
        noisy = pixels.clone()
        noisy[0, 0, 0, :2] = torch.tensor(
            [-0.001, 1.001]
        )  # resampling noise, as the image processor takes it
        assert model.encode(noisy).shape == model.encode(pixels).shape
        for dtype in (torch.bfloat16, torch.float64):  # both ends are in the range
            model.encode(torch.tensor([0, 1], dtype=dtype).repeat(3, 16, 8)[None])


def test_no_images_have_no_codes_and_no_scores(composites):
    for model in composites.values():
        nothing = torch.rand(0, 3, 16, 16)
        codes, scores = model.encode(nothing), model.score(nothing)
        assert (
            len(codes) == len(scores.bits_per_code) == len(scores.bits_map) == len(model.decode(codes)) == 0
        )


def test_codes_that_are_none_make_no_images(composites):
    flat = composites["pixelcnn"].encode(torch.rand(2, 3, 16, 16)).flatten(1)
    for codes in (flat, flat.unflatten(1, (4, 4))[0]):  # of a table, and of one image
        with pytest.raises(ValueError, match=r"codes have shape .*expected \(batch, height, width\)"):
            composites["pixelcnn"].decode(codes)
    for model in composites.values():
        codes = model.encode(torch.rand(2, 3, 16, 16))
        for dtype in (torch.float32, torch.bool):
            with pytest.raises(ValueError, match=f"codes are {dtype}: expected whole numbers"):
                model.decode(codes.to(dtype))
        for dtype in (torch.uint8, torch.int16, torch.int32):  # as they are stored
            assert torch.equal(model.decode(codes.to(dtype)), model.decode(codes))


def test_latents_that_overflow_float16_have_no_codes(composite):
    tokenizer = copy.deepcopy(composite.vqvae)
    with torch.no_grad():
        tokenizer.encoder.project.weight.fill_(1e4)
    tokenizer.half()
    tokenizer.quantizer.float()
    with pytest.raises(ValueError, match="latents of image 0 are not finite.*overflow float16.*in float32"):
        tokenizer.encode(torch.rand(1, 3, 16, 16))


def test_a_damaged_tokenizer_makes_no_pixels(composite):
    codes = torch.zeros(1, *composite.prior.config.code_shape, dtype=torch.long)
    for name in ("decoder.to_pixels.weight", "decoder.project.0.weight"):
        with pytest.raises(ValueError, match="decoded pixels of image 0 are not finite"):
            broken(composite.vqvae, name, math.nan).decode(codes)
    damaged = copy.deepcopy(composite.vqvae)
    damaged.quantizer.codebook[0, 0] = math.inf
    with pytest.raises(ValueError, match="codebook vectors of image 0 are not finite"):
        damaged.decode(codes)


def test_a_damaged_prior_draws_and_scores_nothing(composites):
    pixels = torch.rand(1, 3, 16, 16)
    for name, sound in composites.items():
        for value in (math.nan, math.inf, -math.inf):  # -inf would only exclude the code, in silence
            model = broken(sound, last_bias(sound), value)
            for backend in backends(name):
                for options in ({}, {"guidance_scale": 2.0}, {"top_k": 3}, {"top_p": 0.5}):
                    with pytest.raises(ValueError, match="logits are not finite"):
                        model.generate(2, 0, seed=0, backend=backend, **options)
            for action in (model.score, lambda x, m=model: m.inpaint(x, MASK, num_particles=2, seed=0)):
                with pytest.raises(
                    ValueError, match="logits of .*image 0.* are not finite|logits of particles"
                ):
                    action(pixels)


def test_a_prior_that_overflows_float16_draws_nothing(composites):
    for sound in composites.values():
        model = broken(sound, last_bias(sound), 60000.0)
        model.prior.half()
        with torch.no_grad():
            dict(model.named_parameters())[last_bias(sound)].mul_(1.09).mul_(1.09)
        with pytest.raises(ValueError, match="logits are not finite"):
            model.generate(1, seed=0, backend="eager")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 1e-39])
def test_settings_that_float32_does_not_hold_are_refused(composites, value):
    for name, model in composites.items():
        for backend in backends(name):
            with pytest.raises(ValueError, match="temperature is .* float32 holds"):
                model.generate(1, temperature=value, backend=backend)
            if value != 1e-39:  # next to no guidance
                with pytest.raises(ValueError, match="guidance_scale is .* float32 holds"):
                    model.generate(1, 0, guidance_scale=value, backend=backend)


def test_settings_that_overflow_with_the_logits_are_refused_by_every_backend(composites):
    for name, sound in composites.items():
        model = broken(sound, last_bias(sound), 100.0)
        for backend in backends(name):
            for options in ({"temperature": 1.2e-38}, {"guidance_scale": 3.4e38, "temperature": 1e-3}):
                with pytest.raises(ValueError, match="logits are not finite.*milder settings"):
                    model.generate(2, 0, seed=0, backend=backend, **options)
            codes = sound.generate(2, 0, seed=0, backend=backend, temperature=1e30).codes
            assert len(codes.unique()) > 2, "all codes are alike at a high temperature"


def test_compiled_and_eager_draws_agree_near_the_limit_of_float32():
    from isic_vq.models import pixelcnn_compiled

    uniform = torch.tensor([0.5], dtype=torch.float64)
    for dtype, largest in ((torch.float32, 3e38), (torch.float64, 1e308)):
        for temperature in (1.0, 0.5):
            logits = torch.tensor([0.0, -largest, 1.0], dtype=dtype)
            total = torch.zeros((), dtype=torch.float64)
            expected = Sampling(temperature=temperature).draw(logits[None], uniform, total=total).item()
            code = pixelcnn_compiled.draw_code(logits.numpy(), logits.numpy(), 1.0, temperature, 0.5)
            if temperature == 1:
                assert math.isfinite(total)
                assert code == expected
            else:
                assert not math.isfinite(total)
                assert code == pixelcnn_compiled.NOT_FINITE


def test_forward_says_nothing_so_that_it_stays_traceable(composites):
    for sound in composites.values():
        model = broken(sound, last_bias(sound), math.nan)
        codes = torch.zeros(1, *model.prior.config.code_shape, dtype=torch.long)
        assert model.predict(codes).isnan().any()
        assert model(torch.full((1, 3, 16, 16), math.nan)).reconstruction.isnan().any()


def test_autocast_changes_no_code_of_a_pixelcnn(composite, make_prior):
    pixels = torch.rand(1, 3, 16, 16)
    actions = [
        lambda: composite.generate(3, 0, seed=0, guidance_scale=1.5, backend="eager").codes,
        lambda: composite.generate(3, 0, seed=0, backend="compiled").codes,
        lambda: composite.inpaint(pixels, MASK, num_particles=3, seed=0).codes,
        lambda: make_prior(architecture="plain").sample(torch.full((2, 16), 0.3, dtype=torch.float64)),
    ]
    for action in actions[:3]:
        expected = action()
        with torch.autocast("cpu", torch.bfloat16):
            codes = action()
        assert codes.shape == expected.shape
    plain = actions[3]()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(actions[3](), plain)
        assert torch.equal(
            actions[0](), composite.generate(3, 0, seed=0, guidance_scale=1.5, backend="eager").codes
        )
