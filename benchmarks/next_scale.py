"""How fast a VAR draws an image's codes, beside a transformer that draws them one by one and beside a PixelCNN.

    python benchmarks/next_scale.py
    python benchmarks/next_scale.py --batches 1 --rounds 5

The VAR and the PixelCNN are those of two repositories, the shipped ones by default; of the VAR all is timed that lies
between noise and codes, the tokenizer's share included. Both are timed once more from nothing to images. The
transformer has the VAR's layers, as many and as wide, and random weights; it draws the 16 x 16 grid in raster order, a
code per pass, with keys and values cached in place. Its draws are checked against its full pass before anything is timed. Contestants take turns as measure.py has it.
Operations are those of products and convolutions, counted by torch; table look-ups and numba's kernels count nothing.
Results go to benchmarks/reports/next_scale.json.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isic_vq.evaluation.cost import count_flops, flops_per_image
from isic_vq.hub.card import history, read_provenance
from isic_vq.hub.pretrained import load_model, resolve
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_var import VARHead, VARLayer, VARModel
from isic_vq.models.sampling import Sampling, draw
from measure import (
    Contestant,
    compare,
    num_parameters,
    one_cluster,
    print_figures,
    write_report,
)

VAR, RASTER = "VAR", "raster transformer, cached"
EAGER, COMPILED = "PixelCNN, eager", "PixelCNN, compiled"
VAR_IMAGES, PIXELCNN_IMAGES = "VAR, images", "PixelCNN, compiled, images"
DECODING_VAR, DECODING_PIXELCNN = "decoding, VAR", "decoding, PixelCNN"
FIGURES = {
    "codes: VAR over raster transformer": (RASTER, VAR),
    "codes: VAR over PixelCNN, eager": (EAGER, VAR),
    "codes: VAR over PixelCNN, compiled": (COMPILED, VAR),
    "images: VAR over PixelCNN, compiled": (PIXELCNN_IMAGES, VAR_IMAGES),
}


class FixedCache:
    """Keys and values of a layer in a tensor of their full length, so that none is ever copied."""

    def __init__(self, batch: int, heads: int, length: int, channels: int):
        self.keys_values = torch.zeros(2, batch, heads, length, channels)
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add those of the next code; returns all so far."""
        self.keys_values[0, :, :, self.length] = keys[:, :, 0]
        self.keys_values[1, :, :, self.length] = values[:, :, 0]
        self.length += 1
        keys, values = self.keys_values[:, :, :, : self.length]
        return keys, values


class RasterTransformer(nn.Module):
    """A transformer of a VAR's depth and width over the codes of its finest grid, in raster order."""

    def __init__(self, var: VARModel):
        super().__init__()
        config, size = var.config, var.config.hidden_size
        self.config, self.length = config, config.sizes[-1]
        self.code_embedding = nn.Embedding(config.num_codes, size)
        self.position_embedding = nn.Parameter(0.5 * torch.randn(self.length, size))
        self.class_embedding = nn.Embedding(config.unconditional_id + 1, size)
        self.modulation = nn.Linear(size, 6 * size)
        self.layers = nn.ModuleList(VARLayer(config, index) for index in range(config.num_layers))
        self.head = VARHead(config)
        for parameter in self.parameters():  # layers leave theirs empty, for whoever loads weights
            nn.init.normal_(parameter, std=0.1)

    def logits(self, hidden: Tensor, labels: Tensor, mask: Tensor | None, caches: list[Any]) -> Tensor:
        """Logits `(B, n, K)` of input features `(B, n, C)`."""
        classes = self.class_embedding(labels)
        condition = self.modulation(nn.functional.silu(classes)).unflatten(1, (6, -1))
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, condition, mask, cache)
        return self.head(hidden, classes)

    @torch.inference_mode()
    def sample(self, uniforms: Tensor, labels: Tensor) -> Tensor:
        """Codes `(B, h * w)`, drawn one by one from uniforms of that shape."""
        batch, config = len(uniforms), self.config
        channels = config.hidden_size // config.num_heads
        caches = [FixedCache(batch, config.num_heads, self.length, channels) for _ in self.layers]
        given, codes = self.class_embedding(labels), []
        for position in range(self.length):
            hidden = (given + self.position_embedding[position])[:, None]
            codes.append(draw(self.logits(hidden, labels, None, caches)[:, 0], uniforms[:, position]))
            given = self.code_embedding(codes[-1])
        return torch.stack(codes, dim=1)

    @torch.inference_mode()
    def check(self) -> None:
        """Refuse to be timed if cached draws are not those of the full pass."""
        uniforms = torch.rand(2, self.length, dtype=torch.float64)
        labels = torch.tensor([0, 1])
        codes = self.sample(uniforms, labels)
        given = torch.cat([self.class_embedding(labels)[:, None], self.code_embedding(codes[:, :-1])], dim=1)
        mask = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        full = self.logits(given + self.position_embedding, labels, mask, [None] * len(self.layers))
        share = (draw(full, uniforms) == codes).double().mean().item()
        assert share > 0.99, f"the baseline is broken: {share:.1%} of its draws are those of its full pass"


def contestants(
    var: IsicVQModel, pixelcnn: IsicVQModel, raster: RasterTransformer, batch: int
) -> dict[str, Contestant]:
    """Ways to draw the codes of a batch of unconditional images."""
    var_noise, noise = (
        torch.rand(batch, count, dtype=torch.float64)
        for count in (var.config.prior_config.num_positions, 256)
    )
    labels = torch.zeros(batch, dtype=torch.long)
    of_var, clusters = (one_cluster(model.prior, batch) for model in (var, pixelcnn))
    sample = partial(pixelcnn.prior.sample, noise, labels, Sampling(), clusters=clusters)
    steps = {
        VAR: (
            var.prior,
            partial(
                var.prior.sample, var_noise, labels, Sampling(), extend=var.vqvae.extend, clusters=of_var
            ),
        ),
        RASTER: (raster, partial(raster.sample, noise, labels)),
        EAGER: (pixelcnn.prior, partial(sample, backend="eager")),
        COMPILED: (pixelcnn.prior, partial(sample, backend="compiled")),
        VAR_IMAGES: (var, partial(var.generate, batch, batch_size=batch)),
        PIXELCNN_IMAGES: (pixelcnn, partial(pixelcnn.generate, batch, batch_size=batch, backend="compiled")),
    }
    return {
        name: Contestant(step, batch, facts={"parameters": num_parameters(model)})
        for name, (model, step) in steps.items()
    }


def training_pflop(name: str, model: IsicVQModel) -> dict[str, float]:
    """Operations that training took by part, in 1e15: three passes forward (one back is two) of every image of every step."""
    runs, flops = read_provenance(Path(resolve(name)))["training"], flops_per_image(model)
    images = {
        part: sum(stage["steps"] * stage["recipe"]["loop"]["batch_size"] for stage in history(record))
        for part, record in runs.items()
    }
    return {
        "vqvae": 3 * flops["tokenizer"] * images["vqvae"] / 1e15,
        "prior": 3 * flops["prior"] * images["prior"] / 1e15,
    }


def main() -> None:
    """Run the races and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--var", default="model_cards/isic-vq-128-var")
    parser.add_argument("--pixelcnn", default="model_cards/isic-vq-128")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    var, pixelcnn = (
        load_model(IsicVQModel, name).eval().float() for name in (arguments.var, arguments.pixelcnn)
    )
    raster = RasterTransformer(var.prior).eval()
    raster.check()
    alone = contestants(var, pixelcnn, raster, 1)
    operations = {name: count_flops(alone[name].step) / 1e9 for name in (VAR, RASTER, EAGER)}
    for name, model in {DECODING_VAR: var, DECODING_PIXELCNN: pixelcnn}.items():
        codes = torch.zeros(1, *model.config.prior_config.code_shape, dtype=torch.long)
        operations[name] = count_flops(partial(model.decode, codes)) / 1e9
    print({name: f"{value:.3f} GFLOP per image" for name, value in operations.items()})
    races = []
    for batch in arguments.batches:
        print(f"batch {batch}")
        rows = compare(contestants(var, pixelcnn, raster, batch), FIGURES, arguments.rounds, warmup=2)
        for row in rows["contestants"].values():
            row["seconds_per_image"] = row["seconds_per_step"]["median"] / batch
        print_figures(rows)
        print({name: f"{row['seconds_per_image']:.4f} s/image" for name, row in rows["contestants"].items()})
        races.append({"batch": batch, **rows})
    settings = {
        "var": {"name": Path(resolve(arguments.var)).name, **var.config.prior_config.to_diff_dict()},
        "pixelcnn": {
            "name": Path(resolve(arguments.pixelcnn)).name,
            **pixelcnn.config.prior_config.to_diff_dict(),
        },
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
    }
    training = {
        "VAR": training_pflop(arguments.var, var),
        "PixelCNN": training_pflop(arguments.pixelcnn, pixelcnn),
    }
    figures = {"gflops_per_image": operations, "training_pflop": training, "races": races}
    write_report("next_scale", settings, figures)


if __name__ == "__main__":
    main()
