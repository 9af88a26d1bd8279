"""examples/nano.py computes what the package does, and shows it in pictures."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from isic_vq import PixelCNNConfig, PixelCNNModel, VQVAEConfig, VQVAEModel

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "nano.py"
CODES, GRID, DIM = 24, 8, 6


@pytest.fixture(scope="module")
def nano():
    spec = importlib.util.spec_from_file_location("nano", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def double():
    """In float64, so that no rounding of either's order of sums decides which of two vectors is the nearest."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def copy_weights(model, into):
    """The package's weights into nano's model: both declare them in the same order.

    Where nano's kernel is larger, its mask hides the rest: the package leaves masked taps out. Class biases, of which nano
    has none, start at zero.
    """
    theirs = {name: value for name, value in model.state_dict().items() if "class_bias" not in name}
    assert all(not value.any() for name, value in model.state_dict().items() if "class_bias" in name)
    ours = into.state_dict()
    for (name, target), value in zip(ours.items(), theirs.values(), strict=True):
        corner = target[tuple(slice(size) for size in value.shape)] if value.ndim else target
        assert corner.shape == value.shape, name
        corner.copy_(value)


def tokenizers(nano):
    torch.manual_seed(0)
    sizes = {"num_codes": CODES, "code_dim": DIM, "hidden_sizes": (4, 6, 8), "num_residual_blocks": 0}
    config = VQVAEConfig(image_size=64, ema_decay=nano.DECAY, dead_code_threshold=nano.RARE, **sizes)
    model = VQVAEModel(config)
    ours = nano.VQVAE((4, 6, 8), CODES, DIM)
    copy_weights(model, ours)
    return model, ours


def priors(nano):
    torch.manual_seed(0)
    sizes = {"grid_size": GRID, "hidden_size": 8, "num_layers": 2, "head_size": 16}
    model = PixelCNNModel(PixelCNNConfig(num_codes=CODES, dropout=0.0, **sizes))
    torch.nn.init.normal_(model.position_embedding)
    for name, weight in model.named_parameters():
        weight.requires_grad_("class_bias" not in name)  # they stay at zero
    ours = nano.PixelCNN(CODES, GRID, size=8, num_layers=2)
    copy_weights(model, ours)
    return model, ours


def step_both(losses, models):
    for model, loss in zip(models, losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.usefixtures("double")
def test_vqvae_trains_as_the_package_does(nano):
    model, ours = tokenizers(nano)
    moved = 0
    for images in torch.rand(4, 5, 3, 64, 64):
        output, (loss, reconstructions, codes) = model(images), ours(images)
        torch.testing.assert_close(loss, output.loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(reconstructions, output.reconstruction, rtol=0, atol=1e-10)
        assert torch.equal(codes, output.codes)
        moved += int((ours.quantizer.counts == nano.RARE).sum())
        step_both([output.loss, loss], [model, ours])
        for mine, theirs in zip(ours.state_dict().values(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    assert moved > 0, "no code fell out of use: the test does not see how they are moved"
    assert len(codes.unique()) > 5, "too few codes to tell anything"


@pytest.mark.usefixtures("double")
def test_vqvae_gives_the_packages_codes_and_images(nano):
    model, ours = (part.eval() for part in tokenizers(nano))
    images = torch.rand(3, 3, 64, 64)
    codes = ours.encode(images)
    assert torch.equal(codes, model.encode(images))
    torch.testing.assert_close(ours.decode(codes), model.decode(codes), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_pixelcnn_trains_as_the_package_does(nano):
    model, ours = priors(nano)
    for codes in torch.randint(CODES, (3, 4, GRID, GRID)):
        output, loss = model(codes), ours.loss(codes)
        torch.testing.assert_close(ours(codes), output.logits, rtol=0, atol=1e-10)
        # The package takes the loss in float32, whatever the logits are in.
        torch.testing.assert_close(loss, output.loss.double(), rtol=1e-6, atol=0)
        step_both([torch.nn.functional.cross_entropy(output.logits, codes), loss], [model, ours])


def test_pixelcnn_sees_all_earlier_codes_and_no_later_one(nano):
    torch.manual_seed(0)
    model = nano.PixelCNN(CODES, GRID, size=8, num_layers=4).eval()
    codes = torch.randint(CODES, (1, GRID, GRID))
    logits = model(codes).flatten(2)
    for place in range(GRID * GRID):
        other = codes.clone()
        other.view(-1)[place] = (other.view(-1)[place] + 1) % CODES
        changed = (model(other).flatten(2) != logits).any(1)[0]
        assert not changed[: place + 1].any(), f"a code at {place} is seen before it is known"
    # Five layers reach over the whole of so small a grid: from its middle, nothing earlier is hidden.
    embedded = model.embedding(codes).permute(0, 3, 1, 2).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded.permute(0, 2, 3, 1)
    model(codes)[0, :, 4, 4].sum().backward()
    seen = (embedded.grad[0] != 0).any(0).flatten()
    assert seen[: 4 * GRID + 4].all()
    assert not seen[4 * GRID + 4 :].any()


def test_a_row_does_not_need_the_rows_below(nano):
    torch.manual_seed(0)
    model = nano.PixelCNN(CODES, GRID, size=8, num_layers=2).eval()
    codes = torch.randint(CODES, (2, GRID, GRID))
    torch.testing.assert_close(model(codes[:, :5]), model(codes)[:, :, :5])


def test_samples_follow_the_models_probabilities(nano):
    torch.manual_seed(0)
    model = nano.PixelCNN(num_codes=3, grid=2, size=4, num_layers=1).eval()
    torch.nn.init.normal_(model.head[-1].weight, std=2)
    samples = model.sample(20_000).flatten(1)
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4)  # all 81
    with torch.no_grad():
        log_p = model(grids.view(-1, 2, 2)).log_softmax(1).flatten(2)
    expected = log_p.gather(1, grids[:, None])[:, 0].sum(1).exp()
    found = torch.bincount(samples @ torch.tensor([27, 9, 3, 1]), minlength=81) / len(samples)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert (found - expected).abs().max() < 0.015
    assert (found - 1 / 81).abs().max() > 0.03, "hardly other than uniform: the test sees nothing"


def test_nano_is_short_and_stands_alone():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 400
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    outside = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert outside == {"torch", "PIL", "matplotlib"}


def test_images_of_subfolders_are_read_and_broken_ones_named(nano, tmp_path, capsys):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for index, pixels in enumerate(nano.draw_images(24, seed=0)):
        folder = tmp_path if index % 2 else tmp_path / "deep" / "er"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((200, 150)).save(folder / f"{index}.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = nano.load_images(tmp_path)
    assert (images.shape, images.dtype) == ((24, 3, nano.SIDE, nano.SIDE), torch.uint8)
    assert "broken.png" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has 12 readable images"):
        nano.load_images(tmp_path / "deep")


@pytest.mark.slow
def test_nano_makes_its_pictures(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps", "5", "--output", "pictures"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"reconstructions.png", "samples.png", "codebook.png", "losses.png"}
    with Image.open(tmp_path / "pictures" / "samples.png") as picture:
        assert picture.size == (8 * 128, 2 * 128)
