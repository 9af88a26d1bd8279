"""Every class that the configs of a repository name, in the one module by which transformers enters its code.

transformers keeps the code of two folders apart by a hash of the module it enters and of what that imports. With all
classes in one module the hash covers all files, so code that differs anywhere shares no class: transformers would
otherwise open a second repository, whose config code is the same, with the model code of the first.
"""

from typing import TYPE_CHECKING

from .configuration_isic_vq import IsicVQConfig
from .configuration_pixelcnn import PixelCNNConfig
from .configuration_var import VARConfig
from .configuration_vqvae import VQVAEConfig
from .image_processing_isic_vq import IsicVQImageProcessor
from .modeling_isic_vq import IsicVQModel
from .modeling_pixelcnn import PixelCNNModel
from .modeling_var import VARModel
from .modeling_vqvae import VQVAEModel
from .pipeline_isic_vq import UnconditionalImageGenerationPipeline

if TYPE_CHECKING:  # never run; transformers copies the files that such lines name, here diffusers' two
    from .component import _Part  # noqa: F401
    from .pipeline import IsicVQPipeline  # noqa: F401

__all__ = [
    "IsicVQConfig",
    "IsicVQImageProcessor",
    "IsicVQModel",
    "PixelCNNConfig",
    "PixelCNNModel",
    "UnconditionalImageGenerationPipeline",
    "VARConfig",
    "VARModel",
    "VQVAEConfig",
    "VQVAEModel",
]
