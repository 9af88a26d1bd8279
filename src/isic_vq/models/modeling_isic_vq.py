"""The composite model: a tokenizer and a prior in one folder, each weight stored once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .checks import expect, is_whole
from .configuration_isic_vq import IsicVQConfig
from .diagnosis import resolve_label
from .editing import BLENDS, IsicVQEditOutput, blended, central_region, code_masks, pixel_mask, redraw_codes
from .likelihood import BATCH_SIZE, IsicVQScoreOutput, score_codes, spread_over_grid
from .modeling_pixelcnn import PixelCNNModel
from .modeling_prior import PriorModel
from .modeling_var import VARModel
from .modeling_vqvae import VQVAEModel, VQVAEOutput
from .repository import SavedInParts
from .sampling import Sampling, image_generators, num_labelled, position_uniforms
from .strict_loading import StrictLoading

PRIOR_MODELS: dict[str, type[PriorModel]] = {
    model.config_class.model_type: model for model in (PixelCNNModel, VARModel)
}
BLOCK_SIZE = 16  # images computed at once
MAX_BATCH = 4096
MAX_IMAGES = 2**20  # of one call, which holds them all in memory

Labels = int | str | Sequence[int | str] | Tensor | None


@dataclass
class IsicVQOutput(VQVAEOutput):
    """Output of `IsicVQModel`: that of its tokenizer, and of its prior for the tokenizer's codes.

    Args:
        loss: scalar, the tokenizer's loss + prior_loss.
        prior_loss: scalar, cross-entropy in nats per code.
        logits: `(B, K, *code shape)`.
    """

    prior_loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class IsicVQGenerationOutput(ModelOutput):
    """Output of `IsicVQModel.generate`.

    Args:
        pixel_values: `(B, 3, H, W)`, RGB in [0, 1].
        codes: int64 in [0, K), `(B, h, w)` or, of several scales, `(B, L)`.
        labels: `(B,)` int64, the class ids; the unconditional id where none was asked for.
        clusters: `(B,)` int64, where the prior has clusters.
    """

    pixel_values: Tensor | None = None
    codes: Tensor | None = None
    labels: Tensor | None = None
    clusters: Tensor | None = None


class IsicVQModel(SavedInParts, StrictLoading, PreTrainedModel):
    """Images from codes from a prior, and back.

    Examples:
        >>> from isic_vq import IsicVQModel
        >>> model = IsicVQModel.from_pretrained("model_cards/isic-vq-128")  # doctest: +SKIP
        >>> model.generate(4, labels="melanoma", seed=0).pixel_values.shape  # doctest: +SKIP
        torch.Size([4, 3, 128, 128])
    """

    config: IsicVQConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True

    def __init__(self, config: IsicVQConfig):
        super().__init__(config)
        self.vqvae = VQVAEModel._from_config(config.vqvae_config)
        self.prior = PRIOR_MODELS[config.prior_config.model_type]._from_config(config.prior_config)
        self.post_init()
        # Each part ignores the other's keys when loaded alone; transformers hands those rules up to the whole,
        # which would then load any foreign key in silence.
        self._keys_to_ignore_on_load_unexpected = None

    @classmethod
    def can_generate(cls) -> bool:
        """Whether transformers' `GenerationMixin` applies: no, `generate` makes images."""
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "IsicVQModel":
        """Load as `StrictLoading.from_pretrained` does.

        Raises:
            ValueError: a `device_map` (or what "auto" makes of it) with weights on the disk, besides what it refuses.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if "disk" in getattr(model, "hf_device_map", {}).values():
            # transformers looks for each part's weights in the folder of the first.
            raise ValueError(
                f"device_map is {kwargs['device_map']!r} and leaves weights on the disk: load the model without it, then "
                "accelerate.disk_offload(model, folder)"
            )
        return loaded

    @classmethod
    def from_parts(cls, vqvae: VQVAEModel, prior: PriorModel, license: str | None = None) -> "IsicVQModel":
        """Join a trained tokenizer and a trained prior, without a copy; `license` is the Hub's id of the weights' licence.

        Raises:
            ValueError: the prior was made for other codes.
        """
        try:
            config = IsicVQConfig(vqvae_config=vqvae.config, prior_config=prior.config, license=license)
        except StrictDataclassClassValidationError as error:
            raise ValueError(f"the prior was made for other codes: {error.__cause__}") from error
        with torch.device("meta"):  # its weights are replaced at once
            model = cls(config)
        model.vqvae, model.prior = vqvae, prior
        for part in (vqvae, prior):
            part.config.name_or_path = ""  # transformers would publish the folder it was read from
        return model.eval()

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return codes of images `(B, 3, H, W)` in [0, 1]; see `VQVAEModel.encode`."""
        return self.vqvae.encode(pixel_values)

    @property
    def default_sampling(self) -> Sampling:
        """How images are drawn where the caller does not say."""
        return self.prior.config.default_sampling

    def decode(self, codes: Tensor) -> Tensor:
        """Return images `(B, 3, H, W)` in [0, 1] of codes; see `VQVAEModel.decode`."""
        return self.vqvae.decode(codes)

    def predict(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict logits `(B, K, *code shape)` of every code from earlier ones and class ids `(B,)`; None is unconditional.

        A prior with clusters is given those that the codes as a whole fall into.
        """
        context = self.vqvae.context(codes)
        return self.prior(codes, labels, context, return_loss=False, return_dict=True).logits

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, class_ids: Tensor | None = None, return_loss: bool = True
    ) -> IsicVQOutput:
        """Reconstruct images, predict their codes, and report every loss; returns a tuple with `return_dict=False`.

        The loss is the tokenizer's and the prior's. Codes carry no gradient: each part learns by its own loss alone, the
        prior of codes that move while the tokenizer trains. The stages of `isic-vq train` train one after the other.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [0, 1].
            class_ids (`torch.LongTensor` of shape `(B,)`): class ids; None means unconditional.
            return_loss: False leaves the losses and the prior's predictions out.
        """
        output = IsicVQOutput(**self.vqvae(pixel_values, return_loss=return_loss, return_dict=True))
        if return_loss:
            context = self.vqvae.context(output.codes)
            predicted = self.prior(output.codes, class_ids, context, return_dict=True)
            output.prior_loss, output.logits = predicted.loss, predicted.logits
            output.loss = output.loss + predicted.loss
        return output

    def label_ids(self, labels: Labels, num_images: int) -> Tensor:
        """Resolve a name, an id, one per image, or None for unconditional, to class ids `(num_images,)`.

        Raises:
            ValueError: an unknown label, or a sequence of another length.
        """
        if labels is None:
            return torch.full((num_images,), self.prior.config.unconditional_id)
        if isinstance(labels, Tensor):  # class ids already, the unconditional one among them
            labels = labels if labels.ndim else labels.expand(num_images)
            return self.prior.checked_labels(labels, num_images)
        labels = labels if np.ndim(labels) else [labels] * num_images  # type: ignore[assignment, list-item]
        if len(labels) != num_images:
            raise ValueError(
                f"there are {len(labels)} labels for {num_images} images: give one, or one per image"
            )
        return torch.tensor([resolve_label(label, self.config.class_names) for label in labels])

    def cluster_ids(self, cluster: int | Sequence[int] | Tensor | None, num_images: int) -> Tensor | None:
        """Clusters `(num_images,)` from one for all images or one per image; None stays None, for clusters to be drawn.

        Raises:
            ValueError: the prior has no clusters, or not this one; or a sequence of another length.
        """
        if cluster is None:
            return None
        clusters = torch.as_tensor(cluster)
        clusters = clusters.expand(num_images) if clusters.ndim == 0 else clusters
        self.prior.conditions(torch.zeros(num_images, dtype=torch.long), clusters)  # or it raises
        return clusters

    def generate(
        self,
        num_images: int | None = None,
        labels: Labels = None,
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> IsicVQGenerationOutput:
        """Sample code grids from the prior and decode them.

        Images are computed in blocks of a fixed size, image i as number i % batch_size of its block, the last block
        filled up: with the same batch size and backend, on the same hardware with as many threads, a seed's image i
        is the same to the last bit, whichever images are asked for with it. Another batch size or backend rounds
        differently, which now and then moves a draw.

        Args:
            num_images: how many, at least 1; by default one per label.
            labels: a diagnosis name, alias or id for all images, one per image, or None for unconditional.
            seed: makes image i a function of (seed, first_index + i); random without seed and generator.
            settings: all others of `generate_blocks`, and the fields of `Sampling`.

        Raises:
            ValueError: an argument outside its range, an unknown label, or both seed and generator.
            TypeError: an unknown setting.
        """
        blocks = list(self.generate_blocks(num_images, labels, seed=seed, **settings))
        parts = {name: [block[name] for block in blocks] for name in blocks[0]}
        return IsicVQGenerationOutput(**{name: torch.cat(tensors) for name, tensors in parts.items()})

    @torch.no_grad()
    def generate_blocks(
        self,
        num_images: int | None = None,
        labels: Labels = None,
        *,
        seed: int | None = None,
        first_index: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        sampling: Sampling | None = None,
        cluster: int | Sequence[int] | Tensor | None = None,
        batch_size: int = BLOCK_SIZE,
        backend: str = "auto",
        on_step: Callable[[], None] | None = None,
        **settings: Any,
    ) -> Iterator[IsicVQGenerationOutput]:
        """Yield what `generate` returns block by block, so that only one of many is in memory.

        Args:
            num_images: as for `generate`.
            labels: likewise.
            seed: likewise.
            first_index: index of the first image, for generating one seeded set in several calls.
            generator: one for all images, or one per image, instead of a seed.
            sampling: how codes are drawn; by default as the prior's `config.sampling` says.
            cluster: of a prior with clusters, one for all images or one per image; by default each is drawn by its
                frequency given the class, from the image's noise.
            batch_size: images computed at once.
            backend: "eager", "compiled" (CPU, needs numba), "cuda_graph", or "auto" for the one that takes the least
                time for so many images, of those that this project has run on such a device (`modes.RUN_ON`).
            on_step: called after each finished step of a block, a row of its code grids or a scale; `num_steps` times.
            settings: fields of `Sampling`, such as `temperature`, that differ from those of `sampling`.

        Raises:
            ValueError, TypeError: as `generate`.
        """
        num_images = num_labelled(labels) if num_images is None else num_images
        expect(is_whole(num_images, 1), "num_images", num_images, "a whole number of at least 1")
        at_most = f"at most {MAX_IMAGES} in one call; first_index goes on from there"
        expect(num_images <= MAX_IMAGES, "num_images", num_images, at_most)
        is_size = is_whole(batch_size, 1) and batch_size <= MAX_BATCH
        expect(is_size, "batch_size", batch_size, f"1 to {MAX_BATCH}")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator are both given: give one of them")
        sampling = (sampling or self.default_sampling).changed(settings)
        if seed is None and generator is None:
            seed = torch.Generator().seed() % 2**63  # torch.seed() would reseed torch itself
            batch_size = min(batch_size, num_images)  # nobody can ask for these images again
        ids = self.label_ids(labels, num_images)
        clusters = self.cluster_ids(cluster, num_images)
        if generator is None:
            generator = image_generators(seed, num_images, first_index)  # type: ignore[arg-type]
        config = self.config.prior_config
        uniforms = position_uniforms(generator, config.num_positions + (config.num_clusters > 0), num_images)
        if config.num_clusters:  # the last number of each image draws its cluster
            uniforms, of_clusters = uniforms[:, :-1], uniforms[:, -1]
            clusters = self.prior.draw_clusters(ids, of_clusters) if clusters is None else clusters
        if backend == "auto":
            backend = self.prior.best_backend(-(-(first_index % batch_size + num_images) // batch_size))
        start = -(first_index % batch_size)
        for first in range(start, num_images, batch_size):
            # Padding before the first image and after the last makes the blocks whole.
            kept = slice(max(first, 0), min(first + batch_size, num_images))
            places = (kept.start - first, first + batch_size - kept.stop)
            codes = self.prior.sample(
                F.pad(uniforms[kept], (0, 0, *places)),
                F.pad(ids[kept], places, value=self.prior.config.unconditional_id),
                sampling,
                backend=backend,
                on_step=on_step,
                extend=self.vqvae.extend,
                clusters=None if clusters is None else F.pad(clusters[kept], places),
            )
            images = slice(places[0], batch_size - places[1])
            yield IsicVQGenerationOutput(
                pixel_values=self.decode(codes)[images],
                codes=codes[images],
                labels=ids[kept],
                clusters=None if clusters is None else clusters[kept],
            )

    def num_steps(self, num_images: int, batch_size: int = BLOCK_SIZE) -> int:
        """Count the calls of `on_step` that `generate` makes for so many images from the first of a seed."""
        return self.config.prior_config.num_steps * -(-num_images // batch_size)

    @torch.no_grad()
    def inpaint(
        self,
        pixel_values: Tensor,
        mask: Tensor,
        labels: Labels = None,
        *,
        num_particles: int = 64,
        seed: int | None = None,
        first_index: int = 0,
        dilation: int = 0,
        blend: str = "poisson",
        on_step: Callable[[], Any] | None = None,
    ) -> IsicVQEditOutput:
        """Resample the codes under a mask, given all the others: a draw from p(masked codes | kept codes, label).

        A particle filter in the prior's own order, at temperature 1; see `editing`. Where no kept code follows
        a masked one (the lower part of an image for a PixelCNN, or all of it) a single particle is exact and is what is used.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [0, 1], of the model's size.
            mask (`torch.BoolTensor` of shape `(B, 1, H, W)`, `(B, H, W)` or `(H, W)`): True where to resample. A
                code is resampled if its patch of pixels touches the mask; of coarser scales, if the patches of more
                than half its area do.
            labels: a diagnosis name, alias or id for all images, one per image, or None for unconditional.
            num_particles: candidates per image; more follow the kept codes more closely and take longer.
            seed: makes image i a function of (seed, first_index + i) and its inputs; without it the draw is random.
            first_index: index of the first image, for drawing variants of one image in several calls.
            dilation: how many codes the mask grows by on all sides.
            blend: how the drawn patches join the pixels of `pixel_values` around them, which stay as they are. "poisson"
                shifts their colours by what decoding gets wrong at their border, continued smoothly inward, so that no
                edge shows; "paste" leaves them as decoded; "decode" decodes the whole grid, kept codes too.
            on_step: called after each finished step, image by image: a row of the code grid, or a scale.

        Raises:
            ValueError: images of another size, a mask of another shape or type or without a marked pixel, an
                unknown label, or a number outside its range.
        """
        size, sides = self.config.vqvae_config.image_size, self.config.vqvae_config.sides
        shape = tuple(pixel_values.shape)
        if shape[1:] != (3, size, size) or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} of shape {shape}: expected floats of shape (batch, 3, {size}, "
                f"{size}), as the image processor makes them"
            )
        if blend not in BLENDS:
            raise ValueError(f"blend is {blend!r}: expected one of {', '.join(BLENDS)}")
        masks = code_masks(mask, shape[0], size, sides, dilation)
        masked = torch.cat([part.flatten(1) for part in masks], dim=1).to(pixel_values.device)
        ids = self.label_ids(labels, shape[0])
        if seed is None:
            seed = torch.Generator().seed() % 2**63  # torch.seed() would reseed torch itself
        generators = image_generators(seed, shape[0], first_index)
        # One by one here, too: the last bits of a convolution may depend on the size of the batch.
        codes = torch.cat([self.encode(image) for image in pixel_values.split(1)])
        edit = redraw_codes(self, codes, masked.view_as(codes), ids, num_particles, generators, on_step)
        decoded = torch.cat([self.decode(image) for image in edit.codes.split(1)])
        drawn = pixel_mask(masks[-1].to(pixel_values.device), size)
        edit.pixel_values = blended(decoded, pixel_values, drawn, blend)
        return edit

    def counterfactual(
        self, pixel_values: Tensor, labels: Labels, region: Tensor | None = None, **settings: Any
    ) -> IsicVQEditOutput:
        """Inpaint a region of an image as another diagnosis would have it, and keep the rest.

        By default the region is a part of the image: if all codes were resampled the result would be a new image.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [0, 1], of the model's size.
            labels: the other diagnosis: a name, alias or id for all images, or one per image.
            region: a mask as `inpaint` takes it; by default the middle half of the image in height and width,
                where dermoscopy frames the lesion.
            settings: the keyword arguments of `inpaint`.

        Raises:
            ValueError: no diagnosis, or what `inpaint` refuses.
        """
        if labels is None:
            raise ValueError("labels is None: expected the diagnosis to inpaint the region as")
        if region is None:
            region = central_region(self.config.vqvae_config.image_size)
        return self.inpaint(pixel_values, region, labels, **settings)

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor,
        labels: Labels = None,
        marginalize: bool = False,
        class_weights: Tensor | None = None,
    ) -> IsicVQScoreOutput:
        """Measure how many bits the prior needs for the codes of images, and where; fewer bits are likelier codes.

        It measures codes, not pixels: what the tokenizer leaves out costs nothing, and smooth images cost little. Under a
        prior with clusters it is an upper bound, the bits of the image's cluster among them.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [0, 1].
            labels: a diagnosis name, alias or id for all images, one per image, or None for unconditional.
            marginalize: measure log2 sum_y pi_y p(codes | y) over all classes y instead.
            class_weights (`torch.Tensor` of shape `(num_classes,)`): pi in proportion, each at least 0; None
                weighs all classes alike.

        Raises:
            ValueError: an unknown label, labels and marginalize together, or what `score_codes` refuses.
        """
        codes = torch.cat([self.encode(part.to(self.device)) for part in pixel_values.split(BATCH_SIZE)])
        ids = None if labels is None else self.label_ids(labels, len(codes))
        bits = score_codes(self, codes, ids, marginalize, class_weights)
        return IsicVQScoreOutput(
            bits_per_code=bits.flatten(1).mean(1),
            bits=bits,
            bits_map=spread_over_grid(bits, self.config.vqvae_config.sides),
            codes=codes,
        )
