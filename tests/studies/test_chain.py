"""A chain trains both stages, goes on where it was stopped, and refuses other settings."""

import dataclasses

import pytest
import torch
from tiny_study import PRIOR, VQVAE

import chain as chains
from chain import Chain
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

pytestmark = pytest.mark.slow  # all compare with one trained chain


def chain_in(folder, uris, **changes):
    model = {**VQVAE["model"], "hidden_sizes": [4, 8]}
    return Chain(folder, uris["train"], uris["validation"], 3, {**VQVAE, "model": model}, PRIOR, **changes)


@pytest.fixture(scope="module")
def finished(two_sources, tmp_path_factory):
    chain = chain_in(tmp_path_factory.mktemp("chain") / "whole", two_sources)
    chain.run()
    return chain


def weights(chain):
    return load_model(IsicVQModel, str(chain.model)).state_dict()


def test_a_stopped_chain_ends_with_the_weights_of_one_that_was_not(
    finished, two_sources, tmp_path, monkeypatch
):
    chain = chain_in(tmp_path / "stopped", two_sources)
    for name in ("_encode", "train_prior"):

        def stop(*arguments, **more):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(chains, name, stop)
            with pytest.raises(KeyboardInterrupt):
                chain.run()
        assert not chain.is_finished
    chain.run()
    assert chain.is_finished
    whole, stopped = weights(finished), weights(chain)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_finished_chain_trains_nothing(finished, monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError("trained again")

    monkeypatch.setattr(chains, "train_vqvae", refuse)
    monkeypatch.setattr(chains, "train_prior", refuse)
    finished.run()


def test_a_folder_of_other_settings_is_refused(finished):
    other = dataclasses.replace(finished, seed=4)
    with pytest.raises(ValueError, match="was begun with vqvae.loop.seed = 3, and this is 4"):
        other.run()


def test_both_runs_have_the_chains_seed_and_images(finished, two_sources):
    text = (finished.folder / "settings.json").read_text()
    assert text.count('"seed": 3') == 2
    assert (finished.folder / "vqvae" / "recipe.yaml").is_file()
    assert (finished.folder / "train.parquet").is_file()
