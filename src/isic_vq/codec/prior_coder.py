"""Coding under the prior: encoder and decoder run the same computation, code by code.

A probability depends by rounding on the number of images computed at once, the order of sums and the number of threads,
and a decoder that is off by one bit in one probability reads garbage from there on. So one function, `_walk`, visits a
block in raster order with the sampler's cached features; encoder and decoder differ only in the source of each code.
"""

import hashlib
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from isic_vq.codec.container import CodecError, Layout
from isic_vq.codec.integer_weights import PRECISION, Weights, integer_weights, static_weights
from isic_vq.codec.range_coder import CodeDecoder, CodeEncoder
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from isic_vq.models.modes import exactly
from isic_vq.models.pixelcnn_cache import open_cache
from isic_vq.models.pixelcnn_sampler import open_rows
from isic_vq.models.sampling import Sampling
from isic_vq.work import torch_threads

BACKEND = "eager"

# From a position and its weights `(lanes, K)` to its codes `(n,)`, n up to the number of lanes.
NextCodes = Callable[[int, Weights], NDArray[np.int64]]


class PriorCoder:
    """Codes blocks of up to `lanes` images under a prior on the CPU, given a class id or the unconditional one."""

    def __init__(self, prior: PixelCNNModel, label: int, lanes: int, threads: int):
        if prior.device.type != "cpu":
            raise ValueError(f"the prior is on {prior.device}: move it with prior.cpu()")
        if lanes < 1 or threads < 1:
            raise ValueError(f"lanes is {lanes} and threads is {threads}: expected at least 1")
        self.prior, self.lanes, self.threads = prior, lanes, threads
        self.labels = prior.checked_labels(torch.full((lanes,), label), lanes)
        self.cluster_weights: Weights | None = None  # given the class, exact integers
        if prior.config.num_clusters:
            self.cluster_weights = static_weights([n - 1 for n in prior.cluster_weights[label].tolist()])

    def encode(self, codes: Tensor) -> bytes:
        """Encode codes `(n, h, w)`, int64 in [0, K), n at most the number of lanes, after their clusters."""
        known, encoder, clusters = codes.flatten(1).numpy(), CodeEncoder(), self.prior.clusters_of(codes)
        if clusters is not None and self.cluster_weights is not None:
            encoder.push(clusters.numpy(), self.cluster_weights)

        def next_codes(position: int, weights: Weights) -> NDArray[np.int64]:
            encoder.push(known[:, position], weights[: len(known)])
            return known[:, position]

        self._walk(next_codes, clusters)
        return encoder.payload()

    def decode(self, payload: bytes, num_images: int) -> Tensor:
        """Decode codes `(num_images, h, w)`; a CodecError under other probabilities is possible, but not certain."""
        decoder, grid = CodeDecoder(payload), self.prior.config.grid_size
        codes, clusters = np.empty((num_images, grid * grid), dtype=np.int64), None
        if self.cluster_weights is not None:
            clusters = torch.from_numpy(decoder.pull(self.cluster_weights, num_images))

        def next_codes(position: int, weights: Weights) -> NDArray[np.int64]:
            codes[:, position] = decoder.pull(weights[:num_images])
            return codes[:, position]

        self._walk(next_codes, clusters)
        return torch.from_numpy(codes).view(num_images, grid, grid)

    def canary(self) -> str:
        """Hash the integer probabilities of a fixed block: sixteen hex digits."""
        digest, lanes = hashlib.sha256(), np.arange(self.lanes)

        def next_codes(position: int, weights: Weights) -> NDArray[np.int64]:
            digest.update(weights.astype("<u4").tobytes())
            return (17 * position + 31 * lanes + position * position // 7) % self.prior.config.num_codes

        number = self.prior.config.num_clusters
        self._walk(next_codes, torch.from_numpy(lanes % number) if number else None)
        return digest.hexdigest()[:16]

    def layout(self) -> Layout:
        """The settings that a decoder must share."""
        return Layout(
            prior=weights_hash(self.prior),
            lanes=self.lanes,
            threads=self.threads,
            dtype=str(self.prior.dtype),
            backend=BACKEND,
            torch=str(torch.__version__),
            precision=PRECISION,
            canary=self.canary(),
        )

    def _walk(self, next_codes: NextCodes, clusters: Tensor | None) -> None:
        """Visit all positions in raster order; lanes without an image hold code 0 and cluster 0."""
        grid, codes = self.prior.config.grid_size, torch.zeros(self.lanes, dtype=torch.int64)
        with exactly(self.prior), torch.inference_mode(), torch_threads(self.threads):
            if clusters is not None:
                clusters = F.pad(clusters, (0, self.lanes - len(clusters)))
            cache = open_cache(self.prior, self.prior.conditions(self.labels, clusters))
            with open_rows(BACKEND, cache, Sampling()) as rows:
                for row in range(grid):
                    rows.start_row(row)
                    for column in range(grid):
                        chosen = next_codes(row * grid + column, integer_weights(rows.logits(column).float()))
                        codes[: len(chosen)] = torch.from_numpy(chosen)
                        cache.put(column, codes)


def coder_of(layout: Layout, prior: PixelCNNModel, label: int) -> PriorCoder:
    """The coder that a file was written with; CodecError if this prior or machine computes other probabilities."""
    expected = {"dtype": str(prior.dtype), "backend": BACKEND, "precision": PRECISION}
    for name, value in expected.items():
        if getattr(layout, name) != value:
            raise CodecError(f"the file was coded with {name} {getattr(layout, name)}: here it is {value}")
    if layout.prior != weights_hash(prior):
        raise CodecError("the file was coded with another prior: name the model that it was compressed with")
    if layout.threads > (cores := os.cpu_count() or 1):
        raise CodecError(
            f"the file was coded with {layout.threads} threads: decompress it on a machine with as many cores, not {cores}"
        )
    coder = PriorCoder(prior, label, layout.lanes, layout.threads)
    if coder.canary() != layout.canary:
        raise CodecError(
            f"this machine (torch {torch.__version__}) does not compute the prior's probabilities to the last bit as "
            f"the one that wrote the file (torch {layout.torch}), and would read garbage: decompress it there, or "
            "compress the images again with --portable"
        )
    return coder


def weights_hash(model: nn.Module) -> str:
    """The sha256 over all tensors and their names: sixteen hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
