"""The generator of the utility study that never saw one collection: which images go where, and that it is trained on the others."""

import pytest
import yaml
from tiny_study import PRIOR, VQVAE

import leave_one_out
from isic_vq.data.sources import open_source
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel


def test_the_left_out_collection_is_split_by_diagnosis_and_the_generator_sees_none_of_it(
    two_sources, tmp_path
):
    folder = tmp_path / "study"
    recipe = {"stage": "leave-one-out", "output_dir": str(folder), **two_sources, "left_out": "south"}
    recipe |= {"site_images": 9, "seeds": [0], "vqvae": VQVAE, "prior": PRIOR}
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(recipe))
    leave_one_out.main([str(config)])
    ids = {
        part: open_source(f"parquet:{folder / 'images' / part}.parquet")["isic_id"]
        for part in ("train", "validation", "site", "test")
    }
    assert {part: len(names) for part, names in ids.items()} == {
        "train": 12,
        "validation": 10,
        "site": 9,
        "test": 13,
    }
    assert all("north" in name for name in (*ids["train"], *ids["validation"]))
    own = [*ids["site"], *ids["test"]]
    assert all("south" in name for name in own)
    assert len(set(own)) == 22
    model = folder / "generator" / "prior" / "model"
    assert load_model(IsicVQModel, str(model)).config.vqvae_config.image_size == 16
    before = (model / "config.json").stat().st_mtime_ns
    leave_one_out.main([str(config)])
    assert (model / "config.json").stat().st_mtime_ns == before, "what is trained is not trained again"


def test_a_control_sees_the_site_and_not_its_test_images(two_sources, tmp_path):
    recipe = leave_one_out.LeaveOneOutRecipe(
        output_dir=str(tmp_path), **two_sources, left_out="south", site_images=9, generator_sees_site=True
    )
    paths = leave_one_out.write_images(recipe)
    ids = {part: set(open_source(f"parquet:{path}")["isic_id"]) for part, path in paths.items()}
    assert ids["site"] < ids["train"]
    assert len(ids["train"]) == 12 + 9
    assert not ids["test"] & ids["train"]
    recipe.generator_sees_site = False
    with pytest.raises(ValueError, match="begun with generator_sees_site"):
        leave_one_out.write_images(recipe)
