"""VAR: an autoregressive prior over scales; all codes of a scale at once, given all coarser scales.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", arXiv
2404.02905, section 3 and the authors' code: adaptive layer norms driven by the class, attention over queries and keys of
unit length with a learned temperature (as in ViT-22B, arXiv 2302.05442, and Swin v2, arXiv 2111.09883), a linear map of
the tokenizer's features as input.
Differs: one linear map gives all layers' modulation, to which each layer adds its own offset (the authors' option
for their largest models), because here it would hold a third of all weights; gates start at one and labels without
effect; the position table has a row for each place of each scale, and so needs no embedding of the scale.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .clusters import ConditionEmbedding
from .configuration_var import VARConfig
from .modeling_prior import Extend, PriorModel
from .modes import evaluating
from .sampling import Sampling

MAX_LOG_SCALE = math.log(100)  # of attention scores, which are cosines


def eager_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Attention by its formula: features `(B, n, heads, C)` and weights `(B, heads, n, m)`; scores are not scaled."""
    scores = queries @ keys.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return (weights @ values).transpose(1, 2), weights


class VARAttention(nn.Module):
    """Attention among the codes of a scale and all coarser ones."""

    def __init__(self, config: VARConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.num_heads = config.num_heads
        self.log_scale = nn.Parameter(torch.empty(config.num_heads, 1, 1))
        self.queries_keys_values = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, cache: DynamicCache | None) -> Tensor:
        """Features `(B, n, C)` to the same shape; a mask `(1, 1, n, n)` is True where a row may look."""
        heads = self.queries_keys_values(hidden).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        scale = self.log_scale.clamp(max=MAX_LOG_SCALE).exp().to(queries.dtype)
        queries, keys = F.normalize(queries, dim=-1) * scale, F.normalize(keys, dim=-1)
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        seen, _ = attend(
            self, queries, keys.to(queries.dtype), values, mask, dropout=0.0, scaling=1.0, is_causal=False
        )
        return self.output(seen.flatten(2))


class VARLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward part, each on modulated features and added with a gate."""

    def __init__(self, config: VARConfig, index: int):
        super().__init__()
        size, inner = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.attention = VARAttention(config, index)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, size)
        )
        # Scale, shift, gate; of attention, then feed-forward.
        self.modulation = nn.Parameter(torch.empty(6, size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Features `(B, n, C)` to the same shape; `condition` is `(B, 6, C)`."""
        parts = (condition + self.modulation).unsqueeze(2).unbind(1)
        seen = self.attention(modulated(hidden, *parts[:2]), mask, cache)
        hidden = hidden + self.dropout(seen) * parts[2]
        return hidden + self.dropout(self.feed_forward(modulated(hidden, *parts[3:5]))) * parts[5]


class VARHead(nn.Module):
    """From features to logits, through a layer norm that the class modulates."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.logits = nn.Linear(config.hidden_size, config.num_codes)

    def forward(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """Logits `(B, n, K)` of features `(B, n, C)` and class embeddings `(B, C)`."""
        return self.logits(modulated(hidden, *self.modulation(F.silu(classes))[:, None].chunk(2, dim=2)))


def modulated(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift, over channels."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift


class VARModel(PriorModel):
    """p(codes | label) = product over scales of p(codes of the scale | coarser scales, label).

    Examples:
        >>> import torch
        >>> from isic_vq import VARConfig, VARModel
        >>> config = VARConfig(num_codes=16, scales=(1, 2, 4), code_dim=8, hidden_size=16, num_layers=1, num_heads=2)
        >>> model = VARModel(config).eval()
        >>> model(torch.zeros(2, 21, dtype=torch.long), context=torch.zeros(2, 20, 8)).logits.shape
        torch.Size([2, 16, 21])
    """

    config: VARConfig
    supports_gradient_checkpointing = True
    # Not flash attention, which takes no mask, nor flex attention, which does not train on a CPU and was not run on a GPU.
    _no_split_modules = ["VARLayer"]

    def __init__(self, config: VARConfig):
        super().__init__(config)
        size = config.hidden_size
        self.class_embedding = ConditionEmbedding(config, size)
        self.position_embedding = nn.Parameter(torch.empty(config.num_positions, size))
        self.features = nn.Linear(config.code_dim, size)
        self.modulation = nn.Linear(size, 6 * size)
        self.layers = nn.ModuleList(VARLayer(config, index) for index in range(config.num_layers))
        self.head = VARHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module in (self.modulation, self.head.modulation, self.head.logits):
            init.zeros_(module.weight)  # labels without effect, all codes alike
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, VARAttention):
            init.constant_(module.log_scale, math.log(4))
        elif isinstance(module, VARLayer):
            start = torch.zeros_like(module.modulation)
            # Each part adds little at first, so that depth costs no stability.
            start[[2, 5]] = (2 * self.config.num_layers) ** -0.5
            init.copy_(module.modulation, start)
        elif isinstance(module, VARModel):
            init.trunc_normal_(module.position_embedding, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def predict(self, codes: Tensor, conditions: Tensor, context: Tensor | None) -> Tensor:
        """See `PriorModel.predict`; codes are seen through their `context` alone."""
        first, size = self.config.sizes[0], self.config.num_positions
        expected = (codes.shape[0], size - first, self.config.code_dim)
        if context is None or context.shape != expected:
            shape = None if context is None else tuple(context.shape)
            raise ValueError(
                f"context has shape {shape}: expected {expected}, what the tokenizer's context(codes) returns"
            )
        classes = self.class_embedding(conditions)
        start = classes[:, None].expand(-1, first, -1)  # the first scale is given its class alone
        given = torch.cat([start, self.features(context.to(self.dtype))], dim=1)
        logits = self.layers_and_head(given + self.position_embedding, classes, self.mask()[None, None])
        return logits.transpose(1, 2)

    def layers_and_head(
        self, hidden: Tensor, classes: Tensor, mask: Tensor | None, cache: DynamicCache | None = None
    ) -> Tensor:
        """Logits `(B, n, K)` of input features `(B, n, C)`."""
        condition = self.modulation(F.silu(classes)).unflatten(1, (6, -1))
        for layer in self.layers:
            hidden = layer(hidden, condition, mask, cache)
        return self.head(hidden, classes)

    def mask(self) -> Tensor:
        """Which codes (rows) may look at which (columns), `(L, L)` bool: those of their own scale and of coarser ones."""
        scales = [index for index, size in enumerate(self.config.sizes) for _ in range(size)]
        scale_of = torch.tensor(scales, device=self.device)
        return scale_of[:, None] >= scale_of

    def draw_codes(
        self,
        uniforms: Tensor,
        conditions: Tensor,
        sampling: Sampling,
        backend: str,
        on_step: Callable[[], None] | None,
        extend: Extend | None,
    ) -> Tensor:
        """Scale by scale; see `PriorModel.draw_codes`.

        Guidance grows from none at the coarsest scale to `guidance_scale` at the finest, in equal steps, as in the
        authors' code.
        """
        if backend != "eager":
            raise ValueError(f"backend is {backend!r}: expected 'eager', the only one of a VARModel")
        parts, total = [], torch.zeros((), dtype=torch.float64, device=self.device)
        with evaluating(self):
            walk = self.walk(conditions, extend)
            for index, (group,) in enumerate(walk.steps):
                progress = index / max(len(walk.steps) - 1, 1)
                share = sampling.guidance_share(progress, usual=progress)
                parts.append(sampling.draw(walk.logits(group), uniforms[:, group], share, total))
                walk.put(group, sampling.both(parts[-1]))
                if on_step is not None:
                    on_step()
        sampling.check(math.isfinite(total.item()))
        return torch.cat(parts, dim=1)

    def walk(self, conditions: Tensor, extend: Extend | None = None) -> "VARScaleWalk":
        """Begin images of the conditions `(B,)`; see `PriorModel.walk`.

        Raises:
            ValueError: no `extend`.
        """
        if extend is None:
            raise ValueError("extend is None: expected the tokenizer's, such as model.vqvae.extend")
        return VARScaleWalk(self, conditions, extend)


class VARScaleWalk:
    """A `Walk` over the scales, each a group of its own, with a model in eval mode."""

    def __init__(self, model: VARModel, conditions: Tensor, extend: Extend):
        self.model, self.extend = model, extend
        self.classes = model.class_embedding(conditions)
        self.cache = DynamicCache()
        self.features: Tensor | None = None
        self.context: Tensor | None = None  # what the next scale is given, but for the first
        ends = torch.tensor(model.config.sizes).cumsum(0).tolist()
        self.steps: Sequence[Sequence[slice]] = [
            [slice(start, end)] for start, end in zip([0, *ends], ends, strict=False)
        ]
        self.index = 0

    def logits(self, group: slice) -> Tensor:
        model = self.model
        given = (
            self.classes[:, None] if self.context is None else model.features(self.context.to(model.dtype))
        )
        hidden = given + model.position_embedding[group]
        return model.layers_and_head(hidden, self.classes, None, self.cache)

    def put(self, group: slice, codes: Tensor) -> None:
        self.features, self.context = self.extend(self.features, codes, self.index)
        self.index += 1

    def reorder(self, ancestors: Tensor) -> None:
        self.cache.reorder_cache(ancestors)
        self.features = self.features[ancestors]
        self.context = None if self.context is None else self.context[ancestors]
