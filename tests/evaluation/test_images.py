"""Images measured one by one: rows, labels and values stay together, and parts of a data set are its own means."""

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from isic_vq.data.sources import find_source
from isic_vq.evaluation.appearance import (
    coherence,
    grid_power,
    octave_power,
    octaves,
    texture,
    third_colours,
)
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import MIN_GROUP, group_metrics, measure_images, worst_reconstructions
from isic_vq.evaluation.reconstruction import image_metrics
from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

SIZE, NUMBER = 104, 2 * MIN_GROUP + 5
CLASSES = {0: "melanoma", 1: "nevus"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vqvae = {"image_size": SIZE, "hidden_sizes": (4, 4, 4), "residual_size": 4, "num_codes": 8, "code_dim": 4}
    prior = {
        "num_codes": 8,
        "grid_size": SIZE // 8,
        "hidden_size": 8,
        "num_layers": 1,
        "head_size": 8,
        "id2label": CLASSES,
    }
    return IsicVQModel(IsicVQConfig(vqvae_config=vqvae, prior_config=prior)).eval()


def diagnosis(index):
    return ["melanoma", "nevus", "vascular_lesion"][min(index // MIN_GROUP, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two diagnoses of the model's and a few of another; the sixth is broken; sex known of some."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    lines = ["file_name,isic_id,diagnosis,sex,source"]
    for index in range(NUMBER):
        name = f"{index:03}.png"
        if index == 5:
            (folder / name).write_bytes(b"no image")
        else:
            pixels = generator.integers(0, 20 + 9 * index, (SIZE, SIZE, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        sex = "female" if index < MIN_GROUP + 3 else ""
        lines.append(f"{name},ISIC_{index:03},{diagnosis(index)},{sex},here")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def measured(model, folder):
    return measure_images(model, find_source(f"folder:{folder}"), max_corrupt_share=0.2)


READ = [index for index in range(NUMBER) if index != 5]


def test_rows_labels_codes_and_values_are_of_the_same_image(model, folder, measured):
    assert [row["isic_id"] for row in measured.rows] == [f"ISIC_{index:03}" for index in READ]
    assert measured.indices == READ
    assert measured.labels.tolist() == [
        {"melanoma": 0, "nevus": 1}.get(diagnosis(index), 2) for index in READ
    ]
    processor = IsicVQImageProcessor(size=SIZE)
    for place, index in ((4, 4), (5, 6), (20, 21)):
        image = processor(str(folder / f"{index:03}.png"), return_tensors="pt")["pixel_values"]
        codes = model.encode(image)
        assert torch.equal(measured.codes[place], codes[0])
        expected = image_metrics(image, model.decode(codes))
        for name, value in expected.items():
            assert measured.reconstruction.values[name][place].item() == pytest.approx(
                value.item(), rel=1e-4
            ), name


def test_every_measure_has_a_value_per_image(measured):
    values = measured.reconstruction.values
    assert values.keys() == {"psnr", "ssim", "ms_ssim", "l1", "mse"}
    assert {len(of) for of in values.values()} == {NUMBER - 1}


def test_the_look_of_images_and_of_what_came_back_is_measured_in_8_bits(model, folder, measured):
    processor = IsicVQImageProcessor(size=SIZE)
    files = [str(folder / f"{index:03}.png") for index in READ]
    images = torch.cat([processor(name, return_tensors="pt")["pixel_values"] for name in files])
    decoded = (model.decode(model.encode(images)) * 255).round() / 255
    for kind, pixels in (("real", images), ("reconstructions", decoded)):
        lines = {
            line.text: line
            for line in measured.appearance[kind].metrics(MeasuredOn("test", "here"), 0, images=kind)
        }
        assert all(line.n == len(READ) and line.interval is not None for line in lines.values())
        wanted = {f"texture[{kind}]": texture(pixels).mean()}
        for column, period in enumerate((8, 4, 2)):
            values = grid_power(pixels, (8, 4, 2))[:, column].sort().values
            wanted[f"grid_power_mean[{kind}, {period} px]"] = values.mean()
            wanted[f"grid_power_median[{kind}, {period} px]"] = values.quantile(0.5)
            wanted[f"grid_power_worst_tenth[{kind}, {period} px]"] = values[-3:].mean()
        for (low, high), value in zip(octaves(SIZE), octave_power(pixels).mean(0), strict=True):
            wanted[f"octave_power[{kind}, {low}-{high} px]"] = value
        for channel, value in zip(("red", "green", "blue"), coherence(third_colours(pixels)), strict=True):
            wanted[f"coherence[{kind}, {channel}]"] = value
        got = {name: line.value for name, line in lines.items()}
        assert got == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-3)


def test_the_perceptual_distance_is_asked_for_originals_and_reconstructions(model, folder):
    seen = []

    def mean_difference(images, others):
        seen.append(len(images))
        return (images - others).abs().mean((1, 2, 3))

    measured = measure_images(model, find_source(f"folder:{folder}"), 0.2, mean_difference)
    values = measured.reconstruction.values
    assert sum(seen) == NUMBER - 1
    torch.testing.assert_close(values["lpips"], values["l1"], rtol=1e-4, atol=1e-6)


def test_groups_have_their_own_mean_and_students_interval(measured):
    psnr = measured.reconstruction.values["psnr"]
    found = {
        metric.text: metric
        for metric in group_metrics(measured, {"psnr": psnr}, MeasuredOn("test", measured.info.name))
    }
    members = [place for place, index in enumerate(READ) if index < MIN_GROUP + 3]
    own = psnr[members].numpy()
    metric = found["psnr[sex=female]"]
    assert (metric.value, metric.n, metric.unit, metric.split) == (
        pytest.approx(own.mean()),
        len(members),
        "dB",
        "test",
    )
    expected = scipy.stats.t.interval(0.95, len(own) - 1, own.mean(), scipy.stats.sem(own))
    assert metric.interval == pytest.approx(list(expected))
    assert metric.group == ("sex", "female")
    assert found["psnr[sex=unknown]"].n == NUMBER - 1 - len(members)


def test_small_groups_and_columns_of_one_group_are_left_out(measured):
    psnr = measured.reconstruction.values["psnr"]
    names = {
        metric.text
        for metric in group_metrics(measured, {"psnr": psnr}, MeasuredOn("test", measured.info.name))
    }
    assert "psnr[diagnosis=nevus]" in names
    assert not any("vascular_lesion" in name for name in names), "fewer than MIN_GROUP images"
    assert not any("melanoma" in name for name in names), "one of them could not be read"
    assert not any("source=" in name or "site=" in name for name in names), "all are the same"


def test_the_worst_reconstructions_are_read_again_in_the_order_of_their_psnr(model, folder, measured):
    images, decoded = worst_reconstructions(model, measured, 6)
    order = measured.reconstruction.values["psnr"].argsort()[:6]
    processor = IsicVQImageProcessor(size=SIZE)
    for place, row in enumerate(order.tolist()):
        name = f"{READ[row]:03}.png"
        expected = processor(str(folder / name), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(images[place], expected)
        assert torch.allclose(decoded[place], model.decode(model.encode(expected[None]))[0], atol=1e-5)
