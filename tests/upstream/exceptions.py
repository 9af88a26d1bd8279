"""Upstream tests that fail, and why: what does not apply to models of images and codes. One line each.

A key is `case test`, where the case may end in `*`. What is not listed must pass, and what is listed must fail.
"""

from fnmatch import fnmatch

HIDDEN_STATES = "forward returns what it is for: no hidden states and no attentions of layers"
EMBEDDINGS = "neither images nor codes are a vocabulary that could be resized: models have no input embeddings to exchange"
SEQUENTIAL = "diffusers names the device cpu:0, of which accelerate makes tensors that are no parameters, of any module"
VARIANT = "a repository has one set of weights: save_pretrained refuses a variant, in one line"

EXCEPTIONS = {
    **{
        f"{case} {test}": HIDDEN_STATES
        for case in ("vqvae-*", "pixelcnn-*", "var", "composite-*")
        for test in (
            "test_hidden_states_output",
            "test_model_outputs_equivalence",  # passes up to its call with output_hidden_states=True
            "test_retain_grad_hidden_states_attentions",
        )
    },
    **{
        f"{case} test_model_get_set_embeddings": EMBEDDINGS
        for case in ("vqvae-*", "pixelcnn-*", "var", "composite-*")
    },
    **{
        f"{case} test_init_weights_can_init_buffers": "a codebook that learns by moving averages is a buffer and begins random"
        for case in ("vqvae-*", "composite-*")
    },
    "composite-* test_load_save_without_tied_weights": "weights lie in a folder for each part, not in one file at the root",
    "image-processor test_call_numpy_4_channels": "pixel values are RGB: the processor has two settings, size and do_convert_rgb",
    "image-processor test_new_models_require_torchvision_backend": "torchvision is no requirement: Pillow does it all",
    "pipeline-* test_loading_with_variants": VARIANT,
    "pipeline-* test_loading_with_incorrect_variants_raises_error": VARIANT,
    "pipeline-* test_serialization_with_variants": VARIANT,
    "pipeline-* test_cpu_offload_forward_pass_twice": "it enables the offload without naming a device: diffusers asks for an accelerator",
    "pipeline-* test_sequential_cpu_offload_forward_pass": SEQUENTIAL,
    "pipeline-* test_sequential_offload_forward_pass_twice": SEQUENTIAL,
    "pipeline-* test_save_load_local": "images are equal; it then looks for lines that diffusers' own loader logs, which is not used",
}

# Modules that the mixins import and the archives do not hold, stood in for by empty classes (`mixins.Empty`): mixins for
# export and text generation, test files on the Hub, and helpers of diffusers' own models.
STOOD_IN = (
    "transformers_tests.exporters.test_export",
    "transformers_tests.generation.test_utils",
    "fetch_hub_objects_for_ci",
    "diffusers_tests.models.autoencoders.vae",
    "diffusers_tests.models.transformers.test_models_transformer_flux",
    "diffusers_tests.models.unets.test_models_unet_2d_condition",
)


def expected(case: str) -> dict[str, str]:
    """The tests of a case that must fail, with the reason."""
    return {
        test: reason
        for key, reason in EXCEPTIONS.items()
        for pattern, test in [key.split(" ")]
        if fnmatch(case, pattern)
    }
