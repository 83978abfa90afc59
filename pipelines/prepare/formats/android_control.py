"""AndroidControl (arXiv 2406.03679), an episode an entry, with the fields of its TFRecords: {"episode_id", "goal",
"screenshots": [path], "screenshot_widths", "screenshot_heights", "actions": [{"action_type", ...}],
"step_instructions"}. Actions are mapped by actions.py; a step's instruction is written before its call. Coordinates
are pixels of the stated screenshot sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats import actions, agent
from pipelines.prepare.formats.rows import BadRow, Draft, Row, each, field_of
from trainer.recipe import Source


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        listed, screens = field_of(entry, "actions"), field_of(entry, "screenshots")
        if not listed or len(screens) not in (len(listed), len(listed) + 1):
            raise BadRow("wrong-form", f"{len(listed)} screenshots for as many actions, or one more", len(screens))
        sizes = list(zip(field_of(entry, "screenshot_widths"), field_of(entry, "screenshot_heights"), strict=True))
        if len(sizes) != len(screens):
            raise BadRow("wrong-form", f"a width and height for each of {len(screens)} screenshots", len(sizes))
        steps = [actions.android_control(action, size) for action, size in zip(listed, sizes, strict=False)]
        for step, thought in zip(steps, entry.get("step_instructions") or [], strict=False):
            step["thought"] = thought
        if len(screens) > len(listed) and steps[-1]["action"] != "terminate":
            steps.append(actions.terminate("success"))
        for step, screen in zip(steps, screens, strict=False):
            step["screenshot"] = screen
        episode = {"instruction": field_of(entry, "goal"), "tool": "mobile_use", "schema": True, "steps": steps}
        messages, media = agent.trajectory(episode, media_root)
        meta = {"stated_sizes": [list(size) for size in sizes[: len(media)]]}
        return Draft(where, str(field_of(entry, "episode_id")), messages, media, meta=meta)

    yield from each(path, one)
