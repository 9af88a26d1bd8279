import json

import numpy as np
import pytest
import torch
from transformers import pipeline

from isic_vq import IsicVQImageProcessor, UnconditionalImageGenerationPipeline

TASK = "unconditional-image-generation"


@pytest.fixture(scope="module")
def pipe(composite_folder):
    return pipeline(TASK, model=composite_folder)


# --- opening -------------------------------------------------------------------------------------------------------

OPEN_AND_GENERATE = """
import json, sys
pipe = pipeline("unconditional-image-generation", model=sys.argv[1])
output = pipe("melanoma", num_images=3, seed=0, output_type="np", return_codes=True)
print(json.dumps({"class": type(pipe).__name__, "codes": output["codes"].tolist(), "pixels": output["images"].tolist()}))
"""
IMPORT_ORDERS = {
    "isic_vq first": "import isic_vq\nfrom transformers import pipeline",
    "transformers first": "from transformers import pipeline\nimport isic_vq",
    "our pipeline first": "from isic_vq import UnconditionalImageGenerationPipeline\nfrom transformers import pipeline",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORT_ORDERS.values(), ids=IMPORT_ORDERS)
def test_pipeline_opens_a_folder_in_a_fresh_process(run_python, composite_folder, pipe, imports):
    printed = json.loads(run_python(imports + OPEN_AND_GENERATE, composite_folder).splitlines()[-1])
    here = pipe("melanoma", num_images=3, seed=0, output_type="np", return_codes=True)
    assert printed["class"] == "UnconditionalImageGenerationPipeline"
    assert printed["codes"] == here["codes"].tolist(), "another process drew other codes from the same seed"
    assert printed["pixels"] == here["images"].tolist()


def test_pipeline_has_the_class_of_the_package(pipe):
    assert type(pipe) is UnconditionalImageGenerationPipeline
    assert not pipe.model.training


def test_pipeline_takes_a_model_object(composite):
    assert len(pipeline(TASK, model=composite)(num_images=2, seed=0)) == 2


def test_pipeline_refuses_a_part(composite, tmp_path):
    composite.vqvae.save_pretrained(tmp_path)
    for part, kind in ((tmp_path, "isic_vqvae"), (composite.prior, "isic_pixelcnn")):
        with pytest.raises(ValueError, match=f"the model is an {kind}: .* one isic_vq.*from_parts"):
            pipeline(TASK, model=part)


# --- what comes out ------------------------------------------------------------------------------------------------


def test_images_are_rgb_of_the_models_size(pipe):
    images = pipe(num_images=3, seed=0)
    assert [(image.mode, image.size) for image in images] == [("RGB", (16, 16))] * 3


def test_one_image_is_a_list_of_one(pipe):
    assert len(pipe(seed=0)) == 1


def test_output_types_hold_the_same_images(pipe):
    pil = np.stack([np.asarray(image) for image in pipe(num_images=3, seed=0)])
    array = pipe(num_images=3, seed=0, output_type="np")
    tensor = pipe(num_images=3, seed=0, output_type="pt")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, pil)
    np.testing.assert_array_equal((tensor * 255).round().permute(0, 2, 3, 1).byte().numpy(), pil)


def test_pipeline_is_generate_and_postprocess(pipe, composite):
    expected = composite.generate(3, "nevus", seed=2, temperature=0.9, guidance_scale=1.5, top_k=5)
    output = pipe(
        "nevus", num_images=3, seed=2, temperature=0.9, guidance_scale=1.5, top_k=5, return_codes=True
    )
    assert torch.equal(output["codes"], expected.codes)
    assert output["images"] == IsicVQImageProcessor(size=16).postprocess(expected.pixel_values)


def test_return_codes_gives_images_codes_and_labels(pipe, composite):
    output = pipe(["mel", "df"], seed=0, return_codes=True, output_type="pt")
    assert set(output) == {"images", "codes", "labels"}
    assert output["labels"].tolist() == [0, 2]
    assert output["codes"].shape == (2, 4, 4)
    decoded = composite.decode(output["codes"])
    assert (output["images"] - decoded).abs().max() <= 0.5 / 255 + 1e-6, (
        "the codes are not those of the images"
    )


# --- what goes in --------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_images(pipe):
    assert pipe(num_images=4, seed=7) == pipe(num_images=4, seed=7)


def test_another_seed_or_none_gives_other_images(pipe):
    images = [pipe(num_images=2, seed=seed, output_type="np").tobytes() for seed in (7, 8, None, None)]
    assert len(set(images)) == 4


def test_generation_leaves_the_global_generator_alone(pipe):
    before = torch.get_rng_state()
    pipe(seed=None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_batch_size_changes_no_code(pipe, batch_size):
    labels = ["mel", "nv", "df", 0, 1]
    expected = pipe.model.generate(5, labels, seed=1)
    output = pipe(labels, seed=1, batch_size=batch_size, return_codes=True)
    assert torch.equal(output["codes"], expected.codes)
    assert output["labels"].tolist() == expected.labels.tolist()


def test_labels_set_the_number_of_images(pipe):
    for labels in (["mel", "nv", "df"], np.array(["mel", "nv", "df"]), torch.tensor([0, 1, 0])):
        assert len(pipe(labels, seed=0)) == 3


@pytest.mark.parametrize("label", ["nevus", "NV", 1, "1"])
def test_one_label_counts_for_all_images(pipe, label):
    assert pipe(label, num_images=2, seed=0, return_codes=True)["labels"].tolist() == [1, 1]


def test_no_label_is_unconditional(pipe):
    assert pipe(num_images=2, seed=0, return_codes=True)["labels"].tolist() == [3, 3]


def test_progress_bar_counts_every_row_of_every_batch(pipe, capsys):
    pipe(num_images=5, batch_size=2, seed=0, progress=True)
    assert "12/12" in capsys.readouterr().err  # 3 batches of 4 rows


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_images": 0}, "num_images is 0: expected a whole number of at least 1"),
        ({"labels": []}, "num_images is 0"),
        ({"batch_size": 0}, "batch_size is 0: expected 1 to 4096"),
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"labels": "scc"}, "not a class of this model. Classes: 0 = melanoma"),
        ({"labels": ["mel", "nv"], "num_images": 3}, "2 labels for 3 images"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": 0}, "temperature is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"output_type": "latent"}, "'pil', 'np' or 'pt', got 'latent'"),
    ],
)
def test_pipeline_refuses_what_has_no_meaning(pipe, arguments, text):
    with pytest.raises(ValueError, match=text):
        pipe(**arguments)


def test_unknown_arguments_are_refused_by_the_name_of_what_was_called(pipe, composite_folder):
    match = "UnconditionalImageGenerationPipeline got an unexpected argument 'guidance'"
    with pytest.raises(TypeError, match=match):
        pipe(guidance=2)
    with pytest.raises(TypeError, match=match):
        pipeline(TASK, model=composite_folder, guidance=2)


def test_generators_are_those_of_generate_over_all_batches(pipe, composite):
    def one():
        return torch.Generator().manual_seed(3)

    def several():
        return [torch.Generator().manual_seed(index) for index in range(5)]

    for make in (one, several):
        expected = composite.generate(5, "nevus", generator=make())
        output = pipe("nevus", num_images=5, generator=make(), batch_size=2, return_codes=True)
        assert torch.equal(output["codes"], expected.codes)
