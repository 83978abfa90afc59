"""What a recipe loses by its own settings is told when it is checked and when a stage is planned."""

from __future__ import annotations

import pytest

from pipelines.cli.main import main
from pipelines.settle import problems_before_data
from tests.models import builders
from trainer.data.layout import Span
from trainer.models.cautions import cautions, rows_share_ids
from trainer.models.family import Grid, load_family
from trainer.resolve import load_recipe


@pytest.mark.parametrize(
    ("recipe", "overrides", "want"),
    [
        ("tiny", [], []),
        ("tiny", ["stages.stage2.pixels.fps=[1, 4]"], []),
        ("tiny", ["stages.stage2.pixels.fps=[2, 4.5, 6]"], ["stages.stage2.pixels.fps: at 4.5, 6 frames"]),
        ("tiny", ["stages.sft.pixels.fps=[6]", "model.tokens_per_second=4"], []),
        ("qwen2_5_vl_7b", ["stages.stage3.pixels.fps=[5]"], ["stages.stage3.pixels.fps: at 5 frames"]),
        (
            "qwen2_5_vl_7b",
            ["stages.stage3.pixels.fps=[5]", "model.tokens_per_second=null"],
            [],
        ),  # in a config elsewhere
        ("tiny_qwen2_vl", ["stages.stage2.pixels.fps=[30]"], []),  # its ids count rows, whatever the rate
    ],
)
def test_a_frame_rate_above_the_ids_is_told(recipe, overrides, want):
    found = [f"{field}: {message}" for field, message in cautions(load_recipe(recipe, overrides))]
    assert len(found) == len(want)
    assert all(message.startswith(start) for message, start in zip(found, want, strict=True))


def test_what_is_told_is_what_happens_to_the_ids():
    family = load_family("qwen2_5_vl", builders.module_of("qwen2_5_vl").config())
    for fps in (1, 2, 4, 4.5, 6, 24):
        span = Span("video", 0, 8, grid=Grid(8, 2, 2, 28, 28), seconds_per_grid=2 / fps)
        distinct = len(set(family.position_ids([span])[1].tolist()))
        assert (distinct < 8) == rows_share_ids(family, fps), fps


def test_check_warns_and_stays_valid(capsys: pytest.CaptureFixture[str]):
    assert main(["recipe", "check", "tiny", "--set", "stages.stage2.pixels.fps=[6]"]) == 0
    told = capsys.readouterr()
    assert "tiny: valid" in told.out
    assert told.err.count("warning:") == 1 and "use at most 4 frames a second" in told.err
    assert main(["recipe", "check", "tiny"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["qwen2_vl_7b", "tiny_qwen2_vl"])
def test_a_rate_of_ids_is_refused_where_ids_count_rows(recipe):
    (problem,) = problems_before_data(load_recipe(recipe, ["model.tokens_per_second=2"]))
    assert problem[0] == "model.tokens_per_second" and "count grid rows" in problem[1]
