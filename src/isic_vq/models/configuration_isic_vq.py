"""Configuration of the composite model: one tokenizer and one prior."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .checks import expect
from .configuration_pixelcnn import PixelCNNConfig
from .configuration_prior import PriorConfig
from .configuration_var import VARConfig
from .configuration_vqvae import VQVAEConfig

TASK = "unconditional-image-generation"  # of the pipeline, as the Hub calls it
PRIOR_CONFIGS: dict[str, type[PriorConfig]] = {
    config.model_type: config for config in (PixelCNNConfig, VARConfig)
}


def prior_config_class(fields: dict[str, Any]) -> type[PriorConfig]:
    """Take `model_type` out of a prior's fields, and find its class; `isic_pixelcnn` where there is none."""
    model_type = fields.pop("model_type", PixelCNNConfig.model_type)
    known = sorted(PRIOR_CONFIGS)
    expect(model_type in known, "prior model_type", model_type, f"one of {known}")
    return PRIOR_CONFIGS[model_type]


@strict
class IsicVQConfig(PreTrainedConfig):
    """What an `IsicVQModel` is built from.

    Args:
        vqvae_config: the tokenizer's configuration, an object or its dictionary.
        prior_config: the prior's configuration; a dictionary names its class by `model_type`
            (`isic_pixelcnn` when it has none).
        license: the Hub's id of the weights' licence, such as "cc-by-nc-4.0"; None where nobody has said it.
    """

    model_type = "isic_vq"
    sub_configs_defaults = {
        "vqvae_config": VQVAEConfig,
        "prior_config": SubConfigSpec(config_class=PixelCNNConfig),
    }

    vqvae_config: Any = None
    prior_config: Any = None
    license: str | None = None

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]  # signature set by transformers
        if not type(self).__module__.startswith("transformers_modules."):
            # The installed package needs none of the repository's code, and with these two keys set
            # transformers.pipeline() would insist on trust_remote_code.
            kwargs.pop("custom_pipelines", None)
            kwargs.pop("auto_map", None)
        for name in self.sub_configs_defaults:
            part = getattr(self, name)
            if not isinstance(part, dict | PreTrainedConfig | None):
                raise ValueError(f"{name} is a {type(part).__name__}: expected an object of settings")
        if isinstance(self.prior_config, dict):
            # Resolved here because transformers would look the type up in its own table only.
            fields = dict(self.prior_config)
            self.prior_config = prior_config_class(fields)(**fields)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build as transformers does, for every `from_pretrained`; ValueError for classes, which are the prior's alone."""
        for name in {"id2label", "label2id", "num_labels"} & kwargs.keys():
            raise ValueError(
                f"{name} is given: the classes are those of the prior's weights. Rename them after loading, in "
                "model.config.prior_config.id2label, or train a prior of your own classes with isic-vq train"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def class_names(self) -> dict[int, str]:
        """Diagnoses the prior can be asked for, id to name."""
        return self.prior_config.id2label

    @property
    def least_parameters(self) -> int:
        """A lower bound of the number of parameters."""
        return self.vqvae_config.least_parameters + self.prior_config.least_parameters

    def validate_architecture(self) -> None:
        """Check that tokenizer and prior speak of the same codes; called by `strict` at construction."""
        vqvae, prior = self.vqvae_config, self.prior_config
        if not isinstance(vqvae, PreTrainedConfig) or not isinstance(prior, PreTrainedConfig):
            return  # strict validates once before __post_init__ has resolved the parts
        if vqvae.code_shape != prior.code_shape:
            raise ValueError(
                f"the tokenizer makes {_by(vqvae.code_shape)} codes but the prior models {_by(prior.code_shape)}"
            )
        for name in prior.of_tokenizer:
            if getattr(vqvae, name) != getattr(prior, name):
                raise ValueError(
                    f"{name} of the tokenizer is {getattr(vqvae, name)} but the prior's is {getattr(prior, name)}"
                )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
