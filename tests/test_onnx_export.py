"""The ONNX files compute what torch does, say what they are, and are not written where they do not."""

import re
import subprocess
import sys
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from PIL import Image
from torch import nn

from isic_vq import IsicVQConfig, IsicVQImageProcessor, IsicVQModel, VQVAEConfig, VQVAEModel, __version__
from isic_vq.data.code_cache import tokenizer_hash, write_code_cache
from isic_vq.data.encoding import encode_source
from isic_vq.data.loading import iter_batches
from isic_vq.data.parts import open_part
from isic_vq.data.provenance import write_training_data
from isic_vq.data.sources import open_source
from isic_vq.data.synthetic_images import synthetic_image
from isic_vq.hub.onnx_export import (
    check_decoder,
    check_encoder,
    encoder_model,
    export_onnx,
    known_license,
    open_session,
)
from isic_vq.hub.pretrained import load_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "onnx_inference.py"
TINY = {
    "image_size": 16,
    "hidden_sizes": (6, 8),
    "num_residual_blocks": 1,
    "residual_size": 4,
    "num_codes": 7,
    "code_dim": 3,
}
DEEPER = {"image_size": 32, "hidden_sizes": (4, 6, 8), "norm": "group", "codebook_update": "gradient"}
DEEPER["refinement_size"] = 4
SCALES = {"scales": (1, 3, 4), "num_phi": 2}
VARIANTS = {"batch f4": {}, "group f8 in bfloat16": DEEPER, "scales": SCALES}


@torch.no_grad()
def make_tokenizer(**settings):
    """A tiny tokenizer whose statistics are not the zeros and ones that would hide a term."""
    torch.manual_seed(0)
    model = VQVAEModel(VQVAEConfig(**TINY | settings))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory):
    """The tokenizer as it was handed over (in train mode), what is to be computed, and the two sessions' `run`."""
    tokenizer = make_tokenizer(**VARIANTS[request.param])
    tokenizer = tokenizer.to(torch.bfloat16 if "bfloat16" in request.param else torch.float32).train()
    reference = deepcopy(tokenizer).float().eval()
    folder = tmp_path_factory.mktemp("onnx")
    paths = export_onnx(tokenizer, folder, "cc-by-4.0")
    assert paths == [folder / "onnx" / "encoder.onnx", folder / "onnx" / "decoder.onnx"]
    return (
        tokenizer,
        reference,
        *(InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tokenizer and its files, and a folder for changed ones."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer().eval()
    export_onnx(tokenizer, folder)
    return tokenizer, folder


def graphs(folder):
    return [onnx.load(folder / "onnx" / name) for name in ("encoder.onnx", "decoder.onnx")]


def synthetic_pixels(count, size):
    images = [synthetic_image(index, seed=0) for index in range(count)]
    return IsicVQImageProcessor(size=size)(images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", ["noise", "synthetic"])
def test_the_encoder_finds_the_nearest_code_for_any_batch_size(exported, batch, kind):
    _, reference, encoder, _ = exported
    size = reference.config.image_size
    pixel_values = torch.rand(batch, 3, size, size) if kind == "noise" else synthetic_pixels(batch, size)
    (codes,) = encoder.run(["codes"], {"pixel_values": pixel_values.numpy()})
    with torch.no_grad():
        rows = reference.quantizer.rows_to_learn(reference.embed(pixel_values)).double().numpy()
    codebook = reference.quantizer.codebook.detach().double().numpy()
    distances = ((rows[:, None] - codebook) ** 2).sum(-1)
    chosen = np.take_along_axis(distances, codes.reshape(-1, 1), -1)[..., 0]
    assert codes.dtype == np.int64
    assert (chosen <= distances.min(-1) * (1 + 1e-5)).all()
    assert (codes == reference.encode(pixel_values).numpy()).mean() > 0.99
    assert len(np.unique(codes)) > 1, "one code for everything would prove nothing"


@pytest.mark.parametrize("batch", [1, 5])
def test_the_decoder_gives_torchs_pixels_for_any_batch_size(exported, batch):
    _, reference, _, decoder = exported
    codes = torch.randint(reference.config.num_codes, (batch, *reference.config.code_shape))
    (pixel_values,) = decoder.run(["pixel_values"], {"codes": codes.numpy()})
    assert pixel_values.dtype == np.float32
    np.testing.assert_allclose(pixel_values, reference.decode(codes).numpy(), atol=1e-5)
    assert pixel_values.std() > 0.01, "grey images would prove nothing"


def test_exporting_leaves_the_tokenizer_as_it_was(exported):
    tokenizer, reference, *_ = exported
    assert all(module.training for module in tokenizer.modules())
    assert tokenizer.dtype == (torch.float32 if tokenizer.config.norm == "batch" else torch.bfloat16)
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor.float(), reference.state_dict()[name].float()), name


@pytest.mark.parametrize("code", [-1, 7])
def test_a_code_that_the_codebook_lacks_is_an_error_in_the_runtime(exported, code):
    _, reference, _, decoder = exported
    with pytest.raises(InvalidArgument, match="out of data bounds"):
        decoder.run(None, {"codes": np.full((1, *reference.config.code_shape), code)})


def test_the_files_say_what_they_are(exported):
    _, reference, encoder, decoder = exported
    config = reference.config
    expected = {
        "isic_vq": __version__,
        "image_size": str(config.image_size),
        "num_codes": "7",
        "tokenizer_hash": tokenizer_hash(reference),
        "license": "cc-by-4.0",
    }
    for session in (encoder, decoder):
        meta = session.get_modelmeta()
        assert meta.custom_metadata_map == expected
        assert meta.producer_name == "isic-vq"
        assert "RGB in [0, 1]" in meta.description
    image, codes = (3, config.image_size, config.image_size), config.code_shape
    ends = [encoder.get_inputs(), encoder.get_outputs(), decoder.get_inputs(), decoder.get_outputs()]
    assert [(end.name, end.type, tuple(end.shape)) for (end,) in ends] == [
        ("pixel_values", "tensor(float)", ("batch", *image)),
        ("codes", "tensor(int64)", ("batch", *codes)),
        ("codes", "tensor(int64)", ("batch", *codes)),
        ("pixel_values", "tensor(float)", ("batch", *image)),
    ]


def test_a_file_is_whole_and_holds_no_trace_of_where_it_was_made(tiny):
    _, folder = tiny
    assert {path.name for path in (folder / "onnx").iterdir()} == {"encoder.onnx", "decoder.onnx"}
    for model in graphs(folder):
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
        assert all(not tensor.external_data for tensor in model.graph.initializer)
        assert not re.search(rb"\.py|site-packages|stack_trace", model.SerializeToString())
        assert "license" not in {entry.key for entry in model.metadata_props}, "nobody has said it"


def test_batch_normalisation_is_folded_into_the_convolutions(tiny):
    _, folder = tiny
    for model in graphs(folder):
        assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def changed(model, name, change):
    """A copy of a graph with one of its weights changed."""
    copy = deepcopy(model)
    (tensor,) = (tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    return copy


def test_an_encoder_with_another_weight_is_refused(tiny):
    tokenizer, folder = tiny
    encoder, _ = graphs(folder)
    check_encoder(encoder, tokenizer)
    with pytest.raises(RuntimeError, match=r"encoder.onnx gives \d+ codes otherwise than torch"):
        check_encoder(changed(encoder, "encoder.project.bias", lambda bias: bias + 0.5), tokenizer)


def test_a_decoder_with_another_weight_is_refused_from_1e_4_on(tiny):
    tokenizer, folder = tiny
    _, decoder = graphs(folder)
    check_decoder(
        changed(decoder, "decoder.to_pixels.bias", lambda bias: bias + 1e-4), tokenizer
    )  # sigmoid' <= 1/4
    with pytest.raises(RuntimeError, match="decoder.onnx gives pixels that differ from torch's by up to"):
        check_decoder(changed(decoder, "decoder.to_pixels.bias", lambda bias: bias + 1e-2), tokenizer)


def test_another_code_at_the_same_distance_is_not_refused_but_one_farther_off_is():
    tokenizer = make_tokenizer().eval()
    codebook = tokenizer.quantizer.codebook
    codebook[4:] = codebook[:3]  # twins, of which torch takes the first
    encoder = encoder_model(tokenizer)
    (argmin,) = (node for node in encoder.graph.node if node.op_type == "ArgMin")
    (last,) = (attribute for attribute in argmin.attribute if attribute.name == "select_last_index")
    last.i = 1
    session, pixel_values = open_session(encoder), synthetic_pixels(2, 16)
    (codes,) = session.run(None, {"pixel_values": pixel_values.numpy()})
    assert (codes != tokenizer.encode(pixel_values).numpy()).any(), "the twin should be taken"
    check_encoder(encoder, tokenizer)
    codebook[4:] += 0.1
    with pytest.raises(RuntimeError, match="codes otherwise than torch"):
        check_encoder(encoder, tokenizer)


def test_where_either_file_is_refused_neither_is_written_and_old_ones_stay(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "encoder.onnx").write_bytes(b"old")
    tokenizer = make_tokenizer()
    nn.init.constant_(tokenizer.decoder.to_pixels.bias, torch.nan)
    with pytest.raises(ValueError, match="decoded pixels of image 0.* are not finite"):
        export_onnx(tokenizer, tmp_path)
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["encoder.onnx"]
    assert (tmp_path / "onnx" / "encoder.onnx").read_bytes() == b"old"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what makes `import` fail
    with pytest.raises(ImportError, match=re.escape('pip install "isic-vq[onnx]"')):
        export_onnx(make_tokenizer(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_alone_and_in_a_repository_the_same_files_are_written(run, tmp_path):
    prior = {"num_codes": 7, "grid_size": 4, "hidden_size": 8, "num_layers": 1, "head_size": 8}
    model = IsicVQModel(IsicVQConfig(vqvae_config=dict(TINY), prior_config=prior, license="cc0-1.0")).eval()
    model.save_pretrained(tmp_path / "model")
    records, source = open_part("synthetic:4:0")
    cache = encode_source(model.vqvae, IsicVQImageProcessor(size=16), records, source, num_views=1)
    write_code_cache(cache, tmp_path / "codes.parquet")
    write_training_data(tmp_path / "model", {"vqvae": source, "prior": source})

    repository, alone = tmp_path / "repository", tmp_path / "alone"
    options = ("--train-codes", tmp_path / "codes.parquet", "--onnx")
    code, _, error = run("export", tmp_path / "model", repository, *options)
    assert code == 0, error
    alone.mkdir()
    (alone / "notes.txt").write_text("mine")
    code, out, error = run("export", tmp_path / "model", alone, "--onnx")
    assert code == 0, error
    assert out == f"wrote {alone}/onnx/encoder.onnx and {alone}/onnx/decoder.onnx\n"
    assert (alone / "notes.txt").read_text() == "mine"
    for name in ("onnx/encoder.onnx", "onnx/decoder.onnx"):
        assert (repository / name).read_bytes() == (alone / name).read_bytes()
    properties = {entry.key: entry.value for entry in graphs(alone)[0].metadata_props}
    assert properties["license"] == "cc0-1.0", "synthetic images are, and all of its training data are"


def test_a_tokenizer_alone_has_no_known_licence_and_the_shipped_checkpoint_has(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert known_license(str(tmp_path)) is None
    assert known_license(None) == "cc-by-nc-4.0"


def test_the_example_reconstructs_without_torch(tiny, tmp_path):
    tokenizer, folder = tiny
    synthetic_image(1, seed=0, size=40).crop((0, 0, 40, 31)).save(tmp_path / "image.png")
    script = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    arguments = [str(EXAMPLE), str(tmp_path / "image.png"), str(folder / "onnx"), "--output", "both.png"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    processor = IsicVQImageProcessor(size=16)
    pixel_values = processor(tmp_path / "image.png", return_tensors="pt")["pixel_values"]
    decoded = tokenizer.decode(tokenizer.encode(pixel_values))
    expected = np.hstack(list(processor.postprocess(torch.cat([pixel_values, decoded]), output_type="np")))
    with Image.open(tmp_path / "both.png") as found:
        levels = np.asarray(found).astype(int)
    assert np.array_equal(levels[:, :16], expected[:, :16]), "the cut and the size are the processor's"
    assert abs(levels - expected).max() <= 1


@pytest.mark.real_data
@pytest.mark.slow
def test_the_shipped_tokenizer_in_onnx_agrees_with_torch_on_32_real_images(data_dir, tmp_path):
    tokenizer = load_model(VQVAEModel).cpu()
    encoder, decoder = (
        InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in export_onnx(tokenizer, tmp_path)
    )
    records = open_source(f"parquet:{data_dir}/ham10000/validation-*.parquet")
    batches = iter_batches(records, IsicVQImageProcessor(size=128), batch_size=16)
    pixel_values = torch.cat([batch["pixel_values"] for batch in islice(batches, 2)])
    expected = tokenizer.encode(pixel_values)
    (codes,) = encoder.run(None, {"pixel_values": pixel_values.numpy()})
    (decoded,) = decoder.run(None, {"codes": expected.numpy()})
    assert len(pixel_values) == 32
    assert (codes != expected.numpy()).sum() <= 1, "of 8192; one in 50,000 is a tie"
    assert abs(decoded - tokenizer.decode(expected).numpy()).max() < 1e-5
