"""A VQ-VAE and a gated PixelCNN that generate images, in one file on torch, Pillow and matplotlib.

    python examples/nano.py my_photos     # a folder of images, those in its subfolders too
    python examples/nano.py               # without one it draws pictures of moles itself

Read it from top to bottom. Two models are trained one after the other:

1. The VQ-VAE learns to write an image as a small grid of whole numbers, its codes, and to read it again.
2. The PixelCNN learns which grids occur. It then writes new grids, and the VQ-VAE's decoder turns them into images.

    image (B, 3, 128, 128)  --encoder-->  latents (B, 16, 16, 16)  --nearest vector-->  codes (B, 16, 16) in 0..255
    image (B, 3, 128, 128)  <--decoder--  vectors (B, 16, 16, 16)  <--look-up---------  codes (B, 16, 16)

B is the number of images, K = 256 the number of codes, D = 16 the length of a code's vector. An image takes
256 codes where it had 49,152 numbers, which is why so small a model can learn to write new ones.

Papers, which the equation numbers below refer to:
  [VQ]  van den Oord et al., Neural Discrete Representation Learning, arXiv 1711.00937
  [CNN] van den Oord et al., Conditional Image Generation with PixelCNN Decoders, arXiv 1606.05328

isic-vq computes the same losses and codes (tests/test_nano.py holds both to it), samples many times faster, and adds
classes, evaluation, and all that makes a run safe to interrupt.
"""

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor, nn

SIDE = 128  # pixels of an image's side; the three halvings of the encoder make a grid of 16 x 16 codes
BETA = 0.25  # weight of the commitment loss, as in [VQ]
DECAY = 0.95  # of the moving averages that the codebook is made of: an average over about 20 steps
RARE = 2.0  # a code that fewer latents than this choose in a step is moved to where there are some
BATCH_SIZE, LEARNING_RATE = 32, 2e-3


# ---------------------------------------------------------------- 1. images


def load_images(folder: Path) -> Tensor:
    """All images of a folder and its subfolders, as bytes `(N, 3, 128, 128)`, the middle square of each."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in Image.registered_extensions()]
    squares = []
    for path in sorted(paths):
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")  # a phone notes how it was held
            squares.append(to_tensor(ImageOps.fit(upright, (SIDE, SIDE))))
        except OSError as error:
            print(f"left out {path}: {error}")
    if len(squares) < 20:
        raise SystemExit(f"{folder} has {len(squares)} readable images: expected at least 20")
    return torch.stack(squares)


def draw_images(number: int, seed: int) -> Tensor:
    """Pictures that look a little like moles, as bytes `(N, 3, 128, 128)`."""
    rng = random.Random(seed)
    return torch.stack([to_tensor(draw_mole(rng)) for _ in range(number)])


def draw_mole(rng: random.Random) -> Image.Image:
    """A brown, uneven spot with a darker middle on skin, and sometimes hairs."""
    skin = (rng.randint(205, 240), rng.randint(160, 190), rng.randint(135, 170))
    image = Image.new("RGB", (SIDE, SIDE), skin)
    draw, darkness = ImageDraw.Draw(image), rng.uniform(0.45, 0.9)
    x, y, radius, start = (rng.uniform(*ends) for ends in ((52, 76), (52, 76), (18, 42), (0, math.tau)))
    for share, brown in ((1, (190, 120, 85)), (rng.uniform(0.3, 0.8), (140, 85, 60))):
        outline = []
        for angle in (math.tau * step / 60 for step in range(60)):
            uneven = 1 + 0.12 * math.sin(2 * angle + start) + 0.08 * math.sin(3 * angle - 2 * start)
            reach = share * radius * uneven
            outline.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(outline, fill=tuple(round(darkness * value) for value in brown))
    for _ in range(rng.choice((0, 0, 4))):
        draw.line([rng.uniform(0, SIDE) for _ in range(4)], fill=(60, 45, 40), width=2)
    return image.filter(ImageFilter.GaussianBlur(1.2))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as bytes `(3, H, W)`."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def random_batch(images: Tensor) -> Tensor:
    """Random images as floats `(BATCH_SIZE, 3, 128, 128)` in [0, 1]."""
    batch = images[torch.randint(len(images), (BATCH_SIZE,))].float() / 255
    # Skin has no top or left, so each of the eight ways to turn and mirror a photo is as good as a new one.
    batch = torch.rot90(batch, int(torch.randint(4, ())), dims=(2, 3))
    return batch.flip(3) if torch.rand(()) < 0.5 else batch


# ---------------------------------------------------------------- 2. VQ-VAE: images <-> codes


class VectorQuantizer(nn.Module):
    """Replaces each latent by the nearest of K vectors, the codebook, and moves these to where the latents are."""

    def __init__(self, num_codes: int, code_dim: int):
        super().__init__()
        # Buffers, not parameters: they are moving averages, which the optimizer leaves alone.
        # e (K, D); n (K,), how many latents of a step chose each code; m (K, D), the sum of those latents.
        self.register_buffer("codebook", torch.randn(num_codes, code_dim))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))
        self.register_buffer("num_updates", torch.tensor(0))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents `(B, D, h, w)` to codebook vectors `(B, D, h, w)`, codes `(B, h, w)` and the commitment loss."""
        rows = latents.permute(0, 2, 3, 1)  # (B, h, w, D): a latent is a row
        flat = rows.flatten(0, 2)  # (N, D), N = B h w
        # [VQ] eq. 1: the code k of least |z - e_k|^2 = |z|^2 - 2 z.e_k + |e_k|^2, whose |z|^2 is the same for every k.
        codes = (self.codebook.square().sum(1) - 2 * flat @ self.codebook.T).argmin(1)  # (N,)
        vectors = self.codebook[codes]
        # [VQ] eq. 3, third term: the encoder should stay near the vectors it has chosen.
        commitment = (flat - vectors).square().mean()
        if self.training:
            self.update(flat.detach(), codes)
        # argmin has no gradient. So the decoder's gradient is handed to the encoder as if the latent had not been
        # replaced (straight-through): the value of this sum is `vectors`, its derivative by `flat` is 1.
        quantized = flat + (vectors - flat).detach()
        return quantized.view(rows.shape).permute(0, 3, 1, 2), codes.view(rows.shape[:3]), commitment

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor) -> None:
        """[VQ] appendix A.1: e_k becomes the moving mean of the latents `(N, D)` that chose k."""
        chosen = F.one_hot(codes, len(self.codebook)).to(latents.dtype)  # (N, K)
        self.counts.mul_(DECAY).add_(chosen.sum(0), alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(chosen.T @ latents, alpha=1 - DECAY)
        total, small = self.counts.sum(), 1e-5  # small: nothing is divided by zero
        counts = (self.counts + small) / (total + len(self.counts) * small) * total
        self.codebook.copy_(self.sums / counts[:, None])
        # A vector that nobody chooses stays where it is, and so is never chosen: put it onto a random latent.
        # At the first step this moves nearly all of them, from noise to where the latents are.
        unused = self.counts < RARE
        generator = torch.Generator().manual_seed(int(self.num_updates))  # the same choice in every run
        rows = torch.randint(len(latents), (len(self.codebook),), generator=generator)
        self.codebook[unused] = latents[rows][unused]
        self.counts[unused] = RARE
        self.sums[unused] = RARE * self.codebook[unused]
        self.num_updates += 1


def halve(size_in: int, size_out: int) -> nn.Module:
    """Half the height and width: convolution, batch normalisation, ReLU."""
    # BatchNorm subtracts the mean, and with it any bias that the convolution had.
    conv = nn.Conv2d(size_in, size_out, kernel_size=4, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(size_out), nn.ReLU())


def double(size_in: int, size_out: int) -> nn.Module:
    """Twice the height and width: `halve` the other way round, by a transposed convolution."""
    conv = nn.ConvTranspose2d(size_in, size_out, kernel_size=4, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(size_out), nn.ReLU())


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder."""

    def __init__(self, sizes: tuple[int, int, int] = (32, 64, 64), num_codes: int = 256, code_dim: int = 16):
        super().__init__()
        a, b, c = sizes
        self.encoder = nn.Sequential(  # (B, 3, 128, 128)
            halve(3, a),  # (B, 32, 64, 64)
            halve(a, b),  # (B, 64, 32, 32)
            halve(b, c),  # (B, 64, 16, 16)
            nn.Conv2d(c, code_dim, kernel_size=1),  # (B, 16, 16, 16); no ReLU: latents are negative, too
        )
        self.quantizer = VectorQuantizer(num_codes, code_dim)
        widen = nn.Conv2d(code_dim, c, kernel_size=1, bias=False)
        self.decoder = nn.Sequential(  # (B, 16, 16, 16)
            nn.Sequential(widen, nn.BatchNorm2d(c), nn.ReLU()),  # (B, 64, 16, 16)
            double(c, b),  # (B, 64, 32, 32)
            double(b, a),  # (B, 32, 64, 64)
            nn.ConvTranspose2d(a, 3, kernel_size=4, stride=2, padding=1),  # (B, 3, 128, 128)
            nn.Sigmoid(),  # pixels in [0, 1]
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, reconstructions `(B, 3, H, W)` and codes `(B, h, w)` of images `(B, 3, H, W)` in [0, 1]."""
        # [VQ] eq. 3 without its second term, which moves the codebook: the moving averages do that.
        quantized, codes, commitment = self.quantizer(self.encoder(2 * images - 1))
        reconstructions = self.decoder(quantized)
        error = F.l1_loss(reconstructions, images) + F.mse_loss(reconstructions, images)
        return error + BETA * commitment, reconstructions, codes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes `(B, h, w)`; call `eval` first, or the codebook learns."""
        return self.quantizer(self.encoder(2 * images - 1))[1]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` of codes `(B, h, w)`."""
        return self.decoder(self.quantizer.codebook[codes].permute(0, 3, 1, 2))


# ---------------------------------------------------------------- 3. PixelCNN: which codes follow which


class MaskedConv2d(nn.Conv2d):
    """A convolution that cannot look ahead: its kernel is zero wherever codes are not yet known.

    Codes are written in the order in which text is read. So the vertical kernel, k x k, sees the rows above its
    middle; the horizontal one, 1 x k, the places to the left of it. Mask "A" hides the middle itself (its row, its
    place) and is for codes; mask "B" shows it and is for features, which know nothing of the code at their own place.

        vertical A   vertical B   horizontal A   horizontal B
          1 1 1        1 1 1         1 0 0          1 1 0
          0 0 0        1 1 1
          0 0 0        0 0 0
    """

    def __init__(self, size_in: int, size_out: int, kernel_size: tuple[int, int], mask: str):
        super().__init__(size_in, size_out, kernel_size, padding="same")
        seen = torch.zeros(kernel_size)
        along = (
            seen if kernel_size[0] > 1 else seen.T
        )  # the vertical kernel's rows, the horizontal one's places
        along[: len(along) // 2 + (mask == "B")] = 1
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, size_in, h, w)` to `(B, size_out, h, w)`."""
        return F.conv2d(features, self.weight * self.seen, self.bias, padding=self.padding)


def gate(features: Tensor) -> Tensor:
    """[CNN] eq. 2: y = tanh(first half of the channels) * sigmoid(second half), `(B, 2C, h, w)` to `(B, C, h, w)`."""
    signal, opening = features.chunk(2, dim=1)
    return signal.tanh() * opening.sigmoid()


class GatedLayer(nn.Module):
    """[CNN] figure 2: two stacks of features side by side.

    The vertical stack knows the rows above. The horizontal one knows its row so far and, because what the vertical one
    knows is added to it, all earlier codes. (One masked stack alone would have a blind spot at the upper right.)
    """

    def __init__(self, size: int, kernel_size: int, mask: str):
        super().__init__()
        self.vertical = MaskedConv2d(size, 2 * size, (kernel_size, kernel_size), mask)
        self.vertical_to_horizontal = nn.Conv2d(2 * size, 2 * size, kernel_size=1, bias=False)
        self.horizontal = MaskedConv2d(size, 2 * size, (1, kernel_size), mask)
        self.output = nn.Conv2d(size, size, kernel_size=1)

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        """New features of both stacks, `(B, C, h, w)` each."""
        above = self.vertical(vertical)
        left = self.horizontal(horizontal)
        return gate(above), self.output(gate(left + self.vertical_to_horizontal(above)))


class PixelCNN(nn.Module):
    """p(codes) = product of p(code | all earlier codes), [CNN] eq. 1."""

    def __init__(self, num_codes: int = 256, grid: int = 16, size: int = 48, num_layers: int = 5):
        super().__init__()
        self.grid = grid
        # A mole is in the middle of its photo: tell the net where on the grid it is.
        self.position = nn.Parameter(torch.zeros(1, size, grid, grid))
        self.embedding = nn.Embedding(num_codes, size)
        self.first = GatedLayer(size, kernel_size=7, mask="A")
        self.layers = nn.ModuleList(GatedLayer(size, kernel_size=3, mask="B") for _ in range(num_layers))
        to_hidden, to_logits = nn.Conv2d(size, 2 * size, 1), nn.Conv2d(2 * size, num_codes, 1)
        self.head = nn.Sequential(nn.ReLU(), to_hidden, nn.ReLU(), to_logits)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of codes `(B, h, w)`; those at a place depend on earlier codes alone."""
        embedded = self.embedding(codes).permute(0, 3, 1, 2)  # (B, C, h, w)
        # Nothing is added to the first layer's output: its input would show every place its own code.
        vertical, horizontal = self.first(embedded, embedded)
        position = self.position[:, :, : codes.shape[1]]
        vertical, horizontal = vertical + position, horizontal + position
        for layer in self.layers:
            new_vertical, new_horizontal = layer(vertical, horizontal)
            vertical, horizontal = vertical + new_vertical, horizontal + new_horizontal
        return self.head(horizontal)

    def loss(self, codes: Tensor) -> Tensor:
        """Mean of -log p(code | earlier codes), in nats per code. All places are trained at once: the masks see to it."""
        return F.cross_entropy(self(codes), codes)

    @torch.no_grad()
    def sample(self, number: int) -> Tensor:
        """Write new codes `(number, h, w)`, one after the other, each drawn from its probabilities."""
        codes = torch.zeros(number, self.grid, self.grid, dtype=torch.long)
        for row in range(self.grid):
            for column in range(self.grid):
                logits = self(codes[:, : row + 1])[:, :, row, column]  # (number, K); later rows do not matter
                codes[:, row, column] = torch.multinomial(logits.softmax(1), 1)[:, 0]
        return codes


# ---------------------------------------------------------------- 4. training

Curves = tuple[list[float], list[tuple[int, float]]]  # loss of every batch; step and loss on held-out images


def fit(model: nn.Module, loss_of: Callable[[Tensor], Tensor], images: Tensor, steps: int) -> Curves:
    """Train by Adam, with a learning rate that falls to 0. Every tenth image is held out, to see what carries over."""
    train, held_out = images[torch.arange(len(images)) % 10 > 0], images[::10][:64].float() / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    by_batch, by_step = [], []
    for step in range(1, steps + 1):
        model.train()
        loss = loss_of(random_batch(train))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        by_batch.append(loss.item())
        if step % 25 == 0 or step == steps:
            model.eval()  # BatchNorm takes its averages, and the codebook stays as it is
            with torch.no_grad():
                by_step.append((step, loss_of(held_out).item()))
            print(f"{type(model).__name__} {step}/{steps}: loss {loss:.4f}, held out {by_step[-1][1]:.4f}")
    return by_batch, by_step


# ---------------------------------------------------------------- 5. pictures


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Images `(rows * columns, 3, H, W)` in [0, 1] side by side as one PNG."""
    rows = images.unflatten(0, (-1, columns))  # (rows, columns, 3, H, W)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows * H, columns * W, 3)
    Image.fromarray((255 * sheet).round().to(torch.uint8).numpy()).save(path)


def plot_losses(curves: dict[str, Curves], path: Path) -> None:
    """The loss of each model, by batch and on held-out images."""
    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.5), layout="constrained")
    for axis, (title, (by_batch, by_step)) in zip(axes, curves.items(), strict=True):
        axis.plot(range(1, len(by_batch) + 1), by_batch, linewidth=0.8, label="batch")
        axis.plot(*zip(*by_step, strict=True), marker="o", markersize=3, label="held out")
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=120)


def plot_codebook(codes: Tensor, num_codes: int, path: Path) -> None:
    """How often each code occurs, the most frequent first."""
    shares = torch.bincount(codes.flatten(), minlength=num_codes).sort(descending=True).values / codes.numel()
    perplexity = torch.special.entr(shares).sum().exp()  # so many codes, all used alike, would be as varied
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.bar(range(num_codes), (100 * shares).tolist(), width=1)
    title = f"{int((shares > 0).sum())} of {num_codes} codes are used, perplexity {perplexity:.0f}"
    axis.set(title=title, xlabel="code, by frequency", ylabel="share of all codes, %")
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- 6. all of it


def main() -> None:
    """Train both models on a folder's images, and save what they make as PNGs."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a folder of images; without it they are drawn")
    parser.add_argument("--output", type=Path, default=Path("nano"), help="a folder for the pictures")
    parser.add_argument("--steps", type=int, default=300, help="of training, for each model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, steps = options.output, options.steps
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    images = load_images(options.folder) if options.folder else draw_images(1000, options.seed)
    print(f"{len(images)} images, of which every tenth is held out")
    vqvae, pixelcnn = VQVAE(), PixelCNN()
    curves = {"VQ-VAE": fit(vqvae, lambda batch: vqvae(batch)[0], images, steps)}
    # From here on the VQ-VAE stays as it is: `fit` leaves a model in eval mode.
    curves["PixelCNN"] = fit(pixelcnn, lambda batch: pixelcnn.loss(vqvae.encode(batch)), images, steps)

    shown = images[:80:10].float() / 255  # held out, all of them
    pairs = torch.cat([shown, vqvae.decode(vqvae.encode(shown))])
    save_grid(pairs, len(shown), folder / "reconstructions.png")
    save_grid(vqvae.decode(pixelcnn.sample(16)), 8, folder / "samples.png")
    codes = torch.cat([vqvae.encode(part.float() / 255) for part in images.split(64)])  # (N, 16, 16)
    plot_codebook(codes, len(vqvae.quantizer.codebook), folder / "codebook.png")
    plot_losses(curves, folder / "losses.png")
    bits = curves["PixelCNN"][1][-1][1] / math.log(2)
    print(f"{bits:.2f} bits per code of held-out images, {bits * codes[0].numel() / 8:.0f} bytes per image")
    print(f"Pictures are in {folder}: samples, reconstructions, codebook, losses.")


if __name__ == "__main__":
    main()
