"""The report: every published number, with unit, count, split, data set and seed.

One `report.json` per evaluated model is the only source of numbers for figures and model card. The file is plain JSON
(finite numbers only), written atomically, and reading it back gives an equal `Report`. Values must be Python's own types: a
tensor or NumPy scalar is refused rather than converted, because rounding belongs to the code that computed the number.

Privacy: a report is published, so a string that looks like an absolute path is refused anywhere in it, and
`environment` records models of hardware and versions, never a host, a user or a folder.
"""

import dataclasses
import json
import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from isic_vq import __version__
from isic_vq.files import write_atomically

# A slash, home, drive or UNC start at the beginning of the text or after a separator; "https://" and "a/b" are not.
ABSOLUTE_PATH = re.compile(
    r"""(?:^|[\s"'`=(\[{,;:|])(?:/[\w.~-]|~/|~[A-Za-z_][\w.-]*/|[A-Za-z]:[\\/]|\\\\\w)|file://"""
)

GROUP_COLUMNS = ("diagnosis", "source", "sex", "site")  # labels of a part of the images
NAMED_LABELS = (*GROUP_COLUMNS, "batch")  # labels that are written with their key


@dataclass(frozen=True)
class Metric:
    """One measured number and everything needed to read it.

    Raises:
        ValueError: a field has the wrong type, is empty or not finite; the name has brackets.
    """

    name: str  # of the measure, for example "psnr"
    value: float  # finite, in `unit`
    unit: str  # for example "dB"; "1" for a ratio
    n: int  # number of items (usually images) that the value is computed from, at least 1
    split: str
    dataset: str
    seed: int | None = None  # of the random choices of the measurement, if there are any
    interval: list[float] | None = None  # 95 % interval [low, high] of `value`, in `unit`
    # Tell it from other metrics of its name, for example {"images": "samples"}, in the order in which they are written; a
    # label of `GROUP_COLUMNS` means that it is of a group of the images.
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("name", "unit", "split", "dataset"):
            text = getattr(self, key)
            if type(text) is not str or not text:
                raise ValueError(f"Metric.{key} must be a non-empty str, got {text!r} (unit of a ratio: '1')")
        if "[" in self.name:
            raise ValueError(
                f"the name {self.name!r} has brackets: expected labels beside it, such as "
                "name 'psnr' and labels {'sex': 'female'}; measure it again if an older isic-vq wrote this report"
            )
        label = f"metric {self.name!r}"
        if type(self.labels) is not dict or not all(
            type(text) is str and text for pair in self.labels.items() for text in pair
        ):
            raise ValueError(f"{label}: labels must be non-empty str by str, got {self.labels!r}")
        if type(self.value) not in (int, float):
            raise ValueError(f"{label}: value must be an int or float, got {_kind(self.value)}")
        if not math.isfinite(self.value):
            raise ValueError(
                f"{label}: value must be finite, got {self.value}; leave an undefined metric out"
            )
        if type(self.n) is not int or self.n < 1:
            raise ValueError(f"{label}: n must be an int of at least 1, got {self.n!r}")
        if self.seed is not None and type(self.seed) is not int:
            raise ValueError(f"{label}: seed must be an int or None, got {_kind(self.seed)}")
        if self.interval is not None:
            numbers = type(self.interval) is list and [type(bound) for bound in self.interval] == [float] * 2
            if not numbers or not self.interval[0] <= self.interval[1]:
                raise ValueError(f"{label}: interval must be [low, high] or None, got {self.interval!r}")

    @property
    def text(self) -> str:
        """Name and labels for readers, such as "agreement[samples, derm-resnet, diagnosis=nevus]"."""
        shown = [f"{key}={text}" if key in NAMED_LABELS else text for key, text in self.labels.items()]
        return f"{self.name}[{', '.join(shown)}]" if shown else self.name

    @property
    def group(self) -> tuple[str, str] | None:
        """Column and value of its group of images, such as ("sex", "female"); None for all images."""
        return next((pair for pair in self.labels.items() if pair[0] in GROUP_COLUMNS), None)

    @property
    def of_all(self) -> "Metric":
        """The metric with the labels that it has for all images."""
        return replace(self, labels={k: text for k, text in self.labels.items() if k not in GROUP_COLUMNS})


@dataclass
class Report:
    """Results of one evaluation."""

    model: dict[str, Any]  # name, configuration, hash of the weights
    metrics: list[Metric]
    # Longer than one number, by name: "codebook_counts", K integers.
    tables: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def find(self, name: str, split: str | None = None, dataset: str | None = None, **labels: str) -> Metric:
        """Look up the one metric of that name and exactly these labels; split and data set are needed where several have it.

        Raises:
            KeyError: no metric matches, or more than one does; the message lists those that exist.
        """
        wanted = {"name": name, "split": split, "dataset": dataset}
        matches = [
            metric
            for metric in self.metrics
            if metric.labels == labels
            and all(text is None or getattr(metric, key) == text for key, text in wanted.items())
        ]
        if len(matches) == 1:
            return matches[0]
        asked = ", ".join(f"{key}={text!r}" for key, text in (wanted | labels).items() if text is not None)
        listed = "; ".join(
            f"{m.text} (split {m.split}, data set {m.dataset}, seed {m.seed})"
            for m in matches or self.metrics
        )
        problem = f"{len(matches)} metrics match" if matches else "no metric matches"
        raise KeyError(f"{problem} {asked}. {'They' if matches else 'The report'}: {listed or 'empty'}")

    def value(self, name: str, split: str | None = None, dataset: str | None = None, **labels: str) -> float:
        """The value of the metric that `find` returns, in its unit."""
        return self.find(name, split, dataset, **labels).value

    def save(self, path: Path) -> None:
        """Write the report as JSON, atomically: a failure leaves the old file as it was.

        Raises:
            ValueError: a value is not plain JSON, not finite, or looks like an absolute path.
        """
        _check_report(self)
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False, ensure_ascii=False)
        write_atomically(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a report that `save` wrote.

        Raises:
            ValueError: the file is not a report; the message names the file and the place.
        """
        try:
            content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
            _check_keys(content, cls, "the report")
            if type(content["metrics"]) is not list:
                raise ValueError(f"metrics must be a list, got {_kind(content['metrics'])}")
            for index, record in enumerate(content["metrics"]):
                _check_keys(record, Metric, f"metrics[{index}]")
            report = cls(**{**content, "metrics": [Metric(**record) for record in content["metrics"]]})
            _check_report(report)
        except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{path} is not a report: {error}") from error
        return report


def model_report(name: str, model: Any) -> Report:
    """A report on a whole model (an `IsicVQModel`) of that name, still without metrics."""
    description = {"name": name, "type": "isic_vq", "prior": model.config.prior_config.model_type}
    return Report(description, [], environment=environment(str(model.device)))


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions, hardware and commit of a measurement, by default on CUDA if there is any; no host, user or folder.

    Returns:
        `isic_vq`, `python`, `torch`, `transformers`: versions. `device`: model name of the CPU or GPU. `cores`: CPU
        cores this process may use. `threads`: threads torch uses. `git_commit` and `git_dirty` (tracked files of the
        package differ from it): `None` unless the package runs from a git checkout.
    """
    import torch  # here, so that reading a report (figures, the card) does not import it

    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    commit, dirty = git_state(Path(__file__).resolve().parents[1] / "__init__.py")
    return {
        "isic_vq": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name; outside Linux the name that `platform` has, at least the architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return name.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def git_state(file: Path) -> tuple[str | None, bool | None]:
    """Commit of a tracked file's folder, and whether tracked files there differ from it.

    `(None, None)` where git is not installed or does not track the file: a package installed into a virtual
    environment inside someone's checkout must not report that checkout's commit.
    """
    if shutil.which("git") is None or _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    commit = _git(file.parent, "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return (commit, bool(changes)) if commit else (None, None)


def _git(folder: Path, *arguments: str) -> str | None:
    variables = {key: text for key, text in os.environ.items() if not key.startswith("GIT_")}  # set in hooks
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _check_report(report: Report) -> None:
    """Raise ValueError unless the report can be written and read back as the same report."""
    for key in ("model", "tables", "environment"):
        if type(getattr(report, key)) is not dict:
            raise ValueError(f"{key} must be a dict, got {_kind(getattr(report, key))}")
    for index, metric in enumerate(report.metrics):
        if type(metric) is not Metric:
            raise ValueError(f"metrics[{index}] must be a Metric, got {_kind(metric)}")
    for key, content in dataclasses.asdict(report).items():
        _check_json(content, key)


def _check_json(content: Any, place: str) -> None:
    """Raise ValueError for anything JSON would change, and for text that looks like an absolute path."""
    if type(content) is dict:
        for key, entry in content.items():
            if type(key) is not str:
                raise ValueError(f"{place}: key {key!r} must be a str, got {_kind(key)}")
            _check_text(key, f"a key of {place}")
            _check_json(entry, f"{place}.{key}")
    elif type(content) is list:
        for index, entry in enumerate(content):
            _check_json(entry, f"{place}[{index}]")
    elif type(content) is str:
        _check_text(content, place)
    elif type(content) is float:
        if not math.isfinite(content):
            raise ValueError(f"{place} must be finite, got {content}")
    elif content is not None and type(content) not in (bool, int):
        raise ValueError(
            f"{place} must be a dict, list, str, int, float, bool or None, got {_kind(content)}; "
            "convert scalars with .item() and arrays or tuples with .tolist() or list()"
        )


def _check_text(text: str, place: str) -> None:
    if ABSOLUTE_PATH.search(text):
        raise ValueError(
            f"{place} looks like an absolute path: {text!r}; a report is published, so name the thing instead"
        )


def _check_keys(record: Any, owner: type, place: str) -> None:
    """Raise ValueError unless a JSON object has the fields of a dataclass; those with a default may be missing."""
    if type(record) is not dict:
        raise ValueError(f"{place} must be an object, got {_kind(record)}")
    defaults = {item.name: {item.default, item.default_factory} for item in dataclasses.fields(owner)}
    required = {name for name, values in defaults.items() if values == {dataclasses.MISSING}}
    missing, unknown = sorted(required - set(record)), sorted(set(record) - set(defaults))
    if missing or unknown:
        raise ValueError(
            f"{place} must have the keys {sorted(defaults)}: missing {missing}, unknown {unknown}"
        )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the number {name} is not finite")


def _kind(content: Any) -> str:
    return f"{type(content).__module__}.{type(content).__qualname__}".removeprefix("builtins.")
