"""Our models, pipeline and image processor as cases of the upstream mixins.

python tests/upstream/suites.py [NAME ...]   # run all cases, or those whose names hold one of these; print what failed
"""

import sys
import time
import unittest
from pathlib import Path
from typing import Any

import torch
from exceptions import expected
from mixins import count, run, upstream
from transformers.modeling_utils import PreTrainedModel

import isic_vq

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import NUM_CODES, PRIOR, SCALES, VAR, VQVAE

BATCH = 3  # images
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vqvae-ema": ("VQVAE", VQVAE),
    "vqvae-gradient": (
        "VQVAE",
        {**VQVAE, "codebook_update": "gradient", "norm": "group", "refinement_size": 4},
    ),
    "vqvae-scales": ("VQVAE", {**VQVAE, "scales": SCALES, "num_phi": 2}),
    "pixelcnn-gated": ("PixelCNN", PRIOR),
    "pixelcnn-plain": ("PixelCNN", {**PRIOR, "architecture": "plain"}),
    "var": ("VAR", {name: value for name, value in VAR.items() if name != "model_type"}),
    "composite-pixelcnn": ("IsicVQ", {"vqvae_config": VQVAE, "prior_config": PRIOR}),
    "composite-var": (
        "IsicVQ",
        {"vqvae_config": {**VQVAE, "scales": SCALES, "num_phi": 2}, "prior_config": VAR},
    ),
}


def inputs_of(config: Any) -> dict[str, torch.Tensor]:
    """What the model of a config takes."""
    generator = torch.Generator().manual_seed(0)
    if config.model_type in ("isic_vqvae", "isic_vq"):
        return {"pixel_values": torch.rand(BATCH, 3, 16, 16, generator=generator)}
    inputs = {
        "codes": torch.randint(NUM_CODES, (BATCH, *config.code_shape), generator=generator),
        "class_ids": torch.arange(BATCH),
    }
    if config.model_type == "isic_var":
        size = config.num_positions - config.sizes[0]
        inputs["context"] = torch.randn(BATCH, size, config.code_dim, generator=generator)
    return inputs


def model_case(name: str) -> type[unittest.TestCase]:
    """A case of transformers' `ModelTesterMixin`."""
    kind, settings = SETTINGS[name]
    model_class: type[PreTrainedModel] = getattr(isic_vq, f"{kind}Model")

    class Tester:
        is_training, batch_size = True, BATCH
        image_size = VQVAE["image_size"]

        def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
            config = model_class.config_class(**settings)
            return config, inputs_of(config)

    class Case(upstream("transformers", "test_modeling_common").ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        has_attentions = False  # none is returned
        test_resize_embeddings = False
        _is_composite = kind == "IsicVQ"

        def setUp(self) -> None:
            self.model_tester = Tester()

    Case.__name__ = Case.__qualname__ = name
    return Case


def processor_case() -> type[unittest.TestCase]:
    """A case of transformers' `ImageProcessingTestMixin`."""
    common = upstream("transformers", "test_image_processing_common")

    class Tester(common.ImageProcessingTester):
        def __init__(self, parent: unittest.TestCase) -> None:
            super().__init__(parent, size={"height": 18, "width": 18})

        def _get_image_processing_classes(self) -> dict[str, type]:
            return {"pil": isic_vq.IsicVQImageProcessor}

    class Case(common.ImageProcessingTestMixin, unittest.TestCase):
        image_processor_tester_class = Tester

    Case.__name__ = Case.__qualname__ = "image-processor"
    return Case


def pipeline_case(name: str) -> type[unittest.TestCase]:
    """A case of diffusers' `PipelineTesterMixin`."""
    common = upstream("diffusers", "pipelines.test_pipelines_common")

    class Case(common.PipelineTesterMixin, unittest.TestCase):
        pipeline_class = isic_vq.IsicVQPipeline
        params = frozenset(["labels", "num_images", "seed", "generator", "guidance_scale"])
        batch_params = frozenset(["labels"])
        required_optional_params = frozenset(["generator", "output_type", "return_dict"])
        test_attention_slicing = test_xformers_attention = False
        test_group_offloading = True

        def get_dummy_components(self) -> dict[str, Any]:
            torch.manual_seed(0)
            _, settings = SETTINGS[f"composite-{name}"]
            model = isic_vq.IsicVQModel(isic_vq.IsicVQConfig(**settings)).eval()
            return {"vqvae": model.vqvae, "prior": model.prior}

        def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(seed)
            return {"labels": "nevus", "generator": generator, "output_type": "np"}

        def test_inference_batch_single_identical(self) -> None:
            self._test_inference_batch_single_identical(additional_params_copy_to_batched_inputs=[])

    Case.__name__ = Case.__qualname__ = f"pipeline-{name}"
    return Case


CASES = {
    **{name: (model_case, name) for name in SETTINGS},
    "image-processor": (processor_case,),
    "pipeline-pixelcnn": (pipeline_case, "pixelcnn"),
    "pipeline-var": (pipeline_case, "var"),
}


def main() -> None:
    for name, (make, *arguments) in CASES.items():
        if sys.argv[1:] and not any(part in name for part in sys.argv[1:]):
            continue
        start = time.perf_counter()
        result = run(make(*arguments))
        print(name, dict(count(result)), f"{time.perf_counter() - start:.1f} s")  # noqa: T201
        for test, error in sorted(result.failed.items()):
            print("   ", test, expected(name).get(test, "") or error)  # noqa: T201


if __name__ == "__main__":
    main()
