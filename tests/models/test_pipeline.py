"""The diffusers pipeline: the same codes and pixels as the model, in diffusers' forms."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from isic_vq import IsicVQImageProcessor, IsicVQModel, IsicVQPipeline

ROWS = 4  # of a tiny model's code grid


@pytest.fixture(scope="module")
def pipe(composite_folder):
    pipe = IsicVQPipeline.from_pretrained(composite_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def expected(composite):
    return composite.generate(3, "nevus", seed=5)


def images_of(pipe, output_type):
    return pipe("nevus", num_images=3, seed=5, output_type=output_type).images


def test_it_is_a_diffusers_pipeline_and_returns_diffusers_output(pipe):
    assert isinstance(pipe, DiffusionPipeline)
    output = pipe(seed=0)
    assert isinstance(output, ImagePipelineOutput)
    assert len(output.images) == 1


def test_latent_images_are_the_models_codes(pipe, expected):
    assert torch.equal(images_of(pipe, "latent"), expected.codes)


def test_pt_images_are_the_models_pixel_values(pipe, expected):
    assert torch.equal(images_of(pipe, "pt"), expected.pixel_values)


def test_np_images_are_the_same_with_channels_last(pipe, expected):
    images = images_of(pipe, "np")
    assert images.shape == (3, 16, 16, 3)
    assert np.array_equal(images, expected.pixel_values.permute(0, 2, 3, 1).numpy())


def test_pil_images_are_those_of_the_image_processor(pipe, expected):
    processed = IsicVQImageProcessor(size=16).postprocess(expected.pixel_values)
    for image, wanted in zip(images_of(pipe, "pil"), processed, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(wanted))


def test_a_tuple_is_returned_on_request(pipe, expected):
    (images,) = pipe("nevus", num_images=3, seed=5, output_type="latent", return_dict=False)
    assert torch.equal(images, expected.codes)


def test_one_image_per_label_by_default(pipe):
    for labels in (["nevus", "melanoma"], np.array(["nevus", "melanoma"]), torch.tensor([1, 0])):
        assert len(pipe(labels, seed=0).images) == 2


def test_one_generator_serves_all_images(pipe, composite):
    codes = pipe(num_images=3, generator=torch.Generator().manual_seed(2), output_type="latent").images
    wanted = composite.generate(3, generator=torch.Generator().manual_seed(2)).codes
    assert torch.equal(codes, wanted)


def test_a_list_of_generators_serves_one_image_each(pipe, composite):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (2, 9)]

    codes = pipe(num_images=2, generator=generators(), output_type="latent").images
    assert torch.equal(codes, composite.generate(2, generator=generators()).codes)


def test_sampling_settings_reach_the_model(pipe, composite):
    settings = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "guidance_scale": 1.5, "batch_size": 2}
    codes = pipe("nevus", num_images=3, seed=1, output_type="latent", **settings).images
    assert torch.equal(codes, composite.generate(3, "nevus", seed=1, **settings).codes)
    assert not torch.equal(codes, composite.generate(3, "nevus", seed=1, batch_size=2).codes)


def test_dtypes_are_given_by_part(composite_folder):
    dtypes = {"vqvae": torch.bfloat16, "default": torch.float16}
    pipe = IsicVQPipeline.from_pretrained(composite_folder, dtype=dtypes)
    assert (pipe.vqvae.dtype, pipe.prior.dtype) == (torch.bfloat16, torch.float16)
    assert pipe.vqvae.quantizer.codebook.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype names a part 'decoder': expected 'vqvae', 'prior' or"):
        IsicVQPipeline.from_pretrained(composite_folder, dtype={"decoder": torch.float16})


@pytest.mark.parametrize(("num_images", "batch_size", "blocks"), [(1, 16, 1), (3, 2, 2), (4, 2, 2)])
def test_callback_is_called_after_every_row_of_every_block(pipe, num_images, batch_size, blocks):
    calls = []
    pipe(
        num_images=num_images,
        seed=0,
        batch_size=batch_size,
        callback_on_step_end=lambda *arguments: calls.append(arguments),
    )
    assert calls == [(pipe, step, step, {}) for step in range(ROWS * blocks)]


def test_progress_is_shown_in_rows(composite_folder, capsys):
    pipe = IsicVQPipeline.from_pretrained(composite_folder)
    pipe(num_images=3, seed=0, batch_size=2)
    assert "8/8" in capsys.readouterr().err


def test_a_part_may_come_from_elsewhere(composite_folder, make_prior):
    prior = make_prior()
    torch.nn.init.zeros_(prior.code_embedding.weight)
    pipe = IsicVQPipeline.from_pretrained(composite_folder, prior=prior)
    pipe.set_progress_bar_config(disable=True)
    wanted = IsicVQModel.from_parts(IsicVQModel.from_pretrained(composite_folder).vqvae, prior)
    codes = pipe(num_images=2, seed=0, output_type="latent").images
    assert torch.equal(codes, wanted.generate(2, seed=0).codes)


def test_saving_the_pipeline_is_saving_the_model(pipe, composite_folder, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    assert names == {path.relative_to(composite_folder) for path in composite_folder.rglob("*.*")}
    for name in names:
        assert (tmp_path / name).read_bytes() == (composite_folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"output_type": "jpeg"},
            ValueError,
            "output_type is 'jpeg': expected 'pil', 'np', 'pt' or 'latent'",
        ),
        ({"labels": "freckle"}, ValueError, "freckle"),
        ({"seed": 0, "generator": torch.Generator()}, ValueError, "seed and generator are both given"),
        ({"num_images": 0}, ValueError, "num_images is 0"),
        ({"num_steps": 5}, TypeError, "num_steps"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(pipe, arguments, error, text):
    with pytest.raises(error, match=text):
        pipe(**arguments)


def test_a_folder_of_another_model_is_refused(composite_folder):
    with pytest.raises(RuntimeError, match="mismatch"):
        IsicVQPipeline.from_pretrained(composite_folder / "prior")
