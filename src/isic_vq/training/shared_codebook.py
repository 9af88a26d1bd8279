"""One codebook for all processes: statistics of a step added up over them, random latents drawn from all of them.

Rows of all processes are numbered in sample order: micro-batch by micro-batch, and within one process by process,
which is the order in which `EpochBatches` cuts a batch. A run in two processes therefore draws the latents that a
run in one draws.
"""

import torch
from torch import Tensor

from isic_vq.models.vector_quantizer import VQVAEVectorQuantizer, assignment_sums
from isic_vq.training.processes import Processes


class SharedRows:
    """Numbers the rows of tensors `(N_i, D)`, one per micro-batch and spread over processes, in sample order."""

    def __init__(self, parts: list[Tensor], processes: Processes):
        self.parts, self.processes = parts, processes
        sizes = torch.zeros(len(parts), processes.world, dtype=torch.float64)
        sizes[:, processes.rank] = torch.tensor([len(part) for part in parts], dtype=torch.float64)
        sizes = processes.sum(sizes).cpu().long()
        ends = sizes.flatten().cumsum(0)
        self.total = int(ends[-1])
        self.starts = (ends - sizes.flatten()).view_as(sizes)[:, processes.rank].tolist()

    def at(self, rows: Tensor) -> Tensor:
        """The rows `(R, D)` at numbers `(R,)`, int64 in [0, total); the same in every process."""
        values = self.parts[0].new_zeros(len(rows), self.parts[0].shape[1])  # 0 where another process has it
        for start, part in zip(self.starts, self.parts, strict=True):
            local = rows.to(part.device) - start
            here = (local >= 0) & (local < len(part))
            values[here] = part[local[here]]
        return self.processes.sum(values)


class SharedCodebook:
    """Updates a quantizer's codebook once per optimizer step, from the latents of all processes.

    The quantizer records its training passes from now on, and does not learn from them by itself.
    """

    def __init__(self, quantizer: VQVAEVectorQuantizer, processes: Processes):
        self.quantizer, self.processes = quantizer, processes
        quantizer.defer()

    @torch.no_grad()
    def update(self) -> Tensor | None:
        """Update the codebook; returns the perplexity of the step's codes, None if nothing was quantized."""
        passes = self.quantizer.take_deferred()
        if not passes:
            return None
        parts = [assignment_sums(latents, codes, self.quantizer.num_codes) for latents, codes in passes]
        counts, sums = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        totals = self.processes.sum(torch.cat([counts[:, None], sums], dim=1))
        counts, sums = totals[:, 0], totals[:, 1:]
        latents = [latents for latents, _ in passes]
        self.quantizer.update(counts, sums, lambda rows: SharedRows(latents, self.processes).at(rows))
        shares = counts / counts.sum()
        return torch.special.entr(shares).sum().exp()
