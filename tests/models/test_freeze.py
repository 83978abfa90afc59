"""Rule 4 without ranks: every parameter is in one group, tied and untied heads too; an unknown one ends the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.models.builders import Built
from trainer.errors import FreezeError, ModelError
from trainer.models import freeze
from trainer.recipe import GROUPS, Train

Note = Callable[..., None]


def names_of(built: Built) -> list[str]:
    return [name for name, _ in built.mine.model.named_parameters()]


def test_every_parameter_is_in_exactly_one_group(built: Built, note: Note) -> None:
    plan = freeze.freeze_plan(names_of(built), built.family, Train(vision=True, merger=True, llm=True))
    assert len(plan) == len(names_of(built)), "two parameters of one hub name"
    assert {entry.group for entry in plan.values()} == set(GROUPS)
    assert all(entry.reason for entry in plan.values() if entry.state == "constant")
    for name in names_of(built):
        assert built.family.group_of(name) == built.family.group_of(built.family.hub_name(name))
    note(4, parameters=len(plan))


@pytest.mark.parametrize("group", GROUPS)
def test_one_group_alone_can_be_trained(built: Built, group: str) -> None:
    train: Any = Train(**{name: name == group for name in GROUPS})
    plan = freeze.freeze_plan(names_of(built), built.family, train)
    assert {entry.group for entry in plan.values() if entry.state == "trained"} == {group}


def test_a_parameter_without_a_group_ends_the_start(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: the family does not know it, or names a group that the recipe does not have."""
    train = Train(vision=True, merger=True, llm=True)
    with pytest.raises(FreezeError, match=r"belong to no module group\n.*stranger\.weight"):
        freeze.freeze_plan([*names_of(built), "stranger.weight"], built.family, train)
    known, wrong = built.family.group_of, names_of(built)[0]
    monkeypatch.setattr(built.family, "group_of", lambda name: "adapter" if name == wrong else known(name))
    with pytest.raises(FreezeError, match="belong to no module group"):
        freeze.freeze_plan(names_of(built), built.family, train)


def test_the_head_is_tied_where_the_config_says_so(built: Built) -> None:
    tied = bool(built.family.config.get("tie_word_embeddings"))
    heads = [name for name in names_of(built) if name.endswith("lm_head.weight")]
    assert len(heads) == (0 if tied else 1)
    assert all(built.family.group_of(name) == "llm" for name in heads)
    with pytest.raises(ModelError):
        built.family.group_of("stranger.weight")
