"""Make transformers' Auto classes and pipelines know isic-vq, without importing transformers.

transformers has no entry points for packages, so the names are registered when its own modules are loaded:
at once where they already are, else right after their import, through a finder that wraps their loader.
That keeps `import isic_vq` and `isic-vq --help` free of torch.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType


def _register_configs(module: ModuleType) -> None:
    from isic_vq.models.configuration_isic_vq import IsicVQConfig
    from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
    from isic_vq.models.configuration_var import VARConfig
    from isic_vq.models.configuration_vqvae import VQVAEConfig

    for config in (IsicVQConfig, PixelCNNConfig, VARConfig, VQVAEConfig):
        module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    if not LOADING.isdisjoint(MODEL_MODULES):
        return  # it is one of them that imports transformers' module, and it registers all once it is whole
    from transformers import AutoModel

    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.models.modeling_pixelcnn import PixelCNNModel
    from isic_vq.models.modeling_var import VARModel
    from isic_vq.models.modeling_vqvae import VQVAEModel

    for model in (IsicVQModel, PixelCNNModel, VARModel, VQVAEModel):
        AutoModel.register(model.config_class, model, exist_ok=True)


def _register_image_processor(module: ModuleType) -> None:
    from isic_vq.models.configuration_isic_vq import IsicVQConfig
    from isic_vq.models.configuration_vqvae import VQVAEConfig
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

    for config in (IsicVQConfig, VQVAEConfig):
        module.AutoImageProcessor.register(
            config, image_processor_classes={"pil": IsicVQImageProcessor}, exist_ok=True
        )


def _load_pipeline(module: ModuleType) -> None:
    # Our pipeline module may be the one that is importing transformers.pipelines; it registers once it is whole.
    importlib.import_module(PIPELINE_MODULE)


def _register_pipeline(module: ModuleType) -> None:
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from isic_vq.models.configuration_isic_vq import TASK

    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=module.UnconditionalImageGenerationPipeline,
        pt_model=AutoModel,
        type="image",
    )


PIPELINE_MODULE = "isic_vq.models.pipeline_isic_vq"
MODEL_MODULES = ("isic_vq.models.modeling_var", "isic_vq.models.modeling_isic_vq")
LOADING: set[str] = set()  # of the modules of `HOOKS`, those whose import has begun and not ended
HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.pipelines": _load_pipeline,
    PIPELINE_MODULE: _register_pipeline,
    **dict.fromkeys(MODEL_MODULES, _register_models),
}


class _HookFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of `HOOKS` as the other finders do, and lets their loaders register after the import."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in HOOKS or name in self.busy:
            return None
        self.busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_load_and_register, spec.loader)  # type: ignore[method-assign]
        return spec


def _load_and_register(loader: importlib.abc.Loader, module: ModuleType) -> None:
    del loader.exec_module  # its own method again
    LOADING.add(module.__name__)
    try:
        loader.exec_module(module)
    finally:
        LOADING.discard(module.__name__)
    HOOKS[module.__name__](module)


def install() -> None:
    """Register with the transformers modules that are loaded, and with the others once they are. Idempotent."""
    if not any(isinstance(finder, _HookFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HookFinder())
    loaded = [name for name in HOOKS if name in sys.modules]  # before a hook imports more of them
    for name in loaded:
        HOOKS[name](sys.modules[name])
