"""Audit a checkpoint for memorised training images: its samples, or images of any other origin, and its likelihoods.

Samples are compared with training images in channels: by codes, and by features of each model that is given. In every
channel each sample gets its nearest training image, and `memorization` tests these distances. Features are of decoded codes,
for samples, training images and held-out images alike: a generated image shows no more detail than the tokenizer keeps, and
beside photographs it would differ by that alone.

The prior itself is measured by how well its likelihood tells training images from held-out ones, as the area under the ROC
curve of a membership attack by loss (Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to
Overfitting", arXiv 1709.01604). A high area says that a model has overfitted, not that its samples are copies.

Held-out images must be of the same origin as the training images, and show none of their lesions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from isic_vq.data.augmentation import NUM_VIEWS, dihedral
from isic_vq.data.classes import AUTO, Classes
from isic_vq.data.code_cache import CodeCache, check_tokenizer, read_code_cache
from isic_vq.data.encoding import encode_source
from isic_vq.data.order import seeded_subset
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.evaluation.bits_per_code import bits_per_code
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval, share_interval
from isic_vq.evaluation.measured_images import class_ids
from isic_vq.evaluation.measures import auroc
from isic_vq.evaluation.memorization import (
    LEVEL,
    Excess,
    empirical_p_values,
    excess_of_near_samples,
    found_pairs,
    held_out_neighbours,
    tail_p_values,
)
from isic_vq.evaluation.neighbours import CodeIndex, Nearest, nearest_by_features
from isic_vq.evaluation.report import Metric, Report, model_report
from isic_vq.hub.pretrained import load_model, resolve
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

BATCH_SIZE = 32
CODES = "codes"  # the channel that is always there
NUM_PAIRS = 16  # of the closest pairs of a channel, those listed even if none is found


@dataclass(frozen=True)
class Samples:
    """What is audited."""

    codes: Tensor  # `(S, h, w)` int64 in [0, K)
    names: list[str]  # such as "image 3" of a seed, or an image's id
    source: str  # safe to publish
    seed: int | None  # of generated ones


@dataclass(frozen=True)
class Channel:
    """The nearest training image of each sample and of each held-out image, by codes or a feature model's features."""

    name: str
    samples: Nearest
    held_out: Nearest
    neighbours: NDArray[np.int64]  # `(S,)` rows of training, then held-out images in first views


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest training image, by number and by row of its cache."""

    sample: int
    row: int
    view: int  # the dihedral view of the training image that the sample is near to
    distance: float
    p_value: float  # see `empirical_p_values`
    tail_p_value: float  # see `tail_p_values`
    found: bool  # by Benjamini-Hochberg


@dataclass(frozen=True)
class Audit:
    """A report on a model, and what its pairs can be drawn from."""

    model: IsicVQModel
    train: CodeCache
    samples: Samples
    excess: dict[str, Excess]  # the test of near samples, by channel
    pairs: dict[str, list[Pair]]  # all of them, the closest first, by channel
    report: Report

    @property
    def verdict(self) -> bool:
        """Whether, in any channel, more samples are near to training images than chance explains."""
        return any(excess.verdict for excess in self.excess.values())

    def shown_pairs(self, channel: str) -> list[Pair]:
        """The pairs of a channel that were found, and the closest others up to `NUM_PAIRS`; the closest first."""
        return [pair for rank, pair in enumerate(self.pairs[channel]) if pair.found or rank < NUM_PAIRS]


def audit_checkpoint(
    model: str | None,
    train_codes: Path,
    held_out_codes: Path,
    features: Sequence[str] = (),
    *,
    num_samples: int = 500,
    samples_from: str | None = None,
    seed: int = 0,
    limit: int = 1000,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
    device: str | None = None,
) -> Audit:
    """Compare samples with training images, by codes and by features, and likelihoods of training and held-out images.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        train_codes: code cache of the training images, best in all eight views.
        held_out_codes: code cache of images of the same origin that the model was not trained on; their first view.
        features: folders or Hub ids of image models to compare by, too, see `FeatureModel`.
        num_samples: how many images to generate, with the diagnoses of the training images.
        samples_from: images to audit instead.
        seed: of samples, subsets and resampling.
        limit: at most this many training images, and held-out ones, whose likelihood is compared.
        max_corrupt_share: of `samples_from`, share of unreadable images past which to fail.
        progress: show bars.
        device: as `load_model` takes it.

    Raises:
        ModelError, DataError: as their docstrings say; held-out images that are training images.
        ValueError: numbers out of their range, or two feature models of one name.
    """
    if num_samples < 1 or limit < 2:
        raise ValueError(
            f"{num_samples} samples and a limit of {limit}: expected at least 1 and 2, respectively"
        )
    names = [Path(name).resolve().name if Path(name).is_dir() else name for name in features]
    if len({CODES, *names}) <= len(names):
        raise ValueError(f"the feature models are called {names}: expected each name once, and none {CODES}")
    loaded = load_model(IsicVQModel, model, device).eval()
    train, held_out = read_code_cache(train_codes), read_code_cache(held_out_codes)
    for cache, path in ((train, train_codes), (held_out, held_out_codes)):
        check_tokenizer(cache, loaded.vqvae, path.name)
    shared = set(train.isic_ids) & set(held_out.isic_ids)
    if shared:
        raise DataError(
            f"{len(shared)} images of {held_out_codes.name} are in {train_codes.name}, such as {min(shared)}: held-out "
            "images must be new to the model"
        )
    if samples_from is None:
        samples = generate_samples(loaded, train, num_samples, seed, progress)
    else:
        samples = encode_samples(loaded, samples_from, max_corrupt_share, progress)
    channels = [compare_codes(samples.codes, train, held_out, seed)]
    for name, folder in zip(names, features, strict=True):
        extractor = FeatureModel.from_pretrained(folder).to(loaded.device)
        channels.append(compare_features(name, loaded, extractor, samples.codes, train, held_out, progress))
    report = model_report(Path(resolve(model)).name, loaded)
    audit = Audit(loaded, train, samples, *judge(channels), report)
    for channel in channels:
        report.metrics += channel_metrics(audit, channel, held_out, seed)
    report.metrics += membership_metrics(loaded, train, held_out, limit, seed)
    report.tables["verdict"] = verdict_sentence(audit, report)
    report.tables["excess"] = {
        name: {**asdict(excess), "verdict": excess.verdict} for name, excess in audit.excess.items()
    }
    report.tables["closest_pairs"] = {channel.name: pairs_table(audit, channel.name) for channel in channels}
    return audit


def sample_labels(ids: Tensor, num_samples: int) -> Tensor:
    """Class ids `(num_samples,)`, sorted, in the proportions that they have among ids `(N,)`, up to one sample each."""
    return ids.sort().values[((torch.arange(num_samples) + 0.5) * len(ids) / num_samples).long()]


def generate_samples(
    model: IsicVQModel, train: CodeCache, num_samples: int, seed: int, progress: bool = False
) -> Samples:
    """Draw samples whose classes are in proportion to those of the training images, as the checkpoint draws by default."""
    labels = sample_labels(class_ids(model, train.diagnoses), num_samples)
    with tqdm(total=model.num_steps(num_samples), unit="step", desc="sampling", disable=not progress) as bar:
        generated: Any = model.generate(num_samples, labels, seed=seed, on_step=bar.update)  # type: ignore[arg-type]
    names = [f"image {index}" for index in range(num_samples)]
    return Samples(generated.codes.cpu(), names, "generated", seed)


def encode_samples(
    model: IsicVQModel, uri: str, max_corrupt_share: float = 0.01, progress: bool = False
) -> Samples:
    """Encode images of any origin as samples."""
    source = find_source(uri, Classes.parse(AUTO))
    records = source.dataset() if source.has_random_access else source
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    cache = encode_source(
        model.vqvae, processor, records, source.describe(), 1,
        max_corrupt_share=max_corrupt_share, progress=progress,
    )  # fmt: skip
    return Samples(cache.first_views(), cache.isic_ids, cache.source.name, None)


def compare_codes(codes: Tensor, train: CodeCache, held_out: CodeCache, seed: int) -> Channel:
    """Compare samples' codes `(S, h, w)` with training images' in all their views."""
    index = CodeIndex(train.codes, train.num_codes)
    grids = codes.numpy()
    together = np.concatenate([train.codes[:, :1], held_out.codes[:, :1]])
    # Of equal distances, which are common, the first image counts: in this order training images would always be first.
    order = np.random.default_rng(seed).permutation(len(together))
    neighbours = CodeIndex(together[order], train.num_codes).nearest(grids)
    return Channel(CODES, index.nearest(grids), index.nearest(held_out.codes[:, 0]), order[neighbours.rows])


def compare_features(
    name: str,
    model: IsicVQModel,
    extractor: FeatureModel,
    codes: Tensor,
    train: CodeCache,
    held_out: CodeCache,
    progress: bool = False,
) -> Channel:
    """Compare features of samples decoded from codes `(S, h, w)`, in all views, with training images' in one."""
    all_codes = codes, train.first_views(), held_out.first_views()
    samples, training, others = (
        decoded_features(model, extractor, grids, views, f"{name}: features", progress)
        for grids, views in zip(all_codes, (NUM_VIEWS, 1, NUM_VIEWS), strict=True)
    )
    return Channel(
        name,
        nearest_by_features(samples, training[:, 0]),
        nearest_by_features(others, training[:, 0]),
        nearest_by_features(samples, torch.cat([training[:, 0], others[:, 0]])).rows,
    )


@torch.inference_mode()
def decoded_features(
    model: IsicVQModel,
    extractor: FeatureModel,
    codes: Tensor,
    num_views: int,
    desc: str = "features",
    progress: bool = False,
) -> Tensor:
    """Features `(N, num_views, D)`, on the CPU, of the images that codes `(N, h, w)` decode to, in their first views.

    They are decoded without noise: another view of an image has other codes, thus other noise, and would seem farther away.
    """
    parts = []
    with tqdm(total=len(codes), unit="image", desc=desc, disable=not progress) as bar:
        for batch in codes.split(BATCH_SIZE):
            images = model.vqvae.decode(batch.to(model.device), noise=False).float()
            views = [dihedral(images, torch.full((len(images),), view)) for view in range(num_views)]
            parts.append(torch.stack([extractor(view) for view in views], dim=1).cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def judge(channels: Sequence[Channel]) -> tuple[dict[str, Excess], dict[str, list[Pair]]]:
    """The test of near samples and the pairs of each channel, by name.

    `LEVEL` is the error rate of all channels together: each channel's test has an equal share of it, and Benjamini-Hochberg
    decides on the pairs of all channels at once.
    """
    excess, pairs = {}, {}
    tails = np.stack(
        [tail_p_values(channel.samples.distances, channel.held_out.distances) for channel in channels]
    )
    for channel, tail, copied in zip(channels, tails, found_pairs(tails), strict=True):
        nearest, others = channel.samples, channel.held_out.distances
        excess[channel.name] = excess_of_near_samples(nearest.distances, others, LEVEL / len(channels))
        p_values = empirical_p_values(nearest.distances, others)
        pairs[channel.name] = [
            Pair(
                sample=int(index),
                row=int(nearest.rows[index]),
                view=int(nearest.views[index]),
                distance=float(nearest.distances[index]),
                p_value=float(p_values[index]),
                tail_p_value=float(tail[index]),
                found=bool(copied[index]),
            )
            for index in nearest.distances.argsort(kind="stable")
        ]
    return excess, pairs


def channel_metrics(audit: Audit, channel: Channel, held_out: CodeCache, seed: int) -> list[Metric]:
    """The report's lines for a channel: distances, near samples, pairs found, and samples whose neighbour is held out."""
    samples, excess, name = audit.samples, audit.excess[channel.name], channel.name
    total = len(samples.names)
    num_found = sum(pair.found for pair in audit.pairs[name])
    num_train, num_held_out = len(audit.train.isic_ids), len(held_out.isic_ids)
    others = held_out_neighbours(channel.neighbours, num_train, num_held_out, seed=seed)
    near = [bound * total for bound in share_interval(excess.count, total)]
    share = share_interval(round(others.share * total), total)
    unit, share_unit = "share of codes" if name == CODES else "1 - cos", "share of samples"
    values: list[tuple[str, float | None, str, Sequence[float] | None]] = [
        ("near_samples", excess.count, "samples", near),
        ("near_samples_by_chance", excess.expected, "samples", None),
        ("near_samples_threshold", excess.threshold, "samples", None),
        ("near_samples_p_value", excess.p_value, "1", None),
        ("pairs_found", num_found, "samples", None),
        ("held_out_neighbours", others.share, share_unit, share),
        ("held_out_neighbours_by_chance", others.expected, share_unit, None),
        ("held_out_neighbours_p_value", others.p_value, "1", None),
    ]
    on, on_held_out = MeasuredOn("samples", samples.source), MeasuredOn("held-out", held_out.source.name)
    nearest, apart = torch.from_numpy(channel.samples.distances), torch.from_numpy(channel.held_out.distances)
    return [
        on.mean("nearest_distance", nearest, unit, samples.seed, channel=name),
        on_held_out.mean("nearest_distance", apart, unit, channel=name),
        *(
            on.metric(measure, value, unit, total, seed, interval, channel=name)
            for measure, value, unit, interval in values
            if value is not None
        ),
    ]


def membership_metrics(
    model: IsicVQModel, train: CodeCache, held_out: CodeCache, limit: int, seed: int
) -> list[Metric]:
    """The report's lines for how likelihood tells training from held-out images, of seeded subsets of both caches.

    `membership_auc` is the probability that a training image costs fewer bits than a held-out one, each given its own
    diagnosis: 0.5 is chance. `likelihood_gap` is the mean difference in bits per code.
    """
    bits = []
    for cache in (train, held_out):
        rows, ids = seeded_subset(len(cache.isic_ids), limit, seed), class_ids(model, cache.diagnoses)
        bits.append(bits_per_code(model, cache.first_views()[rows], ids[rows]))
    is_held_out = np.repeat([0, 1], [len(part) for part in bits])
    joined = torch.cat(bits).numpy()
    on = MeasuredOn("train and held-out", f"{train.source.name} and {held_out.source.name}")
    metrics = []
    for name, unit, statistic in (
        ("membership_auc", "AUROC", auroc),
        ("likelihood_gap", "bits per code", lambda usual, unusual: (unusual.mean() - usual.mean()).item()),
    ):

        def of_rows(groups: NDArray[Any], values: NDArray[Any], statistic: Any = statistic) -> float:
            return statistic(torch.from_numpy(values[groups == 0]), torch.from_numpy(values[groups == 1]))

        interval = bootstrap_interval(of_rows, is_held_out, joined, strata=is_held_out, seed=seed)
        metrics.append(on.metric(name, of_rows(is_held_out, joined), unit, len(joined), seed, interval))
    return metrics


def verdict_sentence(audit: Audit, report: Report) -> str:
    """The verdict in words, for a model card."""
    number, excesses = len(audit.samples.names), audit.excess
    near = ", ".join(f"{excess.count} by {name}" for name, excess in excesses.items())
    chance = max(excess.expected for excess in excesses.values())
    copies = {pair.sample for pairs in audit.pairs.values() for pair in pairs if pair.found}
    return (
        f"{'Training images are repeated' if audit.verdict else 'No repeated training images were detected'}: of {number} images, "
        f"{near} are nearer to a training image than all but the nearest hundredth of held-out images, where chance gives "
        f"{chance:.1f} ({'more' if audit.verdict else 'no more'} than chance explains, at a level of {LEVEL:.0%}); {len(copies)} were named "
        f"as copies; likelihood tells training from held-out images with AUROC {report.value('membership_auc'):.3f}."
    )


def pairs_table(audit: Audit, channel: str) -> list[dict[str, Any]]:
    """The shown pairs of a channel for the report, training images by id alone."""
    return [
        {
            "sample": audit.samples.names[pair.sample],
            "isic_id": audit.train.isic_ids[pair.row],
            **{key: value for key, value in asdict(pair).items() if key not in ("sample", "row")},
        }
        for pair in audit.shown_pairs(channel)
    ]
