import copy

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from isic_vq import VQVAEConfig, VQVAEModel
from isic_vq.models.modeling_vqvae import pixel_noise

CONV, UP, NORM, RELU = "Conv2d", "ConvTranspose2d", "BatchNorm2d", "ReLU"


@pytest.fixture(scope="module")
def model(make_vqvae):
    """Eval mode; not to be changed."""
    return make_vqvae()


def images(count=2, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def layers_in_order_of_use(part, inputs):
    """Leaf modules of a part as (class name, input, output), in the order a forward pass runs them."""
    ran = []
    hooks = [
        leaf.register_forward_hook(
            lambda module, args, output: ran.append((type(module).__name__, args[0], output))
        )
        for leaf in part.modules()
        if not list(leaf.children())
    ]
    part(inputs)
    for hook in hooks:
        hook.remove()
    return ran


# --- architecture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "grid"), [("f8", 16), ("f4", 32)])
def test_preset_turns_128_pixels_into_its_grid_and_back(preset, grid):
    config = VQVAEConfig.from_preset(preset)
    model = VQVAEModel(config).eval()
    codes = model.encode(images(1, 128))
    assert codes.shape == (1, grid, grid)
    assert config.grid_size == grid
    assert model.decode(codes).shape == (1, 3, 128, 128)


def test_unknown_preset_is_refused_by_name():
    with pytest.raises(ValueError, match=r"preset 'f16' is unknown: expected one of \['f4', 'f8'\]"):
        VQVAEConfig.from_preset("f16")


@pytest.mark.parametrize("side", [4, 12, 20])
def test_other_square_sizes_work_in_both_directions(model, side):
    codes = model.encode(images(1, side))
    assert codes.shape == (1, side // 4, side // 4)
    assert model.decode(codes).shape == (1, 3, side, side)


def test_encoder_is_convolution_norm_relu_and_ends_in_a_bare_projection(model):
    names = [name for name, *_ in layers_in_order_of_use(model.encoder, images())]
    block = [CONV, NORM, RELU, CONV, NORM]  # its last ReLU comes after the sum and is a function
    assert names == [CONV, NORM, RELU] * 2 + block + [CONV]


def test_decoder_mirrors_the_encoder_and_ends_in_a_bare_transposed_convolution(model):
    names = [name for name, *_ in layers_in_order_of_use(model.decoder, torch.zeros(1, 3, 4, 4))]
    block = [CONV, NORM, RELU, CONV, NORM]
    assert names == [CONV, NORM, RELU] + block + [UP, NORM, RELU] + [UP]


def test_a_refinement_starts_as_identity_and_sees_seven_pixels(model):
    config = copy.deepcopy(model.config)
    config.refinement_size = 4
    refined = VQVAEModel(config).eval()
    assert set(refined.state_dict()) - set(model.state_dict()) == {
        f"decoder.refinement.{layer}.{kind}"
        for layer in ("first", "second", "last")
        for kind in ("weight", "bias")
    }, "without it, a checkpoint has no tensor more than it had"
    refined.load_state_dict(model.state_dict(), strict=False)
    codes = torch.randint(7, (2, 4, 4))
    assert torch.equal(refined.decode(codes), model.decode(codes))
    layer = refined.decoder.refinement
    nn.init.ones_(layer.last.weight)
    logits = torch.randn(1, 3, 16, 16, requires_grad=True)
    layer(logits, codes[:1])[0, :, 8, 8].sum().backward()
    rows = logits.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows.tolist() == list(range(5, 12))
    assert not torch.equal(refined.decode(codes), model.decode(codes))


def test_pixel_noise_is_white():
    codes = torch.randint(512, (40, 16, 16), generator=torch.Generator().manual_seed(0))
    noise = pixel_noise(codes, 128)
    assert noise.shape == (40, 1, 128, 128)
    assert abs(noise.mean().item()) < 0.01
    assert noise.var().item() == pytest.approx(1, abs=0.01)
    for same in (noise, pixel_noise(torch.zeros(40, 16, 16, dtype=torch.long), 128)[:1]):
        spectrum = torch.fft.fft2(same - same.mean()).abs().square().mean((0, 1)) / 128**2
        assert spectrum.max() < {40: 2.5, 1: 16}[len(same)], (
            "no frequency stands out, not even of one code alone"
        )
    assert noise.mean(0).square().mean().item() == pytest.approx(1 / 40, rel=0.2), "images differ"


def test_pixel_noise_depends_on_code_and_place_alone():
    codes = torch.randint(512, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    noise = pixel_noise(codes, 16)
    assert torch.equal(pixel_noise(codes[1:2], 16), noise[1:2])
    edited = codes.clone()
    edited[1, 2, 3] += 1
    changed = (pixel_noise(edited, 16) != noise).nonzero()
    assert changed[:, 0].unique().tolist() == [1]
    assert changed[:, 2].unique().tolist() == [8, 9, 10, 11]
    assert changed[:, 3].unique().tolist() == [12, 13, 14, 15]


def test_pixel_noise_of_a_side_that_does_not_divide_the_images_takes_the_nearest_code():
    codes = torch.tensor([[[5, 6, 7], [8, 9, 10], [11, 12, 13]]])
    noise = pixel_noise(codes, 8)
    for y in range(8):
        for x in range(8):
            alone = pixel_noise(codes[:, 3 * y // 8 : 3 * y // 8 + 1, 3 * x // 8 : 3 * x // 8 + 1], 8)
            assert noise[0, 0, y, x] == alone[0, 0, y, x]


def test_a_refined_decoder_of_scales_that_do_not_divide_the_image_decodes_every_prefix():
    config = VQVAEConfig(
        image_size=16,
        hidden_sizes=[8, 8],
        num_codes=7,
        code_dim=4,
        scales=[1, 3, 4],
        num_phi=2,
        refinement_size=4,
    )
    model = VQVAEModel(config).eval()
    nn.init.ones_(model.decoder.refinement.last.weight)
    codes = model.encode(images(2))
    stages = model.decode_progressively(codes)
    assert [stage.shape for stage in stages] == [(2, 3, 16, 16)] * 3
    torch.testing.assert_close(stages[-1], model.decode(codes))


def test_space_shrinks_and_depth_grows_through_the_encoder(model):
    ran = layers_in_order_of_use(model.encoder, images())
    shapes = [tuple(output.shape[1:]) for name, _, output in ran if name == RELU]
    assert shapes[:2] == [(6, 8, 8), (8, 4, 4)]


def test_sigmoid_alone_follows_the_last_layer(model):
    decoder, inputs = model.decoder, torch.randn(2, 3, 4, 4)
    last = layers_in_order_of_use(decoder, inputs)[-1][2]
    assert torch.equal(decoder(inputs), last.sigmoid())
    assert last.min() < 0 < last.max(), "a ReLU before the sigmoid would allow no pixel below 0.5"


def test_reconstruction_lies_strictly_between_black_and_white(model):
    reconstruction = model(images()).reconstruction
    assert 0 < reconstruction.min() < reconstruction.max() < 1


def test_latents_use_both_signs(model):
    latents = model(images(8)).latents
    assert (latents < 0).any(), "a ReLU after the projection would leave half of the code space empty"
    assert (latents > 0).any()


def test_encoder_sees_pixels_centred_on_zero(model):
    first_input = layers_in_order_of_use(
        model.encoder, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    )
    assert first_input[0][1][:, 0, 0, 0].tolist() == [-1, 0, 1]


# --- paths through the model ---------------------------------------------------------------------------------------


def test_decoding_the_codes_gives_the_reconstruction(model):
    pixel_values = images(4)
    output = model(pixel_values)
    codes = model.encode(pixel_values)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(model.decode(codes), output.reconstruction, atol=1e-5, rtol=0)


def test_codes_are_int64_in_range(model):
    codes = model.encode(images(8))
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < model.config.num_codes
    assert len(codes.unique()) > 1, "premise of the other tests: the tiny model tells latents apart"


def test_an_image_in_a_batch_gets_the_codes_it_gets_alone(model):
    pixel_values = images(5)
    alone = [model.encode(image[None]) for image in pixel_values]
    assert torch.equal(model.encode(pixel_values), torch.cat(alone))


def test_without_quantization_it_is_a_plain_autoencoder(model):
    pixel_values = images()
    output = model(pixel_values, quantize=False)
    assert output.codes is None
    assert torch.equal(output.reconstruction, model.decoder(model.encoder(pixel_values)))
    assert output.commitment_loss == output.codebook_loss == 0


def test_without_quantization_the_codebook_learns_nothing(make_vqvae):
    model = make_vqvae().train()
    before = copy.deepcopy(model.quantizer.state_dict())
    model(images(), quantize=False)
    for name, tensor in model.quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"the warm-up changed {name}"


def test_encode_and_decode_leave_the_codebook_unchanged_even_in_train_mode(make_vqvae):
    model = make_vqvae().train()
    before = copy.deepcopy(model.quantizer.state_dict())
    model.decode(model.encode(images()))
    for name, tensor in model.quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"encoding changed {name}"


# --- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_loss_is_its_formula(make_vqvae, update):
    model = make_vqvae(codebook_update=update, l1_weight=0.7, mse_weight=0.3, beta=0.5)
    pixel_values = images()
    with torch.no_grad():
        output = model(pixel_values)
    difference = output.reconstruction.numpy() - pixel_values.numpy()
    latents = output.latents.permute(0, 2, 3, 1).numpy()
    vectors = model.quantizer.codebook.detach().numpy()[output.codes.numpy()]
    distance = np.square(latents - vectors).mean()
    expected = 0.7 * np.abs(difference).mean() + 0.3 * np.square(difference).mean() + 0.5 * distance
    expected += distance if update == "gradient" else 0
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def codebook_and_encoder_gradient(make_vqvae, **settings):
    model = make_vqvae(codebook_update="gradient", **settings)
    model(images()).loss.backward()
    return model.quantizer.codebook.grad, model.encoder.project.weight.grad


def test_beta_weighs_the_commitment_term_and_not_the_codebook_term(make_vqvae):
    codebook, encoder = codebook_and_encoder_gradient(make_vqvae, beta=0.25)
    codebook_4, encoder_4 = codebook_and_encoder_gradient(make_vqvae, beta=4.0)
    assert torch.equal(codebook, codebook_4), "beta sits on the codebook term: the mistake of other packages"
    assert not torch.allclose(encoder, encoder_4), "beta does not reach the encoder"


def test_gradient_codebook_learns(make_vqvae):
    model = make_vqvae(codebook_update="gradient")
    optimizer = torch.optim.SGD([model.quantizer.codebook], lr=1.0)
    losses = []
    for _ in range(20):
        output = model(images())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.codebook_loss.item())
    assert losses[-1] < losses[0] / 2, f"distance of latents to their codes went {losses[0]} -> {losses[-1]}"


def test_four_images_are_overfitted(make_vqvae):
    torch.manual_seed(0)
    settings = {"hidden_sizes": (16, 16), "num_codes": 64, "code_dim": 8, "dead_code_threshold": 0.1}
    model = make_vqvae(image_size=8, ema_decay=0.9, **settings).train()
    flat_colours = images(4, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)  # 2 x 2 squares of colour
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        output = model(flat_colours)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.mse_loss.item())
    assert losses[-1] < losses[0] / 20, f"mean squared error went {losses[0]} -> {losses[-1]}"


# --- normalisation -------------------------------------------------------------------------------------------------


def reconstruction_alone_and_in_company(make_vqvae, norm):
    pixel_values = images(4)
    alone = make_vqvae(norm=norm).train()(pixel_values[:1]).reconstruction
    return alone, make_vqvae(norm=norm).train()(pixel_values).reconstruction[:1]


def test_group_norm_makes_an_image_independent_of_its_batch_mates_in_training(make_vqvae):
    alone, in_company = reconstruction_alone_and_in_company(make_vqvae, "group")
    torch.testing.assert_close(alone, in_company, atol=1e-5, rtol=0)


def test_batch_norm_does_not(make_vqvae):
    alone, in_company = reconstruction_alone_and_in_company(make_vqvae, "batch")
    assert (alone - in_company).abs().max() > 1e-3, "premise of the group norm test: it compares something"


def test_group_norm_replaces_every_batch_norm(make_vqvae):
    kinds = {type(module) for module in make_vqvae(norm="group").modules()}
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 12), (2, 3, 14, 14), (2, 16, 16, 3)]
)
@pytest.mark.parametrize("method", ["forward", "encode", "embed"])
def test_images_of_another_shape_are_refused(model, method, shape):
    with pytest.raises(
        ValueError, match=r"pixel_values has shape .*expected \(batch, 3, side, side\).*multiple of 4"
    ):
        getattr(model, method)(torch.zeros(shape))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("switch", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_gradient_checkpointing_is_refused_rather_than_learning_each_pass_twice(model, switch):
    """It would run every layer again in the backward pass, BatchNorm's statistics and the codebook's included."""
    with pytest.raises(ValueError, match="VQVAEModel does not support activation checkpointing"):
        getattr(model, switch)()


def test_codes_of_another_tokenizer_are_refused(model):
    with pytest.raises(ValueError, match=r"expected \[0, 7\); they come from another tokenizer"):
        model.decode(torch.full((1, 4, 4), 7))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"image_size": 30}, "image_size is 30: expected a positive multiple of 8, the downsampling of 3"),
        ({"image_size": 0}, "image_size is 0"),
        ({"hidden_sizes": ()}, "hidden_sizes is empty: expected one entry per halving"),
        ({"norm": "layer"}, "norm is 'layer': expected 'batch' or 'group'"),
        ({"codebook_update": "sgd"}, "codebook_update is 'sgd': expected 'ema' or 'gradient'"),
        ({"num_codes": 0}, "num_codes is 0: expected at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0: expected a value in \[0, 1\)"),
        ({"num_codes": "many"}, "num_codes"),
    ],
)
def test_settings_that_make_no_tokenizer_are_refused(settings, text):
    with pytest.raises(StrictDataclassError, match=text):
        VQVAEConfig(**settings)
