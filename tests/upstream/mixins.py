"""The test mixins of transformers and diffusers, imported from where `fetch.py` unpacked them, and how a case is run.

Modules that the archives leave out, `exceptions.STOOD_IN`, are stood in for by modules whose names are all empty classes.
"""

import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from exceptions import STOOD_IN
from fetch import upstream_tests


class Empty(MetaPathFinder, Loader):
    """Finds the modules that are stood in for, and their packages."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if any(f"{module}.".startswith(f"{name}.") for module in STOOD_IN):
            return ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []

        def missing(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = missing  # type: ignore[method-assign]


def upstream(package: str, module: str) -> ModuleType:
    """Import a module of a package's tests.

    Raises:
        pytest.skip.Exception: it was not fetched.
    """
    folder, name = upstream_tests(package), f"{package}_tests"
    if not (folder / f"{module.replace('.', '/')}.py").is_file():
        pytest.skip(
            f"{folder / module} is not there: python tests/upstream/fetch.py", allow_module_level=True
        )
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
        if not any(isinstance(finder, Empty) for finder in sys.meta_path):
            sys.meta_path.append(Empty())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"{name}.{module}")


class Result(unittest.TestResult):
    """Names of tests by what came of them; pytest's own skip counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.skips: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self.skips[test._testMethodName] = reason

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if isinstance(err[1], pytest.skip.Exception):
            return self.addSkip(test, str(err[1]))
        self.failed[test._testMethodName] = f"{type(err[1]).__name__}: {err[1]}"
        return None

    addFailure = addError  # noqa: N815

    def addSubTest(self, test: unittest.TestCase, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self.addError(test, err)


def run(case: type[unittest.TestCase], names: Sequence[str] | None = None) -> Result:
    """Run a case's tests (all, or those whose names hold one of `names`) in this process."""
    result = Result()
    for name in unittest.TestLoader().getTestCaseNames(case):
        if names is None or any(part in name for part in names):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case(name).run(result)
    return result


def count(result: Result) -> Counter[str]:
    """How many tests were run, failed and skipped."""
    return Counter(
        run=result.testsRun,
        passed=result.testsRun - len(result.failed) - len(result.skips),
        failed=len(result.failed),
        skipped=len(result.skips),
    )
