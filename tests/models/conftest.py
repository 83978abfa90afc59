"""Each family built once a session; what the rules measured is told at the end, and stored when asked.

pytest tests/models -m 'not long' --write-measured   writes tests/golden/families.json, from which `make generated`
makes the table
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.models import builders, measured
from tests.models.builders import Built

MEASURED: dict[str, dict[str, dict[str, object]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-measured", action="store_true", help="store what the rules measured, for the table")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "built" in metafunc.fixturenames:
        metafunc.parametrize("built", builders.names(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    builders.prepare_sources(folder)
    return folder


@pytest.fixture(scope="session")
def build(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """A family by name, built once."""
    return functools.cache(lambda name: builders.build(name, tmp_path_factory.mktemp(name), sources))


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest, build: Callable[[str], Built]) -> Built:
    return build(request.param)


@pytest.fixture
def note(built: Built) -> Callable[..., None]:
    """note(rule, figure=value, ...): a measured number of this family, for the table."""

    def write(rule: int, **figures: object) -> None:
        MEASURED.setdefault(built.name, {}).setdefault(str(rule), {}).update(figures)

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not MEASURED:
        return
    terminalreporter.section("measured")
    for family, rules in sorted(MEASURED.items()):
        for rule, figures in sorted(rules.items()):
            told = ", ".join(f"{name} {measured.told(value)}" for name, value in figures.items())
            terminalreporter.write_line(f"{family} rule {rule}: {told}")
    if config.getoption("--write-measured"):
        measured.store(MEASURED)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices here are small: a second thread costs more than it gives, beside other work three times as much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
