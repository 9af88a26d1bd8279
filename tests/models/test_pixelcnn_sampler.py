"""Every backend against the full forward pass, and images that do not depend on how they are asked for."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isic_vq.models import modes, pixelcnn_compiled, pixelcnn_sampler
from isic_vq.models.pixelcnn_cache import GraphedRows, Rows, open_cache
from isic_vq.models.pixelcnn_sampler import best_backend, open_rows
from isic_vq.models.sampling import Sampling, draw, exclude_unlikely, guided_logits

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BACKENDS = [
    "eager",
    "compiled",
    pytest.param("cuda_graph", marks=[pytest.mark.gpu, needs_cuda]),
]
DEVICES = {"eager": "cpu", "compiled": "cpu", "cuda_graph": "cuda"}


SMALL = {
    "num_codes": 11, "grid_size": 5, "hidden_size": 8, "num_layers": 3, "kernel_size": 3, "first_kernel_size": 5,
    "head_size": 12, "id2label": {0: "a", 1: "b"},
}  # fmt: skip


@pytest.fixture(scope="session")
def make_model(make_prior):
    return lambda **overrides: make_prior(**{**SMALL, **overrides})


def make_uniforms(count, grid, seed=0):
    return torch.rand(count, grid * grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


configs = st.fixed_dictionaries(
    {
        "architecture": st.sampled_from(["gated", "plain"]),
        "grid_size": st.integers(2, 7),
        "hidden_size": st.integers(1, 9),
        "num_layers": st.integers(0, 3),
        "kernel_size": st.sampled_from([3, 5]),
        "first_kernel_size": st.sampled_from([3, 5, 7]),
        "head_size": st.integers(1, 9),
        "num_codes": st.integers(2, 12),
        "id2label": st.sampled_from([{}, {0: "a"}, {0: "a", 1: "b", 2: "c"}]),
    }
)


@settings(max_examples=60, deadline=None)
@given(config=configs, seed=st.integers(0, 1000), batch=st.integers(1, 9))
def test_cached_logits_are_those_of_the_full_pass_at_every_position(make_model, config, seed, batch):
    model = make_model(**config)
    grid, unconditional = model.config.grid_size, model.config.unconditional_id
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(model.config.num_codes, (batch, grid, grid), generator=generator)
    labels = torch.randint(unconditional + 1, (batch,), generator=generator)
    with torch.inference_mode():
        expected = model(codes, labels).logits
        for cache in (open_cache(model, labels), CompiledLogits(model, labels)):
            for row in range(grid):
                cache.start_row(row)
                for column in range(grid):
                    torch.testing.assert_close(
                        cache.logits(column), expected[:, :, row, column], atol=1e-5, rtol=1e-5
                    )
                    cache.put(column, codes[:, row, column])


class CompiledLogits:
    """The compiled kernel behind the interface of a cache."""

    def __init__(self, model, labels):
        self.cache = open_cache(model, labels)
        self.rows = pixelcnn_compiled.CompiledRows(self.cache, Sampling())
        self.put = self.cache.put

    def start_row(self, row):
        self.rows.start_row(row)

    def logits(self, column):
        return self.rows.logits(column)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("grid", [7, 16, 32])
@pytest.mark.parametrize("architecture", ["gated", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_are_those_of_full_passes_draw_for_draw(
    make_model, backend, architecture, grid, kernel_size, guidance_scale
):
    """By induction: a draw that is right given the codes before it, at every position, is right altogether."""
    model = make_model(architecture=architecture, grid_size=grid, kernel_size=kernel_size).double()
    model = model.to(DEVICES[backend])
    uniforms, labels = make_uniforms(3, grid), torch.tensor([0, 1, 2])
    codes = model.sample(uniforms, labels, guidance_scale=guidance_scale, backend=backend)
    with torch.no_grad():
        logits = guided_logits(model(codes, labels).logits, model(codes).logits, guidance_scale)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, model.config.num_codes)
    assert torch.equal(draw(rows, uniforms.flatten().to(rows.device)), codes.flatten())
    assert len(codes.unique()) > 5, "premise: the samples are not all alike"


FILTERS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.4, "top_k": 6, "top_p": 0.8, "guidance_scale": 1.6},
    "guidance and temperature": {"temperature": 0.8, "guidance_scale": 3.0},
    "no label at all": {"guidance_scale": 0.0},
    "guidance that grows": {"guidance_scale": 4.0, "guidance_power": 2.0},
    "guidance that grows, top_k": {"guidance_scale": 4.0, "guidance_power": 2.0, "top_k": 5},
}


@pytest.mark.parametrize("how", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("architecture", ["gated", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_filters_and_guides_alike(make_model, backend, architecture, how):
    model = make_model(architecture=architecture).double().to(DEVICES[backend])
    uniforms, labels = make_uniforms(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    codes = model.sample(uniforms, labels, backend=backend, **how)
    with torch.no_grad():
        logits = model(codes, labels).logits
        scale = how.get("guidance_scale", 1.0)
        if "guidance_power" in how:  # of five rows
            share = [(1 - math.cos(math.pi * (row / 4) ** 2)) / 2 for row in range(5)]
            scale = (1 + 3 * torch.tensor(share, device=logits.device))[:, None]
        logits = guided_logits(logits, model(codes).logits, scale)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, model.config.num_codes)
    rows = exclude_unlikely(rows / how.get("temperature", 1.0), how.get("top_k"), how.get("top_p"))
    assert torch.equal(draw(rows, uniforms.flatten().to(rows.device)), codes.flatten())


@pytest.mark.parametrize("architecture", ["gated", "plain"])
def test_backends_agree_in_single_precision_on_a_network_of_real_size(make_model, architecture):
    model = make_model(
        architecture=architecture, num_codes=512, grid_size=16, hidden_size=64, num_layers=6, head_size=256
    )
    uniforms = make_uniforms(5, 16)
    eager, compiled = (model.sample(uniforms, backend=backend) for backend in ("eager", "compiled"))
    assert (eager == compiled).float().mean() > 0.99, "rounding moves a draw now and then, never all"


def test_a_bfloat16_model_samples_what_its_own_full_pass_nearly_says(make_model):
    model = make_model().bfloat16()
    codes = model.sample(make_uniforms(64, 5))
    reference = make_model().sample(make_uniforms(64, 5))
    frequencies = [
        torch.bincount(grids.flatten(), minlength=11) / grids.numel() for grids in (codes, reference)
    ]
    assert (frequencies[0] - frequencies[1]).abs().max() < 0.03


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("size", "width"), [(1, 1), (3, 5), (6, 12), (64, 128), (70, 33)])
def test_compiled_product_is_the_product_and_a_row_does_not_depend_on_the_others(size, width, dtype):
    generator = np.random.default_rng(0)
    x, weight, start = (
        generator.normal(size=shape).astype(dtype) for shape in ((9, size), (size, width), (9, width))
    )
    together = start.copy()
    pixelcnn_compiled.add_product(together, x, weight)
    expected = start.astype("float64") + x.astype("float64") @ weight.astype("float64")
    np.testing.assert_allclose(together, expected, atol=1e-4 if dtype == "float32" else 1e-12)
    for first, last in ((0, 1), (3, 8), (5, 9), (8, 9)):
        part = start[first:last].copy()
        pixelcnn_compiled.add_product(part, x[first:last], weight)
        assert np.array_equal(part, together[first:last]), "a row was summed in another order"


def test_tanh_of_the_kernels_is_tanh():
    x = np.concatenate([np.linspace(-15, 15, 20001), [0.0, 1e-30, -1e-30, 1e30, -np.inf, np.inf]])
    zeros = np.zeros_like(x)
    for dtype, tolerance in ((np.float32, 4e-7), (np.float64, 1e-15)):
        features = np.stack([x, zeros], axis=1).astype(dtype)
        gated = np.empty((len(x), 1), dtype)
        pixelcnn_compiled.gate(gated, features)
        np.testing.assert_allclose(gated[:, 0], np.tanh(x), atol=tolerance)
        features[:, 1] = x
        pixelcnn_compiled.gate(gated, features)
        np.testing.assert_allclose(gated[:, 0], np.tanh(x) * (1 + np.tanh(x)), atol=3 * tolerance)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0, 4), temperature=st.floats(0.1, 3))
def test_compiled_draw_is_the_draw_of_torch(seed, scale, temperature):
    generator = np.random.default_rng(seed)
    logits, unlabelled = generator.normal(size=(2, 13)) * 3
    uniform = generator.random()
    code = pixelcnn_compiled.draw_code(logits, unlabelled, scale, temperature, uniform)
    both = torch.from_numpy(np.stack([logits, unlabelled] if scale != 1 else [logits]))
    expected = Sampling(temperature=temperature, guidance_scale=scale).draw(
        both, torch.tensor([uniform], dtype=torch.float64)
    )
    assert code == expected.item()


def test_a_resampled_image_goes_on_from_its_ancestor(make_model):
    for architecture in ("gated", "plain"):
        model = make_model(architecture=architecture, kernel_size=5)
        codes = torch.randint(11, (3, 5, 5), generator=torch.Generator().manual_seed(0))
        labels, ancestors = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0])
        mixed = codes.clone()
        mixed[:, :3] = codes[ancestors, :3]
        with torch.inference_mode():
            expected = model(mixed, labels[ancestors]).logits
            cache = open_cache(model, labels)
            for row in range(5):
                if row == 3:
                    cache.reorder(ancestors)
                cache.start_row(row)
                for column in range(5):
                    if row >= 3:
                        torch.testing.assert_close(
                            cache.logits(column), expected[:, :, row, column], atol=1e-5, rtol=1e-5
                        )
                    else:
                        cache.logits(column)
                    cache.put(column, (mixed if row >= 3 else codes)[:, row, column])


# --- which backend -------------------------------------------------------------------------------------------------


def test_backend_pays_for_its_start_before_it_is_chosen(make_model, monkeypatch):
    model = make_model(grid_size=16)
    per_block = 16 * 16 * 4 * pixelcnn_sampler.SAVED_PER_LAYER
    few = math.floor(pixelcnn_sampler.LOADING / per_block)
    many = math.ceil(pixelcnn_sampler.COMPILING / per_block) + 1
    for on_disk, expected in ((False, "eager"), (True, "compiled")):
        monkeypatch.setattr(pixelcnn_compiled, "lie_on_disk", lambda on_disk=on_disk: on_disk)
        assert best_backend(model, few) == "eager", "loading costs more than it saves"
        assert best_backend(model, few + 1) == expected
        assert best_backend(model, many) == "compiled", "compiling is repaid"


def test_without_numba_everything_is_eager_and_asking_for_compiled_says_how(run_python):
    script = """
import sys
sys.modules["numba"] = None
from isic_vq import PixelCNNConfig, PixelCNNModel
import torch
model = PixelCNNModel(PixelCNNConfig(num_codes=4, grid_size=2, hidden_size=4, num_layers=1, head_size=4)).eval()
print(model.best_backend(10**9))
try:
    model.sample(torch.rand(1, 4), backend="compiled")
except ImportError as error:
    print(error)
"""
    backend, message = run_python(script).strip().splitlines()
    assert backend == "eager"
    assert "pip install numba" in message
    assert "backend='eager'" in message


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("fast", "backend is 'fast': expected one of eager, compiled, cuda_graph"),
        ("cuda_graph", "the model is on cpu: backend 'cuda_graph' needs a CUDA device"),
    ],
)
def test_backends_that_cannot_be_are_refused(make_model, backend, text):
    with pytest.raises(ValueError, match=text):
        make_model().sample(make_uniforms(1, 5), backend=backend)


def test_compiled_backend_refuses_half_precision(make_model):
    with pytest.raises(ValueError, match="bfloat16 on cpu: compiled sampling takes float32 or float64"):
        make_model().bfloat16().sample(make_uniforms(1, 5), backend="compiled")
    assert best_backend(make_model().bfloat16(), 10**9) == "eager"


def test_kernels_are_found_on_disk_once_they_were_compiled(make_model):
    make_model().sample(make_uniforms(1, 5), backend="compiled")
    assert pixelcnn_compiled.lie_on_disk()


def test_on_a_device_nothing_is_chosen_that_was_not_run_there(monkeypatch, caplog):
    class Model:  # a stand-in: this machine has no such device
        device, dtype = torch.device("cuda"), torch.float32

    for key, commit in modes.RUN_ON.items():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d, [0-9a-f]{7,}", commit), key
    graphs_were_run = modes.was_run("cuda", "cuda_graph")
    assert best_backend(Model(), 10**9) == ("cuda_graph" if graphs_were_run else "eager")
    monkeypatch.setitem(modes.RUN_ON, ("cuda", "cuda_graph"), "2026-12-01, abcdef0")
    assert best_backend(Model(), 1) == "cuda_graph"


def test_what_was_not_run_is_labelled_once(make_model, monkeypatch, caplog):
    modes.label_unrun.cache_clear()
    make_model().sample(make_uniforms(1, 5))
    assert not caplog.text
    monkeypatch.delitem(modes.RUN_ON, ("cpu", "eager"))
    modes.label_unrun.cache_clear()
    for _ in range(2):
        make_model().sample(make_uniforms(1, 5))
    modes.label_unrun.cache_clear()
    assert caplog.text.count("eager on cpu is not tested: no machine of this project has run it") == 1


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_rows_are_graphed(make_model):
    model = make_model().cuda()
    with torch.inference_mode():
        cache = open_cache(model, torch.tensor([0], device="cuda"))
        assert isinstance(open_rows("cuda_graph", cache, Sampling()), GraphedRows)
        assert type(open_rows("eager", cache, Sampling())) is Rows
