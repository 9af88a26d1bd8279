"""Classes of images: the names that labels may have, their meaning, and the counts of one pass over a source.

The default classes are ISIC's eight with their aliases. A declared name comes before the aliases, so that "solar lentigo"
may be a class of its own. `unknown` stands for no class, unless it is declared.
"""

import difflib
import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from isic_vq.data.errors import DataError
from isic_vq.models.diagnosis import DIAGNOSES, closest_diagnoses, find_diagnosis, is_other_disease

ISIC = DIAGNOSES[:-1]
UNKNOWN = DIAGNOSES[-1]
AUTO, NONE = "auto", "none"
OTHERS = ("stop", "drop", "take", "ignore")
NUM_LISTED = 10  # names or rows in a message


@dataclass(frozen=True)
class Classes:
    """The names that labels may have; ValueError if one is empty, holds control characters, or two differ only in case."""

    # Declared classes in the order of their ids; ISIC's eight are known beside them
    names: tuple[str, ...] = ISIC
    # What to do with a label that is neither declared nor known: "stop" the run, "drop" its image (and images of ISIC
    # classes that are not declared), "take" it as a class of that name, or "ignore" all labels
    others: str = "stop"

    def __post_init__(self) -> None:
        if self.others not in OTHERS:
            raise ValueError(f"others is {self.others!r}: expected one of {', '.join(OTHERS)}")
        for name in self.names:
            if not name.strip() or not name.isprintable():
                raise ValueError(f"{name!r} is no name of a class: expected letters, digits or signs")
        _refuse_cases(self.names)

    @classmethod
    def parse(cls, declared: str | Sequence[object] | None, drop_others: bool = False) -> "Classes":
        """Parse declared classes: names, names separated by commas, "auto", "none", or None for ISIC's.

        A spelling of an ISIC class, such as "mel" for melanoma, is that class. `drop_others` leaves out images of other
        classes. ValueError as the class, or for a name that YAML reads as neither text nor a number.
        """
        if isinstance(declared, str):
            names: list[object] = [name.strip() for name in declared.split(",") if name.strip()]
        else:
            names = list(declared or ())
        if names in ([AUTO], [NONE]):
            return cls(ISIC, "take") if names == [AUTO] else cls((), "ignore")
        if declared is not None and not names:
            raise ValueError(f"classes is empty: expected names, {AUTO} or {NONE}")
        unique: dict[str, None] = {}
        for name in names:
            if isinstance(name, bool) or not isinstance(name, (str, int)):
                raise ValueError(
                    f"classes holds {name!r}, which is not text: write it in quotes, as YAML reads no, on and dates otherwise"
                )
            text = _clean(str(name))
            diagnosis = find_diagnosis(text, synonyms_only=True)
            is_own = diagnosis in (None, UNKNOWN) and text.casefold() != UNKNOWN
            unique[text if is_own else str(diagnosis)] = None
        return cls(tuple(unique) if declared is not None else ISIC, "drop" if drop_others else "stop")

    @classmethod
    def of_model(cls, names: Iterable[str]) -> "Classes":
        """The classes of a model; other labels are taken as they are, which suits measuring and not training."""
        return cls(tuple(names), "take")

    @property
    def is_default(self) -> bool:
        """Whether these are ISIC's classes and others stop the run."""
        return self == Classes()

    @functools.cached_property
    def _declared(self) -> dict[str, str]:
        return {_folded(name): name for name in self.names}

    @functools.cached_property
    def _of_diagnosis(self) -> dict[str, str]:
        names = {find_diagnosis(name, synonyms_only=True): name for name in self.names}
        return {diagnosis: name for diagnosis, name in names.items() if diagnosis is not None}

    def declares(self, text: object) -> bool:
        """Whether a text is a declared class; then even "unknown" or "none" is no missing value."""
        return _folded(str(text)) in self._declared

    def resolve(self, text: str) -> str | None:
        """The class that a label means: `UNKNOWN` for no class, None if it is neither declared nor known."""
        declared = self._declared.get(_folded(text))
        if declared is not None:
            return declared
        if self.others == "ignore" or _folded(text) == UNKNOWN:
            return UNKNOWN
        diagnosis = find_diagnosis(text)
        if diagnosis in self._of_diagnosis:
            return self._of_diagnosis[diagnosis]
        if diagnosis == UNKNOWN or (diagnosis is not None and self.others != "drop"):
            return diagnosis
        if self.others == "take":
            return _clean(text)
        return UNKNOWN if self.others == "stop" and is_other_disease(text) else None

    def of_number(self, text: str) -> str | None:
        """The class of a number in a .cls file, an index of the declared classes and then `UNKNOWN`; else None."""
        names = (*self.names, UNKNOWN)
        is_index = text.isdecimal() and self.others != "take" and int(text) < len(names)
        return names[int(text)] if is_index and not self.declares(text) else None


def ordered_classes(present: Iterable[str], declared: Sequence[str] | None = None) -> list[str]:
    """Sort the classes of labels: declared ones in their order, ISIC's, others by name; `UNKNOWN` only if declared."""
    names = set(present) - ({UNKNOWN} - set(declared or ()))
    first = [name for name in dict.fromkeys((*(declared or ()), *ISIC)) if name in names]
    return [*first, *sorted(names.difference(first))]


class Reading:
    """One pass over a source: names classes, and counts what is left out; if not strict, `check` refuses unknown labels."""

    def __init__(self, classes: Classes | None = None, is_strict: bool = True):
        self.classes, self.is_strict = classes or Classes(), is_strict
        self.labels: Counter[str] = Counter()  # images by class
        self.read_as: Counter[tuple[str, str]] = Counter()  # by (label as written, class) where these differ
        self.others: Counter[str] = Counter()  # by label that is neither declared nor known
        self.first_other = ""  # where the first of these is
        self.left_out: dict[str, list[str]] = {}  # names of files and images by the reason
        self.notes: dict[str, list[str]] = {}  # names of images that are kept, by a remark about them
        self._resolved: dict[str, str | None] = {}

    def name_class(self, text: str, where: str) -> str | None:
        """Count a label and return its class, or None to leave its image out; DataError for an unknown one if strict."""
        if text not in self._resolved:
            self._resolved[text] = self.classes.resolve(text)
        name = self._resolved[text]
        if name is None:
            self.first_other = self.first_other or where
            self.others[text] += 1
            if self.classes.others == "drop":
                return None
            if self.is_strict:
                raise DataError(f"{where}: {_other_labels({text: 1}, self.classes, (), with_counts=False)}")
            return text
        self.labels[name] += 1
        if _folded(text).replace(" ", "_") != _folded(name).replace(" ", "_"):
            self.read_as[text, name] += 1
        return name

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def note(self, remark: str, name: str) -> None:
        self.notes.setdefault(remark, []).append(name)

    def check(self, source: str) -> None:
        """Refuse labels that are neither declared nor known, with their counts, and classes that differ only in case."""
        if self.others and self.classes.others == "stop":
            message = _other_labels(self.others, self.classes, self.labels)
            raise DataError(f"{source}: {message} The first is in {self.first_other}.")
        try:
            _refuse_cases([name for name in self.labels if name != UNKNOWN])
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None

    def lines(self) -> Iterator[str]:
        """Yield the counts that a person should see, a line of each kind."""
        if self.read_as:
            pairs = self.read_as.most_common()
            listed = [f'"{text}" -> {name}, {_images(n)}' for (text, name), n in pairs[:NUM_LISTED]]
            yield f"labels read as another name: {'; '.join(listed)}{and_more(len(pairs))}"
        if self.classes.others == "take":
            taken = ordered_classes(set(self.labels).difference(ISIC, self.classes.names, {UNKNOWN}))
            listed = [f"{name} ({_images(self.labels[name])})" for name in taken[:NUM_LISTED]]
            if taken:
                yield (
                    f"classes taken as they are written: {', '.join(listed)}{and_more(len(taken))}; an alias of an "
                    "ISIC class is read as that class"
                )
        missing = [] if self.classes.names == ISIC else [n for n in self.classes.names if not self.labels[n]]
        if missing and self.classes.others != "take":
            yield f"declared classes without an image: {', '.join(missing[:NUM_LISTED])}{and_more(len(missing))}"
        if self.classes.others == "ignore":
            yield "labels are ignored: no image has a class"
        if self.others and self.classes.others == "drop":
            yield f"left out, of other classes: {counted(self.others)}"
        for reason, names in self.left_out.items():
            yield f"left out, {reason}: {len(names)}, for example {', '.join(sorted(names)[:3])}"
        for remark, names in self.notes.items():
            yield f"{remark}: {len(names)}, for example {', '.join(sorted(names)[:3])}"


def _other_labels(
    counts: Mapping[str, int], classes: Classes, known: Iterable[str], with_counts: bool = True
) -> str:
    """The message about labels that are neither declared nor known, with a ready --classes option."""
    names = list(counts)
    listed = counted(counts) if with_counts else repr(names[0])
    close = difflib.get_close_matches(names[0], classes.names, n=3, cutoff=0.7) or closest_diagnoses(names[0])
    hint = f" Did you mean {' or '.join(close)}?" if not with_counts and close else ""
    declared = [] if classes.names == ISIC else list(classes.names)
    wanted = [*declared, *(n for n in ordered_classes(known) if n not in declared), *names]
    example = ",".join(wanted[:NUM_LISTED]) + (",..." if len(wanted) > NUM_LISTED else "")
    verb = "are no known classes" if len(names) > 1 else "is not a known class"
    return (
        f"{listed} {verb} (known: {', '.join(classes.names[:NUM_LISTED])}{and_more(len(classes.names))}).{hint} Declare "
        f"your classes, --classes {example!r} (in a recipe data.classes=[{example}]); or take every name as a class, "
        f"--classes {AUTO} (data.classes={AUTO})."
    )


def new_classes(counts: Mapping[str, int], setting: str) -> DataError:
    """The error of validation images whose class no training image has; `setting` would leave them out."""
    return DataError(
        f"validation images of classes that no training image has: {counted(counts)}. Add training images of them, or leave "
        f"these out with {setting}"
    )


def counted(counts: Mapping[str, int]) -> str:
    """List labels with their numbers of images, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{name!r} ({_images(number)})" for name, number in ranked[:NUM_LISTED]]
    return f"{', '.join(listed)}{and_more(len(ranked))}"


def _images(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"


def and_more(number: int) -> str:
    """The end of a list that names only `NUM_LISTED` of `number` things."""
    return f" and {number - NUM_LISTED} more" if number > NUM_LISTED else ""


def _clean(text: str) -> str:
    """Normalise blanks and the Unicode form, in which file systems differ."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _folded(text: str) -> str:
    return _clean(text).casefold()


def _refuse_cases(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise ValueError(
                f"the classes {other!r} and {name!r} differ in case alone: rename one, or declare one"
            )
