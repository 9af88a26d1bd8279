"""The tokenizer as two ONNX files, for programs without torch: onnx/encoder.onnx and onnx/decoder.onnx.

encoder.onnx takes `pixel_values` (batch, 3, image_size, image_size), float32 RGB in [0, 1], and gives `codes`
(batch, h, w), int64 in [0, K); decoder.onnx takes codes and gives such pixels. Any batch size; float32 throughout;
weights inside the files. A file is written only if ONNX Runtime computes with it what torch computes.

Needs the extra `isic-vq[onnx]`. Does not: export the prior, whose sampling is a loop over positions.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from isic_vq import __version__
from isic_vq.data.code_cache import tokenizer_hash
from isic_vq.files import write_atomically
from isic_vq.hub.pretrained import resolve
from isic_vq.models.modeling_vqvae import VQVAEDecoder, VQVAEEncoder, VQVAEModel
from isic_vq.models.vector_quantizer import VQVAEVectorQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

FOLDER, ENCODER, DECODER = "onnx", "encoder.onnx", "decoder.onnx"
OPSET = 18  # what torch's exporter writes; any other would be converted from it
MAX_PIXEL_DIFFERENCE = 1e-4  # of [0, 1]; a level of 8 bits is 4e-3
TIE = 1e-5  # of |z|^2 + |e|^2: squared distances this near are equal, rounding decides between them
WAY_OUT = "nothing was written; look for NaN in the weights, or install the versions of constraints.txt"


class EncoderGraph(nn.Module):
    """`VQVAEModel.encode`."""

    def __init__(self, tokenizer: VQVAEModel):
        super().__init__()
        self.encoder: VQVAEEncoder = tokenizer.encoder
        self.quantizer: VQVAEVectorQuantizer = tokenizer.quantizer

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.quantizer.encode(self.encoder(pixel_values))


class DecoderGraph(nn.Module):
    """`VQVAEModel.decode`; codes outside [0, K) are an error in the runtime."""

    def __init__(self, tokenizer: VQVAEModel):
        super().__init__()
        self.decoder: VQVAEDecoder = tokenizer.decoder
        self.quantizer: VQVAEVectorQuantizer = tokenizer.quantizer

    def forward(self, codes: Tensor) -> Tensor:
        # ONNX would count a negative index from the end.
        codes = torch.where(codes < 0, self.quantizer.num_codes, codes)
        return self.decoder(self.quantizer.lookup(codes), self.quantizer.grids(codes)[-1])


def export_onnx(tokenizer: VQVAEModel, folder: Path, license_id: str | None = None) -> list[Path]:
    """Write onnx/encoder.onnx and onnx/decoder.onnx into a folder, once both are found to compute what torch does.

    Each file's metadata hold the version of isic_vq, image_size, num_codes, tokenizer_hash (as in code caches)
    and, if it is known, the licence.

    Args:
        tokenizer: of any floating-point type, on any device and in either mode; it is left as it is. The files
            compute what its float32 copy in eval mode does.
        folder: a repository folder, or any other; what else it holds stays.
        license_id: the Hub's id of the weights' licence, such as "cc-by-nc-4.0".

    Returns:
        Paths of the encoder and of the decoder.

    Raises:
        ImportError: a package of the extra is missing.
        RuntimeError: ONNX Runtime computes other codes or images than torch; nothing is written.
    """
    require_packages()
    tokenizer = deepcopy(tokenizer).cpu().float().eval()
    codes = torch.zeros(2, *tokenizer.config.code_shape, dtype=torch.long)
    encoder = encoder_model(tokenizer)
    decoder = to_onnx(DecoderGraph(tokenizer).eval(), codes, "codes", "pixel_values")
    for model in (encoder, decoder):
        describe(model, tokenizer, license_id)
    check_encoder(encoder, tokenizer)
    check_decoder(decoder, tokenizer)
    paths = [folder / FOLDER / name for name in (ENCODER, DECODER)]
    for path, model in zip(paths, (encoder, decoder), strict=True):
        write_atomically(path, model.SerializeToString(deterministic=True))
    return paths


def known_license(model: str | None) -> str | None:
    """Return the licence that a checkpoint's config names; None where it names none, as that of a tokenizer alone."""
    config, _ = PreTrainedConfig.get_config_dict(resolve(model))
    return config.get("license")


def require_packages() -> None:
    """Raise ImportError with the way out where a package of the extra is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  # torch's exporter is written with it
    except ImportError as error:
        raise ImportError(
            f'ONNX export needs onnx, onnxscript and onnxruntime ({error}): pip install "isic-vq[onnx]"'
        ) from error


def encoder_model(tokenizer: VQVAEModel) -> "ModelProto":
    """Export the encoder of a float32 tokenizer in eval mode."""
    size = tokenizer.config.image_size
    pixel_values = torch.zeros(2, tokenizer.config.num_channels, size, size)
    return to_onnx(EncoderGraph(tokenizer).eval(), pixel_values, "pixel_values", "codes")


@torch.no_grad()
def to_onnx(module: nn.Module, example: Tensor, input_name: str, output_name: str) -> "ModelProto":
    """Export a module in eval mode with one input and one output, whose first dimension may have any size.

    The batch size of `example` is 2, because torch.export takes 0 and 1 for constants.
    """
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes={input_name: {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the exporter of dynamo=True returns a program"
    model = program.model_proto
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # stack traces, with the paths of this machine
    return model


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Leave out what torch 2.13 says of itself: that its own code is deprecated, and that torchvision is not there."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def not_torchvision(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger.addFilter(not_torchvision)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logger.removeFilter(not_torchvision)


def describe(model: "ModelProto", tokenizer: VQVAEModel, license_id: str | None) -> None:
    """Write into a graph what its user has to know."""
    from onnx import helper

    config = tokenizer.config
    model.producer_name, model.producer_version = "isic-vq", __version__
    model.doc_string = (
        f"pixel_values: float32 (batch, {config.num_channels}, {config.image_size}, {config.image_size}), RGB in "
        f"[0, 1]. codes: int64 (batch, {', '.join(map(str, config.code_shape))}), in [0, {config.num_codes})."
    )
    facts = {
        "isic_vq": __version__,
        "image_size": str(config.image_size),
        "num_codes": str(config.num_codes),
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
    helper.set_model_props(model, facts | ({"license": license_id} if license_id else {}))


def check_encoder(model: "ModelProto", tokenizer: VQVAEModel) -> None:
    """Raise RuntimeError for a graph that gives other codes than the tokenizer, but for ties of distance."""
    session = open_session(model)
    size, generator = tokenizer.config.image_size, torch.Generator().manual_seed(0)
    grains = [torch.rand(1, tokenizer.config.num_channels, n, n, generator=generator) for n in (1, 4, size)]
    images = torch.cat([F.interpolate(grain, size=size, mode="bilinear") for grain in grains])
    for pixel_values in (images[:1], images):
        codes, expected = run(session, pixel_values), tokenizer.encode(pixel_values)
        with torch.no_grad():
            rows = tokenizer.quantizer.rows_to_learn(tokenizer.embed(pixel_values))
        wrong = _wrong_codes(tokenizer, rows.double().view(len(codes), -1, rows.shape[1]), codes, expected)
        if wrong:
            raise RuntimeError(f"{ENCODER} gives {wrong} codes otherwise than torch: {WAY_OUT}")


def _wrong_codes(tokenizer: VQVAEModel, rows: Tensor, codes: Tensor, expected: Tensor) -> int:
    """Count codes that differ from the tokenizer's without a tie of distance, up to an image's first tie."""
    codebook, wrong = tokenizer.quantizer.codebook.double(), 0
    comparable = torch.ones(len(codes), dtype=torch.bool)
    start = 0
    for grid, nearest in zip(tokenizer.code_grids(codes), tokenizer.code_grids(expected), strict=True):
        grid, nearest = grid.flatten(1), nearest.flatten(1)
        part = rows[:, start : start + grid.shape[1]]
        start += grid.shape[1]
        excess = (part - codebook[grid]).square().sum(2) - (part - codebook[nearest]).square().sum(2)
        scale = part.square().sum(2) + codebook[nearest].square().sum(2)
        wrong += int(((grid != nearest) & (excess > TIE * scale))[comparable].sum())
        comparable &= (grid == nearest).all(1)
    return wrong


def check_decoder(model: "ModelProto", tokenizer: VQVAEModel) -> None:
    """Raise RuntimeError for a graph whose images differ from the tokenizer's by more than `MAX_PIXEL_DIFFERENCE`."""
    session = open_session(model)
    config, generator = tokenizer.config, torch.Generator().manual_seed(0)
    grids = torch.randint(config.num_codes, (3, *config.code_shape), generator=generator)
    for codes in (grids[:1], grids):
        difference = (run(session, codes) - tokenizer.decode(codes)).abs().max().item()
        if not difference <= MAX_PIXEL_DIFFERENCE:
            raise RuntimeError(
                f"{DECODER} gives pixels that differ from torch's by up to {difference:.2g} of [0, 1]: {WAY_OUT}"
            )


def open_session(model: "ModelProto") -> "InferenceSession":
    """Check that a graph is valid ONNX, and open it in ONNX Runtime, on the CPU."""
    from onnx import checker
    from onnxruntime import InferenceSession

    checker.check_model(model, full_check=True)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: "InferenceSession", values: Tensor) -> Tensor:
    """Compute the output of a graph with one input and one output."""
    (output,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    return torch.from_numpy(output)
