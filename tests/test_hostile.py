"""Files that were made to harm: each is refused before it costs memory, leaves its folder or becomes somebody's page."""

import contextlib
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from huggingface_hub import ModelCard

from isic_vq import IsicVQModel, PixelCNNConfig, VARConfig, VQVAEConfig
from isic_vq.__main__ import interrupt_again
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source, open_source
from isic_vq.figures.write import csv_bytes
from isic_vq.hub.card import as_text, render_card
from isic_vq.hub.pretrained import ModelError, load_model
from isic_vq.yaml_text import read_yaml
from tiny_repository import write_with_card

SCRIPT = (
    "Clinic <script>alert(1)</script>\n# Cured\n---\nlicense: mit\n---\n| a | [b](https://example.org) `d"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_with_card(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def model_folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "tiny")


def test_an_attribution_is_shown_and_does_nothing(model_folder):
    path = model_folder / "provenance.json"
    origin = json.loads(path.read_text(encoding="utf-8"))
    for info in [origin["training_data"], *filter(None, origin["training_data_by_stage"].values())]:
        info |= {
            "attributions": [SCRIPT],
            "snapshot": SCRIPT,
            "name": f"folder:{SCRIPT}",
            "diagnoses": {SCRIPT: 5},
        }
    path.write_text(json.dumps(origin), encoding="utf-8")
    before = ModelCard((model_folder / "README.md").read_text(encoding="utf-8"))
    text = render_card(model_folder, "tiny")
    card = ModelCard(text)
    assert card.data.license == before.data.license != "mit"
    assert "<script" not in text
    assert [line for line in text.splitlines() if line.startswith(("# ", "---"))] == ["---", "---", "# tiny"]
    shown = "Clinic &lt;script>alert(1)&lt;/script> # Cured --- license: mit --- \\| a \\| [b\\](https://example.org) \\`d"
    assert text.count(shown) >= 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# Cured", "\\# Cured"),
        ("- a", "\\- a"),
        ("12. a", "12\\. a"),
        ("---", "\\---"),
        ("> a", "\\> a"),
        ("~~~", "\\~~~"),
        ("a\\|b", "a\\\\\\|b"),
        ("*.parquet, 3.5 & -1 [x] _y_", "*.parquet, 3.5 & -1 [x] _y_"),
    ],
)
def test_text_of_others_stays_text(text, shown):
    assert as_text(text) == shown


def test_no_cell_of_a_table_is_a_formula():
    cells = ["=1+1", "+a", "-b", "@c", "\t=d", "\re", "f", ""]
    columns = {"name": cells, "value": [-1.5, 2.0, float("nan"), -3, 0, 1, 2, 3]}
    rows = list(csv.reader(io.StringIO(csv_bytes(columns).decode(), newline="")))[1:]
    assert [row[0] for row in rows] == [*(f"'{cell}" for cell in cells[:5]), "'\ne", "f", ""]
    assert [row[1] for row in rows][:4] == ["-1.5", "2.0", "", "-3"]


def test_aliases_are_read_as_far_as_they_stay_small():
    assert read_yaml("a: &x [1, 1e-3]\nb: *x") == {"a": [1, 1e-3], "b": [1, 1e-3]}
    bomb = "a0: &a0 [lol]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for text, message in (
        (bomb, "more than 10,000 values"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 10**4, "recursion"),
        ("a: [", "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            read_yaml(text)
    assert not isinstance(yaml.YAMLError(), ValueError)  # so the callers' ValueError is ours


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({"weight_map": {"a": "prior/model.safetensors"}, "metadata": 5}, "has no weight_map"),
        ({"weight_map": {}, "metadata": {}}, "has no weight_map"),
        ({"weight_map": {"a": 5}}, "has no weight_map"),
        ({"weight_map": {"a": "../other/model.safetensors"}, "metadata": {}}, "outside"),
        ({"weight_map": {"a": "/etc/passwd"}, "metadata": {}}, "outside"),
    ],
    ids=repr,
)
def test_an_index_names_files_of_its_folder(model_folder, index, message):
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load_model(IsicVQModel, str(model_folder))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (VQVAEConfig, {"hidden_sizes": [70000, 70000], "image_size": 64}),
        (VQVAEConfig, {"num_codes": 10**9}),
        (VQVAEConfig, {"residual_size": 10**9}),
        (VQVAEConfig, {"refinement_size": 10**6}),
        (VQVAEConfig, {"num_residual_blocks": 10**6}),
        (VQVAEConfig, {"image_size": 2**20}),
        (VQVAEConfig, {"num_channels": 10**9}),
        (PixelCNNConfig, {"hidden_size": 10**6}),
        (PixelCNNConfig, {"num_layers": 10**6}),
        (PixelCNNConfig, {"head_size": 10**8}),
        (PixelCNNConfig, {"first_kernel_size": 10**5 + 1}),
        (PixelCNNConfig, {"kernel_size": 10**5 + 1}),
        (PixelCNNConfig, {"grid_size": 10**5}),
        (VARConfig, {"hidden_size": 6 * 10**5}),
        (VARConfig, {"scales": [1, 1000]}),
        (VARConfig, {"mlp_ratio": 1e9}),
    ],
    ids=str,
)
def test_a_size_beyond_reason_is_refused_by_the_config(config, sizes):
    with pytest.raises(Exception, match="at most") as caught:
        config(**sizes)
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)


def test_a_bound_of_the_parameters_lies_below_their_number():
    model = load_model(IsicVQModel)
    for part in (model.vqvae, model.prior):
        number = sum(parameter.numel() for parameter in part.parameters())
        assert number / 20 < part.config.least_parameters < number


def test_more_parameters_than_the_weights_have_bytes_are_refused(model_folder):
    path = model_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["prior_config"]["hidden_size"] = 5000
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="asks for at least .* and the weights are"):
        load_model(IsicVQModel, str(model_folder))


@pytest.mark.parametrize("name", ["vqvae_config", "prior_config"])
@pytest.mark.parametrize(
    "value", ["x", 5, [1], {"id2label": "x"}, {"id2label": {"0": 5}}, {"num_codes": "x"}], ids=str
)
def test_a_config_of_another_shape_is_a_model_error(model_folder, name, value):
    path = model_folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), name: value}
    path.write_text(json.dumps(config), encoding="utf-8")
    if name == "vqvae_config" and isinstance(value, dict) and "id2label" in value:
        return  # a tokenizer has no classes
    with pytest.raises(ModelError, match="cannot be read as a whole model"):
        load_model(IsicVQModel, str(model_folder))


def test_an_image_outside_of_its_parquet_files_folder_is_refused(tmp_path, photo_bytes):
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo_bytes)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "own.png").write_bytes(photo_bytes)
    for path in (secret, folder / ".." / "secret.png", folder / "own.png"):
        rows = [{"image": {"bytes": None, "path": str(path)}, "isic_id": "a", "diagnosis": "nevus"}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
        uri = f"parquet:{folder / 'a.parquet'}"
        if path.name == "own.png":
            assert len(open_source(uri)) == len(list(find_source(uri).stream())) == 1
            continue
        with pytest.raises(DataError, match="outside of the file's folder"):
            open_source(uri)
        with pytest.raises(DataError, match="outside of the file's folder"):
            list(find_source(uri).stream())


@pytest.fixture
def photo_bytes():
    from isic_vq.data.synthetic_images import synthetic_record

    return synthetic_record(0, 0)["image"]["bytes"]


@pytest.mark.parametrize(
    "about",
    [{"file_name": 5}, {"diagnosis_1": 5, "diagnosis_2": [1]}, {"metadata": {"clinical": {"age": []}}}],
    ids=str,
)
def test_a_sidecar_of_other_types_is_read_or_refused_in_one_line(tmp_path, photo_bytes, about):
    (tmp_path / "a.png").write_bytes(photo_bytes)
    (tmp_path / "a.json").write_text(json.dumps(about), encoding="utf-8")
    with contextlib.suppress(DataError):
        assert open_source(f"folder:{tmp_path}").num_rows == 1


@pytest.mark.slow
def test_ctrl_c_during_start_up_is_one_line(tmp_path):
    # On a busy machine Python itself may need longer than the first wait, and its Ctrl-C is a traceback.
    start = (
        "import runpy, isic_vq; print('begun', flush=True); runpy.run_module('isic_vq', run_name='__main__')"
    )
    command = [sys.executable, "-c", start, "score", "synthetic:2000", "-o", str(tmp_path)]
    for seconds in (0.3, 0.6, 1.5, 3):
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background job, as these tests may be, ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            try:
                assert process.stdout.readline() == "begun\n"
                time.sleep(seconds)
                process.send_signal(signal.SIGINT)
                assert (process.communicate(timeout=30)[0], process.returncode) == ("interrupted\n", 130)
            finally:
                process.kill()


def test_ctrl_c_in_a_destructor_is_not_lost(monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        Dying()
        time.sleep(10)

    monkeypatch.setattr(sys, "unraisablehook", interrupt_again)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's worker may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_bug_says_that_it_is_one(run, monkeypatch, tmp_path):
    monkeypatch.setattr("isic_vq.hub.pretrained.resolve", lambda model: {}[f"no\n{model}"])
    code, _, stderr = run("generate", "-o", tmp_path)
    assert (code, stderr.count("\n")) == (1, 1)
    assert stderr.startswith("error: KeyError: ")
    assert "this is a bug in isic-vq" in stderr
    with pytest.raises(KeyError):
        run("--debug", "generate", "-o", tmp_path)


def test_counts_that_no_memory_holds_are_refused_with_the_number(run, tmp_path):
    many = 10**30
    for options, message in (
        (["-n", many], "at most 4096 PNGs"),
        (["-n", many, "--shards", "parquet"], "at most 99,999 shards"),
        (["-n", 10**9, "--shards", "parquet", "--shard-size", 16 * 10**8], "at most 16,384 images"),
        (["-n", 2, "--batch-size", many], "expected 1 to 4096"),
    ):
        code, _, stderr = run("generate", "-o", tmp_path / "out", *options)
        assert code == 1
        assert message in stderr
        assert "0" * 9 in stderr  # the number itself
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    code, stdout, _ = run("reconstruct", "synthetic:70", "-o", tmp_path / "many", "--limit", 70)
    assert code == 0
    assert stdout.startswith("70 images: ")
    assert stdout.endswith("grid.png of the first 64\n")
    assert len(list((tmp_path / "many").glob("image-*.png"))) == 70
