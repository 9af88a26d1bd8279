"""The interface of all priors over codes.

A prior takes codes and, as a tensor, the tokenizer's features of coarser scales (its `context`); it holds no tokenizer.
`forward` gives the logits of all codes at once, `walk` those of one group of codes after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .clusters import code_frequencies
from .configuration_prior import PriorConfig
from .modes import warn_if_slow, weights_at_hand
from .sampling import Sampling, draw
from .strict_loading import StrictLoading

# Features so far (None at first), the codes `(B, n)` of a scale and its number, to the features with it and what the
# next scale is given: `VQVAEModel.extend`.
Extend = Callable[[Tensor | None, Tensor, int], tuple[Tensor, Tensor | None]]


@dataclass
class PriorOutput(ModelOutput):
    """Output of a prior.

    Args:
        loss: scalar, cross-entropy in nats per code, mean over all codes.
        logits: `(B, K, *code shape)`, raw scores; those of a code depend on earlier codes only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class Walk(Protocol):
    """Evaluates a prior step by step on the codes of some images, in the prior's order.

    Attributes:
        steps: for each step (a row, a scale) the groups of it, in order. A group is a slice of the flattened codes that
            are independent of each other given those before.
    """

    steps: Sequence[Sequence[slice]]

    def logits(self, group: slice) -> Tensor:
        """Compute logits `(B, n, K)` of the next group's codes."""

    def put(self, group: slice, codes: Tensor) -> None:
        """Feed the codes `(B, n)` of that group."""

    def reorder(self, ancestors: Tensor) -> None:
        """Between steps, continue image i from what image `ancestors[i]` was; `ancestors` is `(B,)`."""


class PriorModel(StrictLoading, PreTrainedModel):
    """Base class of priors: loading, conditions, loss and sampling.

    Attributes:
        cluster_scores: `(K, C)`, see `clusters.cluster_scores`; only a prior with clusters has it.
        cluster_weights: `(num_classes + 1, C)` int64 of at least 1, frequencies of the clusters given each class, in
            proportion; likewise.
    """

    config: PriorConfig
    base_model_prefix = "prior"
    main_input_name = "codes"
    input_modalities = ("image",)
    _no_split_modules: list[str] = []
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^vqvae\."]

    def __init__(self, config: PriorConfig):
        super().__init__(config)
        if number := config.num_clusters:
            self.register_buffer("cluster_scores", torch.zeros(config.num_codes, number))
            weights = torch.ones(config.unconditional_id + 1, number, dtype=torch.long)
            self.register_buffer("cluster_weights", weights)

    def checked_codes(self, codes: Tensor) -> Tensor:
        """Return codes of the model's shape, else raise ValueError."""
        if codes.shape[1:] != self.config.code_shape:
            expected = ", ".join(map(str, ("batch", *self.config.code_shape)))
            raise ValueError(f"codes have shape {tuple(codes.shape)}: expected ({expected})")
        return codes

    def checked_labels(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Return class ids `(B,)` on the model's device; None becomes the unconditional id.

        Raises:
            ValueError: wrong shape or type, or an id outside [0, number of classes].
        """
        last = self.config.unconditional_id
        if labels is None:
            return torch.full((batch_size,), last, dtype=torch.long, device=self.device)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels are {labels.dtype}: expected class ids, whole numbers")
        if labels.shape != (batch_size,):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: expected ({batch_size},), one per image"
            )
        if not torch.compiler.is_compiling() and labels.numel() and (labels.min() < 0 or labels.max() > last):
            raise ValueError(
                f"labels lie in [{labels.min().item()}, {labels.max().item()}]: expected class ids below {last}, "
                f"or {last} for unconditional"
            )
        return labels.to(self.device)

    def conditions(self, labels: Tensor, clusters: Tensor | None) -> Tensor:
        """Combine class ids and clusters, `(B,)` each, as class * C + cluster; the class alone where C is 0.

        Raises:
            ValueError: clusters that are not the prior's, or none where it has some.
        """
        number = self.config.num_clusters
        if not number:
            if clusters is not None:
                raise ValueError("clusters are given: this prior has none, its num_clusters is 0")
            return labels
        if clusters is None or clusters.is_floating_point() or clusters.shape != labels.shape:
            given = None if clusters is None else f"{clusters.dtype} of shape {tuple(clusters.shape)}"
            raise ValueError(
                f"clusters are {given}: expected whole numbers of shape {tuple(labels.shape)}, one per image"
            )
        if not torch.compiler.is_compiling() and ((clusters < 0) | (clusters >= number)).any():
            raise ValueError(
                f"clusters lie in [{clusters.min().item()}, {clusters.max().item()}]: expected 0 to {number - 1}"
            )
        return labels * number + clusters.to(labels.device)

    def conditions_of(self, codes: Tensor, labels: Tensor | None, clusters: Tensor | None = None) -> Tensor:
        """Return the conditions of codes; clusters that are not given are the codes' own.

        In train mode each label becomes the unconditional id with probability `class_dropout`.
        """
        labels = self.checked_labels(labels, codes.shape[0])
        if self.training and self.config.class_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.config.class_dropout
            labels = labels.masked_fill(dropped, self.config.unconditional_id)
        return self.conditions(labels, self.clusters_of(codes) if clusters is None else clusters)

    def without_class(self, conditions: Tensor) -> Tensor:
        """Replace the classes of conditions by the unconditional id, which guidance compares with; clusters stay."""
        number = self.config.num_clusters
        labels = torch.full_like(conditions, self.config.unconditional_id)
        return labels * number + conditions % number if number else labels

    def clusters_of(self, codes: Tensor) -> Tensor | None:
        """Find the cluster `(B,)` of each image's codes; None where the prior has no clusters."""
        if not self.config.num_clusters:
            return None
        frequencies = code_frequencies(codes, self.config.sizes, self.config.num_codes)
        with weights_at_hand(self):
            scores = self.cluster_scores.to(codes.device).double()
        return (frequencies @ scores).argmax(1)

    def cluster_log_probabilities(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """Return log p(cluster | class), `(B, C)` float64, of a prior with clusters."""
        with weights_at_hand(self):
            weights = self.cluster_weights[self.checked_labels(labels, batch_size)].double()
        return (weights / weights.sum(1, keepdim=True)).log()

    def draw_clusters(self, labels: Tensor | None, uniforms: Tensor) -> Tensor:
        """Draw clusters `(B,)` by their frequencies given the class, from uniforms `(B,)` in [0, 1), float64."""
        return draw(self.cluster_log_probabilities(labels, len(uniforms)), uniforms)

    @can_return_tuple
    def forward(
        self,
        codes: Tensor,
        class_ids: Tensor | None = None,
        context: Tensor | None = None,
        targets: Tensor | None = None,
        clusters: Tensor | None = None,
        return_loss: bool = True,
    ) -> PriorOutput:
        """Predict every code from earlier ones and measure how well; returns a tuple with `return_dict=False`.

        In train mode labels are dropped (replaced by the unconditional id) with probability `class_dropout`.

        Args:
            codes (`torch.LongTensor` of shape `(B, *code shape)`): in [0, K).
            class_ids (`torch.LongTensor` of shape `(B,)`): class ids; None means unconditional.
            context (`torch.Tensor` of shape `(B, L - first scale's codes, D)`): features of coarser scales,
                `VQVAEModel.context(codes)`; a prior over a single grid ignores it.
            targets (`torch.LongTensor` of the shape of `codes`): what predictions are compared with; None means `codes`.
            clusters (`torch.LongTensor` of shape `(B,)`): of a prior with clusters; None means those of the targets.
            return_loss: False leaves the loss out.

        Raises:
            ValueError: codes or context of another shape, or labels that are not the model's.
        """
        self.checked_codes(codes)
        targets = codes if targets is None else targets
        logits = self.predict(codes, self.conditions_of(targets, class_ids, clusters), context)
        loss = None
        if return_loss:
            rows = logits.flatten(2).transpose(1, 2).flatten(0, 1)  # a view where logits lie channels last
            loss = F.cross_entropy(rows.float(), targets.flatten())
        return PriorOutput(loss=loss, logits=logits)

    def predict(self, codes: Tensor, conditions: Tensor, context: Tensor | None) -> Tensor:
        """Logits `(B, K, *code shape)` of every code from earlier ones, for conditions `(B,)`; see `forward`."""
        raise NotImplementedError

    def best_backend(self, num_blocks: int) -> str:
        """Name the backend that samples so many batches of 16 images in the least time; see `sample`."""
        return "eager"

    def sample(
        self,
        uniforms: Tensor,
        labels: Tensor | None = None,
        sampling: Sampling | None = None,
        *,
        backend: str = "eager",
        on_step: Callable[[], None] | None = None,
        extend: Extend | None = None,
        clusters: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw all codes, group by group in the prior's order; exact, with cached features.

        Args:
            uniforms (`torch.Tensor` of shape `(B, L)`): noise of each image and position, in [0, 1).
            labels (`torch.LongTensor` of shape `(B,)`): class ids; None means unconditional.
            sampling: how codes are drawn from logits; by default as `config.sampling` says.
            backend: "eager" or, of a PixelCNN, "compiled" (CPU, needs numba) or "cuda_graph"; `modes.RUN_ON` tells where each
                was run.
            on_step: called after each finished row or scale, for progress bars.
            extend: the tokenizer's, which tells each scale what coarser ones made: `VQVAEModel.extend`; a single grid
                needs none.
            clusters (`torch.LongTensor` of shape `(B,)`): one for each image, where the prior has clusters.
            settings: fields of `Sampling`, such as `temperature`, that differ from those of `sampling`.

        Returns:
            `torch.LongTensor` of shape `(B, *code shape)`, in [0, K).

        Raises:
            ValueError: a setting without a meaning, a backend that the model's device or precision rules out, no
                `extend`, or logits that are not finite.
            ImportError: a backend that is not installed.
        """
        if uniforms.shape[1:] != (self.config.num_positions,):
            raise ValueError(
                f"uniforms have shape {tuple(uniforms.shape)}: expected (batch, {self.config.num_positions})"
            )
        warn_if_slow(self.device.type, self.dtype)
        sampling = (sampling or self.config.default_sampling).changed(settings)
        with weights_at_hand(self), torch.inference_mode():
            conditions = self.conditions(self.checked_labels(labels, len(uniforms)), clusters)
            if sampling.guided:
                conditions = torch.cat([conditions, self.without_class(conditions)])
            codes = self.draw_codes(uniforms, conditions, sampling, backend, on_step, extend)
        return codes.clone()  # a normal tensor: autograd refuses those of inference mode

    def draw_codes(
        self,
        uniforms: Tensor,
        conditions: Tensor,
        sampling: Sampling,
        backend: str,
        on_step: Callable[[], None] | None,
        extend: Extend | None,
    ) -> Tensor:
        """Do what `sample` does, of conditions of one entry per image, or two when guided; see `Sampling.both`."""
        raise NotImplementedError

    def walk(self, conditions: Tensor, extend: Extend | None = None) -> Walk:
        """Begin images of the conditions `(B,)`, see `conditions`; call it and what it returns in inference and eval mode.

        `extend` is the tokenizer's, where there are scales.
        """
        raise NotImplementedError
