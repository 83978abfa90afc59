"""Exit codes mean one thing everywhere, and a consequence never hides its cause."""

from __future__ import annotations

import inspect

import pytest

from trainer import errors


def every_error() -> list[type[errors.QwenVLError]]:
    return [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.QwenVLError) and kind is not errors.QwenVLError
    ]


def test_every_error_has_a_code_of_its_own_and_stands_in_the_tree_of_the_docstring():
    codes = {kind.code for kind in every_error()}
    assert len(codes) == len(every_error()) - 1, "RecipeError shares UsageError's 2, nothing else shares"
    for kind in every_error():
        line = next(line for line in errors.__doc__.splitlines() if f"─ {kind.__name__} " in line)
        assert str(kind.code) in line


@pytest.mark.parametrize(
    ("code", "want"),
    [
        (0, "done"),
        (1, "retry-once"),
        (2, "permanent"),
        (63, "retry-once"),
        (64, "permanent"),
        (79, "permanent"),
        (80, "retry-once"),
        (137, "retry"),
        (-9, "retry"),
        (143, "preempted"),
        (144, "retry"),
        (145, "retry"),
        (146, "retry"),
        (147, "retry-once"),
    ],
)
def test_a_code_means(code: int, want: str):
    assert errors.meaning(code) == want


@pytest.mark.parametrize(
    ("codes", "want"),
    [
        ([0, 0], "done"),
        ([0, 71], "permanent"),
        ([144, 71], "permanent"),
        ([143, 2], "permanent"),
        ([143, 144], "preempted"),
        ([144, 145, -9], "retry"),
        ([147, 144], "retry-once"),
        ([0, 143], "preempted"),
    ],
)
def test_all_ranks_together_decide(codes: list[int], want: str):
    assert errors.decide(codes) == want


@pytest.mark.parametrize(
    ("codes", "want"),
    [
        ({0: 144, 1: 71}, (1, 71)),
        ({0: 144, 1: -9}, (1, -9)),
        ({0: 145, 1: 144, 2: 147}, (2, 147)),
        ({0: 0, 1: 0}, (-1, 0)),
    ],
)
def test_the_first_cause_is_the_rank_that_says_most(codes: dict[int, int], want: tuple[int, int]):
    assert errors.first_cause(codes) == want


def test_a_message_names_what_where_expected_got_and_what_to_do():
    error = errors.MediaError("truncated image", where="a.jpg", expected="20 bytes", got="12 bytes", do="copy it again")
    assert str(error).splitlines() == [
        "truncated image",
        "  where: a.jpg",
        "  expected: 20 bytes",
        "  got: 12 bytes",
        "  do: copy it again",
    ]
