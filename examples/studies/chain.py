"""A tokenizer and its prior, trained one after the other in one folder, from wherever an earlier attempt stopped.

    FOLDER/vqvae/   the tokenizer's run        FOLDER/train.parquet, validation.parquet   codes
    FOLDER/prior/   the prior's run; prior/model is the whole model

A stage whose `report.json` is there is finished: it is the last file that a run writes. Every stage is the same as
its command's, `isic-vq train` and `isic-vq encode`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isic_vq.data.encoding import Encoding, encode_to_file
from isic_vq.data.parts import open_part
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.load import build_recipe
from isic_vq.training.prior import train_prior
from isic_vq.training.recipe import PriorRecipe, Recipe, VQVAERecipe, public_recipe
from isic_vq.training.vqvae import train_vqvae
from isic_vq.work import begin

logger = logging.getLogger(__name__)


@dataclass
class StudyRecipe:
    """What the recipes of all studies have.

    Args:
        output_dir: the study's folder, one below it per model.
        train: URI of the training images.
        validation: URI of the held-out images that the models are compared on.
        seeds: each setting is trained once with each.
        vqvae: fields of the tokenizers' recipe that all share.
        prior: fields of the priors' recipe that all share.
    """

    output_dir: str = ""
    stage: str = ""
    train: str = ""
    validation: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    vqvae: dict = field(default_factory=dict)
    prior: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """How a tokenizer and its prior are trained.

    Attributes:
        folder: of both runs and the codes between them.
        validation: URI of the images that select the weights.
        vqvae: fields of the tokenizer's recipe beyond these, as in a YAML file.
        prior: fields of the prior's recipe.
        views: dihedral views of each training image in the codes.
        labels: what tells it from other models of a study, but for the seed.
    """

    folder: Path
    train: str
    validation: str
    seed: int
    vqvae: Mapping[str, Any]
    prior: Mapping[str, Any]
    views: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The labels as tables and findings write them."""
        return ", ".join(self.labels.values())

    @property
    def model(self) -> Path:
        """Folder of the whole model, once it is trained."""
        return self.folder / "prior" / "model"

    @property
    def is_finished(self) -> bool:
        """Whether both are trained."""
        return (self.folder / "prior" / "report.json").is_file()

    def run(self) -> None:
        """Train what is not trained yet.

        Raises:
            ValueError: the folder was begun with other settings.
            DataError, RecipeError, TrainingError, CheckpointError, InterruptedTraining: as their docstrings say.
        """
        recipes: dict[str, Recipe] = {"vqvae": self._tokenizer_recipe(), "prior": self._prior_recipe()}
        settings = {name: public_recipe(recipe) for name, recipe in recipes.items()}
        begin(self.folder, {**settings, "views": self.views})
        if not (self.folder / "vqvae" / "report.json").is_file():
            train_vqvae(self._tokenizer_recipe(), resume=True)
        for name, uri, views in (("train", self.train, self.views), ("validation", self.validation, 1)):
            _encode(self.folder / "vqvae" / "model", uri, self.folder / f"{name}.parquet", views)
        if not self.is_finished:
            train_prior(self._prior_recipe(), resume=True)

    def _tokenizer_recipe(self) -> VQVAERecipe:
        data = {"train": self.train, "validation": self.validation, **self.vqvae.get("data", {})}
        loop = {**self.vqvae.get("loop", {}), "seed": self.seed}
        folder = str(self.folder / "vqvae")
        return build_recipe(VQVAERecipe, {**self.vqvae, "output_dir": folder, "data": data, "loop": loop})

    def _prior_recipe(self) -> PriorRecipe:
        places = {
            "output_dir": str(self.folder / "prior"),
            "tokenizer": str(self.folder / "vqvae" / "model"),
            "train_codes": str(self.folder / "train.parquet"),
            "validation_codes": str(self.folder / "validation.parquet"),
        }
        loop = {**self.prior.get("loop", {}), "seed": self.seed}
        return build_recipe(PriorRecipe, {**self.prior, **places, "loop": loop})


def _encode(tokenizer: Path, uri: str, output: Path, views: int) -> None:
    """Write a source's codes, unless they are there."""
    records, source = open_part(uri)
    model = load_model(VQVAEModel, str(tokenizer))
    processor = IsicVQImageProcessor(size=model.config.image_size)
    number = encode_to_file(Encoding(model, processor, records, source, views), output)
    logger.info("%s holds the codes of %s images", output.name, number)
