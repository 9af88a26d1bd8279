"""Vector quantization: nearest codebook vector, commitment loss, codebook learning.

Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937v2: eq. 1
(nearest vector), eq. 3 (losses), appendix A.1 (moving-average codebook).
Differs: Laplace-smoothed counts; codes that fall out of use are moved onto latents of the batch; the
codebook starts at k-means centroids when the caller asks for it (Lancucki et al., arXiv 2005.08520).
Several public implementations put beta on the codebook term; here it multiplies the commitment term
||z - sg(e)||^2, as in the paper.

This file is tensor math only: it knows nothing of images, optimizers or processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2048  # latents scored at once: bounds the score matrix to 2048 x K, which stays in cache
GROUP = 32  # scores of which only the least is compared with those of other groups


def row_argmin(scores: Tensor) -> Tensor:
    """Column of the least element of each row of `(N, K)`, the lowest on ties: `scores.argmin(1)`, but faster.

    On a CPU torch takes an argmin element by element but a minimum by vectors, at twenty times the speed. So the minima of
    groups of columns are compared first, and only the group of the least one is searched.
    """
    if torch.compiler.is_compiling():
        return scores.argmin(1)
    size = math.gcd(scores.shape[1], GROUP)
    groups = scores.unflatten(1, (-1, size))
    best = groups.amin(2).argmin(1)
    rows = torch.arange(scores.shape[0], device=scores.device)
    return best * size + groups[rows, best].argmin(1)


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector nearest to each latent, the lowest index on ties (eq. 1).

    argmin_k ||z - e_k||^2 = argmin_k ||e_k||^2 - 2 z.e_k, because ||z||^2 is the same for every k.

    Args:
        latents (`torch.Tensor` of shape `(N, D)`): float32 or float64.
        codebook (`torch.Tensor` of shape `(K, D)`): same dtype.

    Returns:
        `torch.LongTensor` of shape `(N,)`, in [0, K).
    """
    squared_norms = codebook.square().sum(1)
    # A graph for any number of latents has no loop over them.
    parts = [latents] if torch.compiler.is_compiling() else latents.split(CHUNK)
    return torch.cat([row_argmin(torch.addmm(squared_norms, part, codebook.t(), alpha=-2)) for part in parts])


def assignment_sums(latents: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts `(K,)` and sums `(K, D)` of the latents `(N, D)` of each code, in their dtype: what processes add up."""
    counts = torch.bincount(codes, minlength=num_codes).to(latents.dtype)
    sums = latents.new_zeros(num_codes, latents.shape[1]).index_add_(0, codes, latents)
    return counts, sums


def usage_and_perplexity(counts: Tensor) -> tuple[float, float]:
    """Summarise how a whole dataset uses the codebook.

    Args:
        counts (`torch.Tensor` of shape `(K,)`): how often each code was used, over the dataset.

    Returns:
        The share of codes used at least once, in [0, 1], and the perplexity exp(entropy), in [1, K].

    Raises:
        ValueError: if nothing was counted.
    """
    total = counts.sum()
    if total <= 0:
        raise ValueError("no code was counted: expected at least one image")
    probabilities = counts.double() / total.double()
    entropy = -torch.special.xlogy(probabilities, probabilities).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def kmeans(latents: Tensor, num_codes: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Lloyd's k-means from distinct random latents; an empty cluster restarts at a random latent.

    Args:
        latents (`torch.Tensor` of shape `(N, D)`): float32 or float64, N >= `num_codes`.
        num_codes: K.
        generator: CPU generator every random choice is drawn from.
        iterations: Lloyd iterations.

    Returns:
        Centroids of shape `(K, D)`.

    Raises:
        ValueError: if there are fewer latents than codes.
    """
    num_latents = latents.shape[0]
    if num_latents < num_codes:
        raise ValueError(
            f"k-means needs at least {num_codes} latents, one per code, but got {num_latents}: "
            "give it more images or lower num_codes"
        )
    start = torch.randperm(num_latents, generator=generator)[:num_codes]
    centroids = latents[start.to(latents.device)].clone()
    for _ in range(iterations):
        counts, sums = assignment_sums(latents, nearest_codes(latents, centroids), num_codes)
        spare = torch.randint(num_latents, (num_codes,), generator=generator).to(latents.device)
        means = sums / counts.clamp(min=1)[:, None]
        centroids = torch.where((counts > 0)[:, None], means, latents[spare])
    return centroids


def rows(grid: Tensor) -> Tensor:
    """Features `(B, D, h, w)` with channels last, `(B, h, w, D)`."""
    return grid.permute(0, 2, 3, 1)


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The quantized latents, whose gradient goes to the latents as if nothing had been quantized."""
    return latents - (latents - quantized.detach()).detach()  # latents first: their memory format is kept


@dataclass
class Quantization:
    """What `VQVAEVectorQuantizer` returns."""

    quantized: Tensor  # `(B, D, h, w)`, codebook vectors; the gradient goes straight through to the latents
    codes: Tensor  # int64 in [0, K); `(B, h, w)`, or `(B, L)` over several scales
    commitment_loss: Tensor  # scalar, mean over B, h, w and D of (z - sg(e))^2
    codebook_loss: Tensor  # scalar, mean of (sg(z) - e)^2; without gradient where nothing in e learns by it


class VQVAEVectorQuantizer(nn.Module):
    """Codebook of K vectors, learned by moving averages ("ema") or by gradient ("gradient").

    In training mode each forward pass updates the moving statistics once, in eval mode never. A training loop
    whose step is made of several passes (accumulation, several processes) calls `defer` first: passes are then
    only recorded, and the loop calls `update` once per step with the latents of all of them. Runs in the codebook's
    own precision (float32 or better) even under autocast.

    Args:
        num_codes: K.
        code_dim: D.
        update: "ema" or "gradient".
        decay: decay of the moving statistics per step.
        epsilon: Laplace smoothing of the counts.
        dead_code_threshold: moving count (latents per step) below which a code is moved; 0 = never.
    """

    codebook: Tensor
    cluster_size: Tensor
    code_sums: Tensor
    num_updates: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        update: str,
        decay: float,
        epsilon: float,
        dead_code_threshold: float,
    ):
        super().__init__()
        self.num_codes, self.code_dim, self.learns_by = num_codes, code_dim, update
        self.decay, self.epsilon, self.dead_code_threshold = decay, epsilon, dead_code_threshold
        with torch.random.fork_rng([]):  # what is made after it draws what it always drew
            codebook = torch.randn(num_codes, code_dim)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("cluster_size", torch.ones(num_codes))  # moving counts
        self.register_buffer("code_sums", codebook.clone())  # moving sums of latents
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))  # seeds the resets
        self.deferred: list[tuple[Tensor, Tensor]] | None = (
            None  # passes since the last update, once deferred
        )

    @property
    def learns_by_loss(self) -> bool:
        """Whether the codebook loss teaches something."""
        return self.learns_by == "gradient"

    def forward(self, latents: Tensor) -> Quantization:
        """Quantize latents of shape `(B, D, h, w)`.

        Raises:
            ValueError: if the channel count is not `code_dim`.
        """
        self._check(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = rows(latents.to(self.codebook.dtype))  # (B, h, w, D)
            flat = z.reshape(-1, self.code_dim)  # a view where latents are channels-last
            codes = nearest_codes(flat, self.codebook)
            e = F.embedding(codes, self.codebook)
            commitment_loss = F.mse_loss(flat, e.detach())
            codebook_loss = F.mse_loss(e, flat.detach()) if e.requires_grad else commitment_loss.detach()
            quantized = straight_through(z, e.view(z.shape))
            if self.training:
                self._see(flat.detach(), codes)
        quantized, codes = quantized.permute(0, 3, 1, 2), codes.view(z.shape[:3])
        return Quantization(quantized, codes, commitment_loss, codebook_loss)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Codes of latents `(B, D, h, w)`, those of `forward` without learning from them: `(B, h, w)`."""
        self._check(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = rows(latents.to(self.codebook.dtype))
            return nearest_codes(z.reshape(-1, self.code_dim), self.codebook).view(z.shape[:3])

    def rows_to_learn(self, latents: Tensor, quantized: bool = True) -> Tensor:
        """The vectors `(N, D)` of latents `(B, D, h, w)` that the codebook represents: here the latents themselves.

        Whether they are `quantized` makes a difference over several scales only.
        """
        return rows(latents.to(self.codebook.dtype)).reshape(-1, self.code_dim)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook vectors of shape `(B, D, h, w)` for codes of shape `(B, h, w)`.

        Raises:
            ValueError: if codes have another shape or type, or one lies outside [0, K).
        """
        (grid,) = self.grids(self.checked(codes))
        return F.embedding(grid, self.codebook).permute(0, 3, 1, 2)

    def checked(self, codes: Tensor) -> Tensor:
        """The codes as int64; a compiled or exported graph does not look at them.

        Raises:
            ValueError: they are no whole numbers, or one of them lies outside [0, K).
        """
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes are {codes.dtype}: expected whole numbers")
        codes = codes.long()
        if torch.compiler.is_compiling():
            return codes
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ValueError(
                f"codes lie in [{codes.min().item()}, {codes.max().item()}]: expected [0, {self.num_codes}); "
                "they come from another tokenizer"
            )
        return codes

    def grids(self, codes: Tensor) -> list[Tensor]:
        """The code grids of an image, coarse to fine: here there is one, `(B, h, w)`; ValueError for another shape."""
        if codes.ndim != 3:
            raise ValueError(f"codes have shape {tuple(codes.shape)}: expected (batch, height, width)")
        return [codes]

    def context(self, codes: Tensor) -> Tensor:
        """A prior's input for later scales: of a single grid none, `(B, 0, D)`."""
        return self.codebook.new_zeros(codes.shape[0], 0, self.code_dim)

    def extend(self, features: Tensor | None, codes: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """As of several scales, see `VQVAEResidualQuantizer`; codes `(B, h, w)` are the only one."""
        return self.lookup(codes), None

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.code_dim:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: expected (batch, {self.code_dim}, height, width)"
            )

    def defer(self) -> None:
        """From now on record training passes for `take_deferred`, and leave the learning to the caller."""
        self.deferred = []

    def take_deferred(self) -> list[tuple[Tensor, Tensor]]:
        """Hand over the (latents `(N, D)`, codes `(N,)`) of the training passes since the last call."""
        passes = self.deferred or []
        if self.deferred is not None:
            self.deferred = []
        return passes

    def _see(self, latents: Tensor, codes: Tensor) -> None:
        if self.deferred is not None:
            self.deferred.append((latents, codes))
        else:
            counts, sums = assignment_sums(latents, codes, self.num_codes)
            self.update(counts, sums, lambda rows: latents[rows])

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, latents_at: Callable[[Tensor], Tensor]) -> None:
        """Take one step: moving statistics, the codebook if it is one of them, codes out of use.

        n_k <- decay n_k + (1 - decay) counts_k,  m_k <- decay m_k + (1 - decay) sums_k,  e_k = m_k / n_k
        (appendix A.1), with n_k smoothed as (n_k + eps) / (n + K eps) * n. A code whose n_k falls below the
        threshold is put onto a random latent of the step, counted as if it held the threshold. That draw depends
        on the number of updates alone, so that a resumed run and every process of a run repeat it.

        Args:
            counts (`torch.Tensor` of shape `(K,)`): the step's latents per code.
            sums (`torch.Tensor` of shape `(K, D)`): their sums.
            latents_at: the step's latents `(R, D)` at rows `(R,)`, in [0, sum of counts).
        """
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.code_sums.lerp_(sums, 1 - self.decay)
        if self.learns_by == "ema":
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.epsilon) / (total + self.num_codes * self.epsilon) * total
            self.codebook.copy_(self.code_sums / smoothed[:, None])
        dead = self.cluster_size < self.dead_code_threshold
        if dead.any():
            generator = torch.Generator().manual_seed(int(self.num_updates))
            rows = torch.randint(int(counts.sum()), (self.num_codes,), generator=generator)
            self._move(dead, latents_at(rows.to(counts.device)))
        self.num_updates += 1

    def _move(self, dead: Tensor, replacements: Tensor) -> None:
        """Put the codes of the mask `dead` onto their row of `replacements` `(K, D)`."""
        self.codebook.copy_(torch.where(dead[:, None], replacements, self.codebook))
        self.cluster_size.masked_fill_(dead, self.dead_code_threshold)
        self.code_sums.copy_(
            torch.where(dead[:, None], replacements * self.dead_code_threshold, self.code_sums)
        )

    @torch.no_grad()
    def start_from(self, codebook: Tensor, counts: Tensor) -> None:
        """Set the codebook and restart the moving statistics at it.

        Args:
            codebook (`torch.Tensor` of shape `(K, D)`): new vectors, for example k-means centroids.
            counts (`torch.Tensor` of shape `(K,)`): expected latents per code in one training step.
        """
        self.codebook.copy_(codebook)
        self.cluster_size.copy_(counts)
        self.code_sums.copy_(codebook * counts[:, None])
