"""Rule 4 without ranks: every parameter is in one group, tied and untied heads too; an unknown one ends the start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.builders import Built
from trainer import handover
from trainer.errors import FreezeError, ModelError
from trainer.models import freeze, hub
from trainer.models.family import load_family
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


# Hub name of each kind of parameter that a rule by module is easily wrong about -> its group; * where it is constant.
TOWER, CLIP = "transformer.visual.", "vision_tower.vision_model."
COVERED = {
    "qwen_vl": {
        f"{TOWER}positional_embedding": "vision", f"{TOWER}conv1.weight": "vision", f"{TOWER}proj": "vision",
        f"{TOWER}attn_pool.query": "merger", f"{TOWER}attn_pool.kv_proj.weight": "merger",
        f"{TOWER}attn_pool.pos_embed": "merger*", "transformer.wte.weight": "llm", "lm_head.weight": "llm",
    },
    "qwen2_vl": {
        "visual.patch_embed.proj.weight": "vision", "visual.merger.ln_q.weight": "merger",
        "visual.merger.mlp.2.weight": "merger", "model.embed_tokens.weight": "llm", "lm_head.weight": "llm",
    },
    "qwen2_5_vl": {
        "visual.patch_embed.proj.weight": "vision", "visual.merger.ln_q.weight": "merger",
        "visual.merger.mlp.2.weight": "merger", "model.embed_tokens.weight": "llm",
    },
    "qwen3_vl": {
        "model.visual.pos_embed.weight": "vision", "model.visual.merger.linear_fc2.weight": "merger",
        "model.visual.deepstack_merger_list.1.norm.weight": "merger", "model.language_model.embed_tokens.weight": "llm",
        "lm_head.weight": "llm",
    },
    "llava": {
        f"{CLIP}embeddings.class_embedding": "vision", f"{CLIP}embeddings.position_embedding.weight": "vision",
        f"{CLIP}pre_layrnorm.weight": "vision", f"{CLIP}post_layernorm.weight": "vision*",
        f"{CLIP}encoder.layers.1.mlp.fc1.weight": "vision", f"{CLIP}encoder.layers.2.mlp.fc1.weight": "vision*",
        "multi_modal_projector.linear_2.weight": "merger", "language_model.model.embed_tokens.weight": "llm",
        "language_model.lm_head.weight": "llm",
    },
}  # fmt: skip
COVERED["llava_next"] = COVERED["llava"] | {"image_newline": "merger"}


def test_positions_class_tokens_queries_newline_and_constants_are_covered(built: Built) -> None:
    plan = freeze.freeze_plan(names_of(built), built.family, Train(vision=True, merger=True, llm=True))
    found = {name: plan[name].group + "*" * (plan[name].state == "constant") for name in COVERED[built.name]}
    assert found == COVERED[built.name]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_and_another_a_parameter_of_its_own(built: Built, tied: bool) -> None:
    config = copy.deepcopy(built.family.export_config())
    config["tie_word_embeddings"] = built.family.text_config(config)["tie_word_embeddings"] = tied
    family = load_family(built.name, config)
    model = family.build(dtype=torch.float32, attn_implementation="segments", init=False)
    parts: Any = built.parts
    head, embedding = parts.head_of(model), parts.language_of(model).get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    for llm in (True, False):
        plan = freeze.freeze_plan(
            [name for name, _ in model.named_parameters()], family, Train(vision=True, merger=True, llm=llm)
        )
        heads = [entry for name, entry in plan.items() if name.endswith("lm_head.weight")]
        assert heads == ([] if tied else [freeze.Entry("llm", "trained" if llm else "frozen")])
        freeze.apply(model, plan, family)
        assert head.weight.requires_grad == embedding.weight.requires_grad == llm


def test_a_name_of_no_group_is_an_error(built: Built) -> None:
    with pytest.raises(ModelError):
        built.family.group_of("stranger.weight")


@pytest.mark.parametrize("copied", [True, False], ids=["files copied", "files of mixed groups"])
def test_what_bf16_rounds_and_nothing_trains_is_handed_over_as_it_came(
    built: Built, copied: bool, tmp_path: Path
) -> None:
    """Weights in bf16, hand-over in fp32: constants of a trained group, and a frozen group, keep their bytes."""
    model = built.family.build(dtype=torch.bfloat16, attn_implementation="segments", init=False)
    read = hub.load(model, built.model_uri, built.family, dtype=torch.float32)
    plan = freeze.freeze_plan(names_of(built), built.family, Train(vision=True, merger=True, llm=False))
    freeze.apply(model, plan, built.family)
    saved = hub.save(
        model, str(tmp_path), built.family, dtype=torch.float32, file_bytes=60_000,
        parent=(built.model_uri, handover.read(built.out, "stage1").model.files),
        frozen_groups=freeze.frozen_groups(plan) if copied else frozenset(),
    )  # fmt: skip
    assert bool(saved.copied) == copied
    same = {name for name, digest in saved.digests.items() if digest == read[name]}
    assert same >= {name for name, entry in plan.items() if entry.state != "trained"}
    rounded = {name for name, entry in plan.items() if entry.state == "trained"} - same
    assert {plan[name].group for name in rounded} == {"vision", "merger"}, "negative control: rounding is seen"
