"""Settings of tiny models, and how tests make them."""

import torch
from torch import nn

from isic_vq import IsicVQModel, VQVAEConfig, VQVAEModel
from isic_vq.models.modeling_prior import PriorModel

NUM_CODES = 7
CLASSES = {0: "melanoma", 1: "nevus", 2: "dermatofibroma"}
VQVAE = {
    "image_size": 16,
    "hidden_sizes": (6, 8),
    "num_residual_blocks": 1,
    "residual_size": 4,
    "num_codes": NUM_CODES,
    "code_dim": 3,
}
PRIOR = {
    "num_codes": NUM_CODES,
    "grid_size": 4,
    "hidden_size": 6,
    "num_layers": 2,
    "kernel_size": 3,
    "first_kernel_size": 3,
    "head_size": 8,
    "dropout": 0.0,
    "class_dropout": 0.0,
    "id2label": CLASSES,
}
SCALES = (1, 2, 4)
VAR = {
    "model_type": "isic_var",
    "num_codes": NUM_CODES,
    "scales": SCALES,
    "code_dim": VQVAE["code_dim"],
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "dropout": 0.0,
    "class_dropout": 0.0,
    "id2label": CLASSES,
}


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """Move what starts at zero or one off it, so that no term of a formula is tested at a value that hides it."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def joined(prior: PriorModel) -> IsicVQModel:
    """A prior with a tokenizer that fits it, in eval mode."""
    scales = getattr(prior.config, "scales", None)
    side = scales[-1] if scales else prior.config.grid_size
    config = VQVAEConfig(
        image_size=2 * side,
        hidden_sizes=(4,),
        num_residual_blocks=0,
        num_codes=prior.config.num_codes,
        code_dim=getattr(prior.config, "code_dim", 2),
        scales=scales,
        num_phi=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return IsicVQModel.from_parts(stirred(VQVAEModel(config)), prior)
