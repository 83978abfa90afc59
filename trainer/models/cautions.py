"""What a recipe asks of its family that works and loses something: told before data is prepared, never an error.

cautions(recipe)                 without reading a model's config: `qwenvl recipe check`
stage_cautions(family, pixels)   with it: when a stage is planned
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.layout import Span
from trainer.data.pieces import Shown
from trainer.models.family import Family, load_family
from trainer.recipe import Pixels, Recipe


def cautions(recipe: Recipe) -> list[tuple[str, str]]:
    """(field path, message), as far as the recipe itself tells. Raises what stated_family raises."""
    if (family := stated_family(recipe)) is None:
        return []
    return [("model.config", told) for told in family.assumed] + [
        (f"stages.{name}.{field}", message)
        for name, stage in recipe.stages.named().items()
        for field, message in stage_cautions(family, stage.pixels)
    ]


def stated_family(recipe: Recipe) -> Family | None:
    """The family with the recipe's own model config, or with its rate of temporal ids where the config lies elsewhere;
    None where the recipe states neither.

    Raises:
        RecipeError: the family has no such setting.
        ModelError: the recipe's own config is of another model, or sizes in it are missing or no numbers.
    """
    stated, rate = recipe.model.config, recipe.model.tokens_per_second
    if rate is None and not isinstance(stated, dict):
        return None
    config: Mapping[str, Any] = stated if isinstance(stated, dict) else {"model_type": recipe.family}
    return load_family(recipe.family, config, tokens_per_second=rate)


def stage_cautions(family: Family, pixels: Pixels) -> list[tuple[str, str]]:
    """(field of the stage, message)."""
    if not (rates := [fps for fps in pixels.fps if rows_share_ids(family, fps)]):
        return []
    shown = ", ".join(f"{fps:g}" for fps in rates)
    most = family.temporal_patch_size * family.tokens_per_second
    message = (
        f"at {shown} frames a second neighbouring rows of a video's grid share a temporal id, so the model takes them "
        f"for one moment: {family.name} has {family.tokens_per_second:g} ids a second; use at most {most:g} frames a "
        "second"
    )
    return [("pixels.fps", message)]


def rows_share_ids(family: Family, fps: float) -> bool:
    """Whether two rows of a video's grid that follow each other get the same position ids at this frame rate; False for
    a family without video, or one that shows each row on its own with its time."""
    size = family.temporal_patch_size
    side = family.patch_size * family.merge_size
    try:
        pieces = family.media_pieces(Shown("video", 0, 1, "chat", (0.0, size / fps)))
        grid = family.video_grid(2 * size, side, side, min_pixels=1, max_pixels=side**2, total_pixels=2 * side**2)
    except ValueError:
        return False
    if any(piece.row >= 0 for piece in pieces):
        return False
    tokens = family.visual_tokens(grid)
    span = Span("video", 0, tokens, grid=grid, seconds_per_grid=size / fps)
    first, second = family.position_ids([span])[1:].reshape(3, grid.t, -1).transpose(1, 0, 2)
    return bool((first == second).all())
