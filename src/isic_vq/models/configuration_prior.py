"""What the configurations of all priors share: the classes, and how many codes there are in which order."""

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .checks import expect
from .sampling import Sampling


@strict
class PriorConfig(PreTrainedConfig):
    """What a prior of any kind is built from.

    The classes it is conditioned on are the entries of `id2label`; the id `len(id2label)` stands for
    "no class" (unconditional). An empty `id2label` makes an unconditional prior.

    Args:
        num_codes: K, size of the tokenizer's codebook.
        dropout: dropout probability inside each layer.
        class_dropout: probability that a training label is replaced by the unconditional id, which is
            what guidance and unconditional sampling need.
        num_clusters: clusters of whole images that it is conditioned on beside the class, see `clusters`; 0 for none.

        sampling: fields of `Sampling` that codes are drawn with where the caller names none; without any, codes are drawn from
            the prior's own distribution.

    Attributes:
        of_tokenizer: fields that are the tokenizer's.
    """

    base_config_key = "prior_config"
    of_tokenizer: ClassVar[tuple[str, ...]] = ("num_codes",)

    num_codes: int = 512
    dropout: float | int = 0.1
    class_dropout: float | int = 0.1
    num_clusters: int = 0
    sampling: dict | None = None

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]  # signature set by transformers
        # Without this transformers fills in two placeholder classes, LABEL_0 and LABEL_1.
        # In the order of the ids: a file has them in that of their digits.
        if not isinstance(self.id2label, dict | None):
            raise ValueError(
                f"id2label is a {type(self.id2label).__name__}: expected ids and names of classes"
            )
        names = {int(index): name for index, name in (self.id2label or {}).items()}
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("id2label holds names that are not text")
        self.id2label = dict(sorted(names.items()))
        self.label2id = {name: index for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)

    def validate_sampling(self) -> None:
        """Check the settings of sampling; called by `strict` at construction."""
        _ = self.default_sampling

    @property
    def default_sampling(self) -> Sampling:
        """How codes are drawn where the caller does not say.

        Raises:
            ValueError: `sampling` holds another field, or one out of its range.
        """
        try:
            return Sampling(**(self.sampling or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sampling is {self.sampling!r}: {error}") from None

    @property
    def unconditional_id(self) -> int:
        """The label that means "no class"."""
        return len(self.id2label)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of an image's codes, as the tokenizer's config has it."""
        raise NotImplementedError

    @property
    def sizes(self) -> list[int]:
        """Codes of each grid."""
        raise NotImplementedError

    @property
    def least_parameters(self) -> int:
        """A lower bound of the number of parameters."""
        raise NotImplementedError

    @property
    def num_positions(self) -> int:
        """Codes of an image."""
        return math.prod(self.code_shape)

    @property
    def num_steps(self) -> int:
        """Steps in which images are drawn, after each of which progress is told."""
        raise NotImplementedError

    def validate_classes(self) -> None:
        """Check classes and probabilities; called by `strict` at construction."""
        ids = sorted(int(index) for index in self.id2label or {})
        if ids != list(range(len(ids))):
            raise ValueError(
                f"id2label has the ids {ids}: expected 0, 1, 2 and so on; the id after the last is unconditional"
            )
        names = list((self.id2label or {}).values())
        twice = sorted(name for name in {*names} if names.count(name) > 1)
        if twice:
            raise ValueError(
                f"id2label names {twice} more than once: expected a name of its own for each class"
            )
        for name in ("dropout", "class_dropout"):
            expect(0 <= getattr(self, name) < 1, name, getattr(self, name), "a probability in [0, 1)")
        expect(self.num_clusters >= 0, "num_clusters", self.num_clusters, "at least 0")
