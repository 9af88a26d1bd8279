"""`push_to_hub` of a model and of the diffusers pipeline: what arrives is what is saved, and it opens."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers.modeling_utils import PreTrainedModel

from isic_vq import IsicVQConfig, IsicVQModel, IsicVQPipeline, VQVAEModel
from isic_vq.models.upload import HubError

REPO = "user/tiny"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = IsicVQConfig(
        vqvae_config={"image_size": 16, "hidden_sizes": (4, 4), "num_codes": 7, "code_dim": 3},
        prior_config={"num_codes": 7, "grid_size": 4, "hidden_size": 8, "num_layers": 1, "head_size": 8},
        license="cc-by-4.0",
    )
    return IsicVQModel(config).eval()


def saved_files(model, folder):
    model.save_pretrained(folder)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_model_is_what_is_saved_with_a_plain_card(online_hub, model, tmp_path):
    model.push_to_hub(REPO, tags=["mine"])
    files = set(online_hub.files(REPO)) - {".gitattributes"}
    assert files == saved_files(model, tmp_path) | {"README.md"}
    card = ModelCard(online_hub.read(REPO, "README.md").decode())
    assert card.data.license == "cc-by-4.0"
    assert "mine" in card.data.tags
    assert card.data.eval_results is None


def test_a_push_takes_the_arguments_that_transformers_documents(online_hub, model):
    model.push_to_hub(
        REPO, commit_description="Trained on planted data.", max_shard_size="1GB", safe_serialization=True
    )
    bodies = [entry[4] for entry in online_hub.log if "/commit/" in entry[1]]
    assert any("Trained on planted data." in str(body) for body in bodies)


def test_a_pushed_model_opens_with_the_same_codes(online_hub, model):
    model.push_to_hub(REPO)
    opened = IsicVQModel.from_pretrained(REPO)
    assert torch.equal(opened.generate(3, seed=0).codes, model.generate(3, seed=0).codes)
    tokenizer = VQVAEModel.from_pretrained(REPO, subfolder="vqvae")
    assert torch.equal(tokenizer.quantizer.codebook, model.vqvae.quantizer.codebook)


def test_one_push_is_one_commit_and_a_second_of_the_same_is_none(online_hub, model):
    model.push_to_hub(REPO)
    commits = len(online_hub.commits(REPO))
    model.push_to_hub(REPO)
    assert len(online_hub.commits(REPO)) == commits == 2  # the Hub's own first one, and ours


def test_weights_that_would_win_and_what_described_them_are_gone(online_hub, model, tmp_path):
    api = HfApi()
    api.create_repo(REPO)
    PreTrainedModel.save_pretrained(model, tmp_path / "old")  # one weights file at the root
    (tmp_path / "old" / "reports").mkdir()
    (tmp_path / "old" / "reports" / "validation.json").write_text("{}")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "old")
    model.push_to_hub(REPO)
    assert not {"model.safetensors", "reports/validation.json"} & set(online_hub.files(REPO))


def test_save_pretrained_pushes_on_request(online_hub, model, tmp_path):
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id=REPO, private=True)
    assert (tmp_path / "tiny" / "model_index.json").is_file()
    assert HfApi().repo_info(REPO).private
    assert "vqvae/model.safetensors" in online_hub.files(REPO)


def test_without_a_name_the_repository_is_called_as_the_folder(online_hub, model, tmp_path):
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True)
    assert "config.json" in online_hub.files("user/tiny")


def test_a_pull_request_changes_nothing_until_it_is_merged(online_hub, model):
    HfApi().create_repo(REPO)
    address = model.push_to_hub(REPO, create_pr=True)
    assert "/discussions/" in address
    assert set(online_hub.files(REPO)) == {".gitattributes"}


def test_a_branch_is_made_for_a_revision(online_hub, model):
    model.push_to_hub(REPO, revision="trial")
    assert "config.json" in online_hub.files(REPO, "trial")
    assert "config.json" not in online_hub.files(REPO)


def test_the_diffusers_pipeline_pushes_the_model(online_hub, model):
    IsicVQPipeline(model.vqvae, model.prior).push_to_hub(REPO)
    pipe = IsicVQPipeline.from_pretrained(REPO)
    pipe.set_progress_bar_config(disable=True)
    codes = pipe(num_images=3, seed=0, output_type="latent").images
    assert torch.equal(codes, model.generate(3, seed=0).codes)


def test_somebody_elses_repository_is_refused_in_one_sentence(online_hub, model):
    online_hub.create("other/theirs")
    with pytest.raises(HubError, match="your token may not do this with other/theirs"):
        model.push_to_hub("other/theirs")


def test_a_bare_name_is_written_whole_into_the_card(online_hub, model):
    model.push_to_hub("tiny")
    assert 'pipeline(model="user/tiny"' in online_hub.read(REPO, "README.md").decode()


def test_the_licence_goes_through_the_diffusers_pipeline(online_hub, model, tmp_path):
    model.save_pretrained(tmp_path)
    IsicVQPipeline.from_pretrained(tmp_path).push_to_hub(REPO)
    assert ModelCard(online_hub.read(REPO, "README.md").decode()).data.license == "cc-by-4.0"
    assert IsicVQModel.from_pretrained(REPO).config.license == "cc-by-4.0"
