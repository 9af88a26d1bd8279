"""Discrete generative models of dermoscopy images: VQ-VAE tokenizer, PixelCNN prior, one Hub repository.

Importing this package is cheap: names load on first use, and the Auto classes and the pipeline task become
known to transformers when transformers' own modules are imported (`isic_vq.hub.registration`).
"""

from importlib import import_module
from typing import Any

from isic_vq.hub.registration import install

__version__ = "0.1.0"

_MODULES = {
    "IsicVQEditOutput": "isic_vq.models.editing",
    "IsicVQGenerationOutput": "isic_vq.models.modeling_isic_vq",
    "ImageError": "isic_vq.models.image_processing_isic_vq",
    "IsicVQConfig": "isic_vq.models.configuration_isic_vq",
    "IsicVQImageProcessor": "isic_vq.models.image_processing_isic_vq",
    "IsicVQModel": "isic_vq.models.modeling_isic_vq",
    "IsicVQPipeline": "isic_vq.models.pipeline",
    "PixelCNNConfig": "isic_vq.models.configuration_pixelcnn",
    "PixelCNNModel": "isic_vq.models.modeling_pixelcnn",
    "IsicVQScoreOutput": "isic_vq.models.likelihood",
    "UnconditionalImageGenerationPipeline": "isic_vq.models.pipeline_isic_vq",
    "VARConfig": "isic_vq.models.configuration_var",
    "VARModel": "isic_vq.models.modeling_var",
    "VQVAEConfig": "isic_vq.models.configuration_vqvae",
    "VQVAEModel": "isic_vq.models.modeling_vqvae",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'isic_vq' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


install()
