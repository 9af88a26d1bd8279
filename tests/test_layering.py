"""Imports point one way: read from the source by `ast`, so that an import inside a function counts, too."""

import ast
import functools
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "isic_vq"

# A part imports parts of a lower rank only; its own files import each other without a cycle.
RANKS = {
    "data.errors": -2,
    "locks": -2,  # beneath the files that they keep others from
    "files": -1,
    "allocator": 0,
    "work": 0,
    "yaml_text": 0,
    "hub": 0,  # the folder itself, which holds nothing
    "hub.registration": 0,  # holds the names of model classes and imports them when transformers is imported
    "models": 0,
    "hub.pretrained": 1,
    "data": 1,
    "evaluation.report": 1,  # the form in which numbers leave the project; computes none
    "evaluation.measures": 1,  # functions of tensors, which figures show, too
    "evaluation.report_tables": 2,
    "evaluation": 3,
    "figures": 3,
    "hub.describe": 2,
    "hub.layout": 3,
    "hub.card": 3,
    "hub.onnx_export": 3,
    "codec": 3,
    "generate": 3,
    "figures.evaluation": 4,  # shows what an evaluation measured; the other figures are given numbers
    "figures.sheets": 4,
    "pictures": 4,
    "codec.image_archive": 4,  # reads images and writes PNGs; the codec itself knows codes alone
    "hub.export": 4,
    "hub.card_check": 4,
    "hub.classifier_card": 4,
    "training": 4,
    "demo": 4,
    "hub.transfer": 5,
    "evaluation.student": 5,  # trains classifiers to measure a model by
    "evaluation.utility": 6,
    "evaluation.realism": 6,
    "cli": 7,
    "__main__": 8,
}
# Third-party packages that one part alone may import, and all that `models` may: a Hub repository runs without us.
OWNERS = {
    "accelerate": {"training"},
    "constriction": {"codec"},
    "datasets": {"data"},
    "diffusers": {"models"},
    "gradio": {"demo"},
    "imagehash": {"data"},
    "jinja2": {"figures"},
    "matplotlib": {"figures"},
    "numba": {"models"},
    "onnx": {"hub"},
    "onnxruntime": {"hub"},
    "onnxscript": {"hub"},
    "psutil": {"training"},
    "pyarrow": {"data"},
    "scipy": {"evaluation"},
    "sklearn": {"evaluation"},
    "torchmetrics": {"evaluation", "training"},
    "typer": {"cli"},
    "urllib3": {"data"},
    "yaml": {"training", "yaml_text"},
}
MODELS_MAY_IMPORT = {
    "torch",
    "numpy",
    "PIL",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "tqdm",
    "numba",
    "diffusers",
}


def module_name(path):
    """Name below the package: "models.modeling_vqvae", "cli"; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def type_checking_only(tree):
    """Nodes below `if TYPE_CHECKING:`, which never run."""
    return {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        and isinstance(branch.test, ast.Name)
        and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }


@functools.cache
def imports_of(name):
    """(absolute module, relative level, is it at the top of the file) of every import that runs."""
    path = FILES[name]
    tree = ast.parse(path.read_text())
    skipped = type_checking_only(tree)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        at_the_top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, at_the_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["isic_vq", *filter(None, package.split("."))]
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:  # a name may be a module itself
                is_module = f"{module}.{alias.name}".removeprefix("isic_vq.") in FILES
                found.append((f"{module}.{alias.name}" if is_module else module, node.level, at_the_top))
    return found


def own(name):
    """Modules of the package that a module imports."""
    return {
        module.removeprefix("isic_vq").removeprefix(".")
        for module, _, _ in imports_of(name)
        if module.split(".")[0] == "isic_vq"
    }


def third_party(name):
    roots = {module.split(".")[0] for module, _, _ in imports_of(name)}
    return roots - {"isic_vq"} - sys.stdlib_module_names


def part(name):
    """The entry of `RANKS` that a module belongs to."""
    return max((key for key in RANKS if f"{name}.".startswith(f"{key}.")), key=len)


def test_every_module_has_a_rank():
    homeless = [name for name in FILES if name and not any(f"{name}.".startswith(f"{key}.") for key in RANKS)]
    assert homeless == [], "give the new part a place in RANKS"


def test_modules_import_lower_parts_only():
    violations = []
    for name in filter(None, FILES):
        for target in sorted(own(name) - {""}):
            if name == "hub.registration":
                allowed = target.startswith("models.")
            else:
                allowed = part(target) == part(name) or RANKS[part(target)] < RANKS[part(name)]
            if not allowed:
                violations.append(f"{name} -> {target} points up or sideways")
    assert violations == []


def test_training_is_imported_by_what_trains_alone():
    importers = {name for name in FILES if any(target.startswith("training") for target in own(name))}
    assert {part(name) for name in importers} == {"training", "evaluation.student", "cli"}


def test_no_basename_occurs_twice():
    """A file is found by its name, and an error's `name.py, line 7` says where."""
    names = Counter(path.name for path in FILES.values() if path.name != "__init__.py")
    assert {name: number for name, number in names.items() if number > 1} == {}


def test_no_import_cycle():
    """Depth-first over all modules, packages standing for their `__init__`."""
    arrows = {name: {target for target in own(name) if target} for name in FILES}
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(arrows[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


def test_models_run_from_a_hub_repository():
    """The folder is what `save_pretrained` copies: flat, siblings by `from .x import name`, few packages."""
    violations = []
    for name in (name for name in FILES if name.startswith("models.")):
        violations += [f"{name} imports {package}" for package in third_party(name) - MODELS_MAY_IMPORT]
        for module, level, _ in imports_of(name):
            if not module.startswith("isic_vq"):
                continue
            if level != 1:
                violations.append(f"{name} imports {module} absolutely or from a parent: a copy has neither")
            if not module.startswith("isic_vq.models."):
                violations.append(f"{name}: `from . import x` is not exported")
            elif FILES[module.removeprefix("isic_vq.")].parent != PACKAGE / "models":
                violations.append(f"{name} imports {module}: the folder is flat")
    assert violations == []


def test_packages_are_imported_by_their_owners_alone():
    violations = []
    for package, owners in OWNERS.items():
        importers = {name for name in FILES if package in third_party(name)}
        if not importers:
            violations.append(f"nobody imports {package}: drop it from OWNERS, and from the dependencies")
        violations += [f"{name} imports {package}" for name in importers if name.split(".")[0] not in owners]
    assert violations == []


def test_only_the_plots_draw_with_matplotlib():
    at_the_top = {
        name
        for name in FILES
        for module, _, top in imports_of(name)
        if top and module.startswith("matplotlib")
    }
    assert at_the_top == {"figures.plots"}, "elsewhere it may be asked for inside a function"


def test_the_loop_knows_nothing_of_images_or_codes():
    allowed = {"averaging", "checkpoints", "feed", "processes", "recipe", "run", "task", "tracking"}
    assert own("training.loop") <= {"locks", *(f"training.{name}" for name in allowed)}, (
        "what is trained reaches the loop as a Task"
    )


def test_light_modules_import_nothing_heavy_at_the_top():
    heavy = {"torch", "transformers", "numpy", "datasets", "accelerate", "matplotlib", "PIL", "pyarrow"}
    violations = [
        f"{name} imports {module}"
        for name in ("", "allocator", "hub.registration", "cli", "hub.pretrained", "files")
        for module, _, top in imports_of(name)
        if top and module.split(".")[0] in heavy
    ]
    assert violations == []


def test_text_is_utf_8_whatever_the_locale():
    violations = []
    for name, path in FILES.items():
        for call in (
            n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)
        ):
            attribute = getattr(call.func, "attr", None)
            modes = [node.value for node in call.args if isinstance(node, ast.Constant)]
            is_text = attribute in ("read_text", "write_text") or (
                (attribute == "open" or getattr(call.func, "id", "") == "open")
                and any(mode in ("r", "w", "a", "x", "r+", "w+") for mode in modes)
            )
            if is_text and "encoding" not in {keyword.arg for keyword in call.keywords}:
                violations.append(f"{name}, line {call.lineno}: {ast.unparse(call)[:80]}")
    assert violations == []
