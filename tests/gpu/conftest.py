"""The small families of tests/models, for this folder too."""

from tests.models.conftest import _one_thread, build, built, pytest_generate_tests, sources

__all__ = ["_one_thread", "build", "built", "pytest_generate_tests", "sources"]
