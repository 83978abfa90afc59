"""Agent data of others: traces into the one action space, trees of elements into captions and grounding."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.prepare.corpus.screens import SCREENS
from pipelines.prepare.formats import actions
from pipelines.prepare.formats.rows import Bad, BadRow
from tests.prepare.builders import a_picture, write_lines
from tests.prepare.through import Trained, made, only, read, trained
from trainer.data.render import ACTIONS
from trainer.data.sample import Action, Box, Objects, Sample

PHONE = (270, 600)


def actions_of(sample: Sample) -> list[tuple]:
    """(medium, action, arguments, coordinates) of every call."""
    parts = [part for message in sample.messages for part in message.parts if isinstance(part, Action)]
    return [(part.media, part.action, part.arguments, part.coordinates) for part in parts]


def calls(found: Trained) -> list[dict]:
    """The tool calls that the model learns to write."""
    return [json.loads(call) for call in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", found.targets)]


def screens(folder: Path, count: int, size: tuple[int, int] = PHONE) -> list[str]:
    for number in range(count):
        (folder / f"s{number}.png").write_bytes(a_picture(*size))
    return [f"s{number}.png" for number in range(count)]


def android_episode(folder: Path, *listed: dict, **changes) -> dict:
    """The fields of AndroidControl's TFRecords; sizes are those that coordinates are in: twice the files'."""
    shown = screens(folder, len(listed) + 1)
    episode = {"episode_id": 7, "goal": "Set an alarm", "screenshots": shown, "actions": list(listed)}
    sizes = {"screenshot_widths": [540] * len(shown), "screenshot_heights": [1200] * len(shown)}
    return {**episode, **sizes, "step_instructions": ["Do it."] * len(listed), **changes}


ANDROID = (
    {"action_type": "open_app", "app_name": "Clock"},
    {"action_type": "click", "x": 100, "y": 300},
    {"action_type": "long_press", "x": 540, "y": 1200},
    {"action_type": "scroll", "direction": "down"},
    {"action_type": "input_text", "text": "7:30"},
    {"action_type": "navigate_back"},
    {"action_type": "wait"},
)
ANDROID_CALLS = [
    (0, "open", {"text": "Clock"}, {}),
    (1, "click", {}, {"coordinate": (50, 150)}),
    (2, "long_press", {"time": 2}, {"coordinate": (270, 600)}),
    (3, "swipe", {}, {"coordinate": (135, 450), "coordinate2": (135, 150)}),
    (4, "type", {"text": "7:30"}, {}),
    (5, "system_button", {"button": "Back"}, {}),
    (6, "wait", {"time": 2}, {}),
    (7, "terminate", {"status": "success"}, {}),
]
"""What actions_of finds of it."""


def test_an_episode_of_android_control_becomes_calls_with_coordinates_in_the_files_pixels(tmp_path: Path):
    path = write_lines(tmp_path / "episodes.jsonl", [android_episode(tmp_path, *ANDROID)])
    sample, files = only(read("android_control", path), "agent")
    assert (sample.id, len(files)) == ("7", 8)
    assert actions_of(sample) == ANDROID_CALLS
    for found in trained(sample, files, tmp_path / f"{0}"):
        written = calls(found)
        width, height = found.grids[3]
        assert [call["name"] for call in written] == ["mobile_use"] * 8
        assert found.targets.count("Do it.\n<tool_call>") == 7
        swipe = written[3]["arguments"]
        assert swipe["coordinate"] == [round(width / 2), round(height * 0.75)]
        assert swipe["coordinate2"] == [round(width / 2), round(height * 0.25)]
        assert all(call["arguments"]["action"] in ACTIONS["mobile_use"] for call in written)


@pytest.mark.parametrize(
    ("action", "reason", "got"),
    [
        ({"action_type": "double_tap", "x": 1, "y": 1}, "unmapped-action", "double_tap"),
        ({"action_type": "scroll", "direction": "forward"}, "unmapped-action", "scroll forward"),
        ({"action_type": "status", "goal_status": "asked"}, "unmapped-action", "status asked"),
        ({"action_type": "click", "x": 5}, "wrong-form", "fields"),
        ({"action_type": "click", "x": 5, "y": 5000}, "outside-picture", "2500"),
    ],
)
def test_an_action_without_a_place_in_the_space_is_a_bad_row_with_its_name(tmp_path, action, reason, got):
    path = write_lines(tmp_path / "episodes.jsonl", [android_episode(tmp_path, action)])
    [bad] = made(read("android_control", path), "agent")
    assert isinstance(bad, Bad) and bad.reason == reason and got in bad.got and "line 1" in bad.where


def test_an_episode_that_lacks_a_screenshot_is_bad_and_one_of_another_shape_as_well(tmp_path: Path):
    short = android_episode(tmp_path, *ANDROID, screenshots=["s0.png"])
    wide = android_episode(tmp_path, *ANDROID, screenshot_widths=[1200] * 8, screenshot_heights=[540] * 8)
    rows = made(read("android_control", write_lines(tmp_path / "e.jsonl", [short, wide])), "agent")
    assert [row.reason for row in rows if isinstance(row, Bad)] == ["wrong-form", "outside-picture"]


def aitw_steps(folder: Path, *listed: dict, episode: str = "e1") -> list[dict]:
    shown = screens(folder, len(listed))
    facts = {"episode_id": episode, "episode_length": len(listed), "goal_info": "Open the news"}
    return [{**facts, "step_id": n, "image": shown[n], **step} for n, step in enumerate(listed)]


def gesture(touch: tuple[float, float], lift: tuple[float, float]) -> dict:
    return {"results/action_type": 4, "results/yx_touch": list(touch), "results/yx_lift": list(lift)}


AITW = (
    gesture((0.5, 0.2), (0.51, 0.2)),
    gesture((0.8, 0.5), (0.2, 0.5)),
    {"results/action_type": 3, "results/type_action": "news"},
    {"results/action_type": 7},
    {"results/action_type": 11},
)
AITW_CALLS = [
    (0, "click", {}, {"coordinate": (54, 300)}),
    (1, "swipe", {}, {"coordinate": (135, 480), "coordinate2": (135, 120)}),
    (2, "type", {"text": "news"}, {}),
    (3, "system_button", {"button": "Enter"}, {}),
    (4, "terminate", {"status": "failure"}, {}),
]


def test_steps_of_aitw_become_one_trajectory_with_points_as_x_y(tmp_path: Path):
    path = write_lines(tmp_path / "steps.jsonl", aitw_steps(tmp_path, *AITW))
    sample, files = only(read("aitw", path), "agent")
    assert actions_of(sample) == AITW_CALLS
    for found in trained(sample, files, tmp_path):
        width, height = found.grids[0]
        assert calls(found)[0]["arguments"]["coordinate"] == [round(0.2 * width), round(0.5 * height)]


def test_episodes_of_aitw_may_be_named_ep_id(tmp_path: Path):
    steps = [*aitw_steps(tmp_path, *AITW, episode="e1"), *aitw_steps(tmp_path, *AITW, episode="e2")]
    named = [{("ep_id" if name == "episode_id" else name): value for name, value in step.items()} for step in steps]
    rows = made(read("aitw", write_lines(tmp_path / "steps.jsonl", named)), "agent")
    assert [row[0].id for row in rows if not isinstance(row, Bad)] == ["e1", "e2"]


def test_aitw_bad_steps_cost_their_episode_and_no_other(tmp_path: Path):
    good = aitw_steps(tmp_path, *AITW[:2], episode="good")
    unknown = aitw_steps(tmp_path, {"results/action_type": 2}, episode="unknown")
    gap = [aitw_steps(tmp_path, *AITW, episode="gap")[n] for n in (0, 2, 3)]
    rows = made(read("aitw", write_lines(tmp_path / "s.jsonl", [*gap, *unknown, "{", *good, {"x": 1}])), "agent")
    assert [row.reason if isinstance(row, Bad) else row[0].id for row in rows] == [
        "wrong-order", "unmapped-action", "bad-json", "good", "wrong-form",
    ]  # fmt: skip
    assert isinstance(rows[1], Bad) and rows[1].got == "2" and rows[1].where.endswith("line 4")


def element(rect: str, **more) -> str:
    """A candidate as Multimodal-Mind2Web stores it: JSON text with JSON text inside."""
    attributes = json.dumps({"backend_node_id": "1", "bounding_box_rect": rect})
    return json.dumps({"tag": "a", "attributes": attributes, **more})


def web_action(op: str, original: str = "", value: str = "", *candidates: str) -> dict:
    operation = json.dumps({"op": op, "original_op": original or op, "value": value})
    facts = {"annotation_id": "a1", "confirmed_task": "Book a table", "screenshot": "s0.png"}
    return {**facts, "operation": operation, "pos_candidates": list(candidates)}


BOXED = element("20,40,100,20", is_original_target=True)
MIND2WEB = (
    web_action("CLICK", "HOVER", "", element("0,0,10,10", is_original_target=False), BOXED),
    web_action("CLICK", "CLICK", "", element("-1,-1,-1,-1", is_original_target=True), element("10,10,20,20")),
    web_action("TYPE", "TYPE", "Rome", BOXED),
    web_action("SELECT", "SELECT", "2 people", BOXED),
    web_action("CLICK", "ENTER", "", BOXED),
)
_MIDDLE = {"coordinate": (70, 50)}
MIND2WEB_CALLS = [
    (0, "mouse_move", {}, _MIDDLE),
    (1, "left_click", {}, {"coordinate": (20, 20)}),
    (2, "left_click", {}, _MIDDLE),
    (2, "type", {"text": "Rome"}, {}),
    (3, "left_click", {}, _MIDDLE),
    (3, "type", {"text": "2 people"}, {}),
    (3, "key", {"keys": ["enter"]}, {}),
    (4, "key", {"keys": ["enter"]}, {}),
]


def test_operations_of_mind2web_become_calls_of_computer_use(tmp_path: Path):
    screens(tmp_path, 1, (300, 200))
    sample, files = only(read("mind2web", write_lines(tmp_path / "actions.jsonl", MIND2WEB)), "agent")
    assert sample.id == "a1" and actions_of(sample) == MIND2WEB_CALLS
    for found in trained(sample, files, tmp_path):
        width, height = found.grids[0]
        assert calls(found)[0]["arguments"]["coordinate"] == [round(70 * width / 300), round(50 * height / 200)]
        assert len(calls(found)) == 8


def test_a_whole_episode_of_mind2web_is_the_same_sample(tmp_path: Path):
    screens(tmp_path, 1, (300, 200))
    whole = {"annotation_id": "a1", "confirmed_task": "Book a table", "actions": list(MIND2WEB)}
    lines = only(read("mind2web", write_lines(tmp_path / "lines.jsonl", MIND2WEB)), "agent")
    assert only(read("mind2web", write_lines(tmp_path / "whole.jsonl", [whole])), "agent") == lines


@pytest.mark.parametrize(
    ("action", "reason", "got"),
    [
        (web_action("COPY", "COPY", "", BOXED), "unmapped-action", "COPY"),
        (web_action("CLICK", "CLICK", "", element("-1,-1,-1,-1")), "no-target", "none of its candidates"),
        (web_action("CLICK"), "no-target", "none of its candidates"),
        (web_action("SELECT", "SELECT", "", BOXED), "wrong-form", "''"),
        ({**web_action("CLICK"), "operation": "{"}, "wrong-form", "JSONDecodeError"),
    ],
)
def test_a_web_action_that_cannot_be_placed_is_a_bad_row(tmp_path, action, reason, got):
    screens(tmp_path, 1, (300, 200))
    [bad] = made(read("mind2web", write_lines(tmp_path / "a.jsonl", [action])), "agent")
    assert isinstance(bad, Bad) and bad.reason == reason and got in bad.got


@pytest.mark.parametrize("numbers", [[2, 0, 1], ["0", "2", "3"], [0, None, 2], ["1", "2", "3"], [0, 1, 1]])
def test_web_actions_out_of_order_cost_their_episode_and_no_other(tmp_path: Path, numbers: list):
    screens(tmp_path, 1, (300, 200))
    good = [{**action, "annotation_id": "a2", "target_action_index": str(n)} for n, action in enumerate(MIND2WEB[:3])]
    bad = [{**action, "target_action_index": n} for n, action in zip(numbers, MIND2WEB[:3], strict=True)]
    rows = made(read("mind2web", write_lines(tmp_path / "a.jsonl", [*bad, *good])), "agent")
    assert isinstance(rows[0], Bad) and rows[0].reason == "wrong-order" and str(numbers[0]) in rows[0].got
    assert len(rows) == 2 and not isinstance(rows[1], Bad) and rows[1][0].id == "a2"


def test_the_mapping_table_names_no_action_outside_the_space():
    size = (100, 100)
    mobile = [{"action_type": name} for name in (*actions.BUTTONS, "wait")]
    mobile += [{"action_type": "scroll", "direction": name} for name in actions.SCROLLS]
    assert {actions.android_control(item, size)["action"] for item in mobile} <= set(ACTIONS["mobile_use"])
    for name in ("CLICK", "HOVER", "TYPE", "SELECT", "ENTER"):
        step = actions.mind2web(name, "x", [1.0, 1.0])
        assert {call["action"] for call in (step, *step.get("then", ()))} <= set(ACTIONS["computer_use"])
    with pytest.raises(BadRow, match=r"unmapped-action.*'DRAG'"):
        actions.mind2web("DRAG", "", [1.0, 1.0])


def test_a_scroll_moves_the_finger_the_other_way():
    ends = {
        name: actions.android_control({"action_type": "scroll", "direction": name}, (100, 200))
        for name in actions.SCROLLS
    }
    found = {name: (step["coordinate"], step["coordinate2"]) for name, step in ends.items()}
    assert found == {
        "down": ([50, 150], [50, 50]),
        "up": ([50, 50], [50, 150]),
        "right": ([75, 100], [25, 100]),
        "left": ([25, 100], [75, 100]),
    }


# ---------------------------------------------------------------- trees of elements

DUMP = """<?xml version='1.0' encoding='UTF-8' standalone='yes' ?>
<hierarchy rotation="0">
<node index="0" text="" class="android.widget.FrameLayout" content-desc="" clickable="false" bounds="[0,0][540,1200]">
 <node text="Alarms" class="android.widget.TextView" content-desc="" clickable="false" bounds="[20,40][220,100]" />
 <node text="" class="android.widget.ImageButton" content-desc="Add &amp; edit" clickable="true"
  bounds="[440,1080][520,1160]" />
 <node text="" class="android.view.ViewGroup" content-desc="" clickable="true" bounds="[0,200][540,320]">
  <node text="7:30" class="android.widget.TextView" content-desc="" clickable="false" bounds="[20,210][200,260]" />
  <node text="Mon, Tue" class="android.widget.TextView" content-desc="" clickable="false" bounds="[20,260][200,310]" />
 </node>
 <node text="secret" class="android.widget.EditText" content-desc="" password="true" bounds="[0,400][540,460]" />
 <node text="Name" class="android.widget.EditText" content-desc="" clickable="true" bounds="[0,500][540,560]" />
 <node text="Below" class="android.widget.Button" content-desc="" clickable="true" bounds="[0,1180][540,1260]" />
 <node text="Gone" class="android.widget.Button" content-desc="" clickable="true" bounds="[0,1300][540,1360]" />
 <node text="Flat" class="android.widget.Button" content-desc="" clickable="true" bounds="[0,600][0,660]" />
</node></hierarchy>"""


def placed(sample: Sample) -> list[tuple]:
    [part] = [part for message in sample.messages for part in message.parts if isinstance(part, Objects)]
    assert all(isinstance(item.at, Box) for item in part.objects)
    return [(item.label, item.role, item.at.xyxy) for item in part.objects]  # type: ignore[union-attr]


def boxes_come_back(sample: Sample, files: list[bytes], folder: Path) -> None:
    """Every box that the model learns to write, turned back into pixels of the file, within a pixel."""
    media = sample.media[0]
    for found in trained(sample, files, folder):
        written = json.loads(found.targets[found.targets.index("[{") :].splitlines()[0])
        width, height = found.grids[0]
        step = max(1.0, media.width / width / 2 + 1e-9, media.height / height / 2 + 1e-9)
        for entry, (label, role, box) in zip(written, placed(sample), strict=True):
            assert (entry["label"], entry["role"]) == (label, role)
            scale = (media.width / width, media.height / height)
            back = [value * scale[place % 2] for place, value in enumerate(entry["bbox_2d"])]
            assert max(abs(one - other) for one, other in zip(back, box, strict=True)) <= step


def test_a_view_hierarchy_becomes_a_caption_and_boxes_in_the_screenshots_pixels(tmp_path: Path):
    (tmp_path / "alarms.xml").write_text(DUMP)
    (tmp_path / "alarms.png").write_bytes(a_picture(*PHONE))  # half of what the bounds are in
    sample, files = only(read("uiautomator", tmp_path / "alarms.xml"), "agent")
    assert placed(sample) == [
        ("Alarms", "text", (10, 20, 110, 50)),
        ("Add & edit", "button", (220, 540, 260, 580)),
        ("7:30 Mon, Tue", "button", (0, 100, 270, 160)),
        ("Name", "input", (0, 250, 270, 280)),
        ("Below", "button", (0, 590, 270, 600)),
    ]
    assert sample.messages[1].parts[0].text == (  # type: ignore[union-attr]
        'A screen with 1 text: "Alarms"; 3 buttons: "Add & edit", "7:30 Mon, Tue", "Below"; 1 input: "Name".'
    )
    boxes_come_back(sample, files, tmp_path)
    (tmp_path / "alarms.png").rename(tmp_path / "alarms.PNG")
    other, _ = only(read("uiautomator", tmp_path / "alarms.xml"), "agent")
    assert placed(other) == placed(sample), "an ending in capitals"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<hierarchy><node", "bad-xml"),
        ("", "bad-xml"),
        ("<html/>", "wrong-form"),
        ("<hierarchy/>", "no-objects"),
        (DUMP.replace("[0,0][540,1200]", "0,0,540,1200"), "wrong-form"),
        (re.sub(r'(text|content-desc)="[^"]*"', r'\1=""', DUMP), "no-objects"),
        (DUMP.replace("[0,0][540,1200]", "[0,0][1200,540]"), "outside-picture"),
    ],
)
def test_a_tree_that_says_nothing_of_its_picture_is_one_bad_row(tmp_path: Path, content: str, reason: str):
    (tmp_path / "alarms.xml").write_text(content)
    (tmp_path / "alarms.png").write_bytes(a_picture(*PHONE))
    [bad] = made(read("uiautomator", tmp_path / "alarms.xml"), "agent")
    assert isinstance(bad, Bad) and bad.reason == reason and "alarms.xml" in bad.where


def test_a_tree_without_its_screenshot_is_a_bad_row(tmp_path: Path):
    (tmp_path / "alarms.xml").write_text(DUMP)
    [bad] = read("uiautomator", tmp_path / "alarms.xml")
    assert isinstance(bad, Bad) and bad.reason == "missing-media" and "alarms.png" in bad.expected


DESKTOP = """<desktop-frame xmlns:cp="https://accessibility.ubuntu.example.org/ns/component"
 xmlns:st="https://accessibility.ubuntu.example.org/ns/state" name="main" cp:screencoord="(0, 0)" cp:size="(640, 400)">
 <application name="gimp"><frame name="GIMP" st:showing="true" cp:screencoord="(10, 20)" cp:size="(600, 300)">
  <push-button name="Save" st:visible="true" st:showing="true" cp:screencoord="(20, 30)" cp:size="(60, 20)" />
  <push-button name="Hidden" st:showing="false" cp:screencoord="(90, 30)" cp:size="(60, 20)" />
  <menu name="File" st:showing="true" cp:screencoord="(-5, 0)" cp:size="(45, 20)"/>
  <entry st:showing="true" cp:screencoord="(20, 60)" cp:size="(200, 24)">report.txt</entry>
  <password-text st:showing="true" cp:screencoord="(20, 90)" cp:size="(200, 24)">hunter2</password-text>
 </frame></application></desktop-frame>"""


def test_a_desktops_tree_becomes_a_caption_and_boxes(tmp_path: Path):
    (tmp_path / "gimp.xml").write_text(DESKTOP)
    (tmp_path / "gimp.png").write_bytes(a_picture(1280, 800))
    sample, files = only(read("accessibility", tmp_path / "gimp.xml"), "agent")
    assert placed(sample) == [
        ("Save", "button", (40, 60, 160, 100)),
        ("File", "menu", (0, 0, 80, 40)),
        ("report.txt", "input", (40, 120, 440, 168)),
    ]
    boxes_come_back(sample, files, tmp_path)
    (tmp_path / "gimp.xml").write_text(DESKTOP.replace("(60, 20)", "60x20"))
    [bad] = read("accessibility", tmp_path / "gimp.xml")
    assert isinstance(bad, Bad) and bad.reason == "wrong-form" and "60x20" in bad.got


def test_pages_of_a_real_browser_become_screens_and_walks(tmp_path: Path):
    recorded = json.loads((SCREENS / "screens.json").read_text())
    rows = made(read("web_dom", SCREENS / "screens.json"), "agent")
    assert len(rows) == len(recorded["screens"]) + len(recorded["walks"])
    assert not [row for row in rows if isinstance(row, Bad) and row.reason != "no-objects"]
    sample, files = rows[0]  # type: ignore[misc]
    first = recorded["screens"][0]["elements"]
    assert placed(sample) == [(item["text"], item["role"], tuple(item["box"])) for item in first]
    boxes_come_back(sample, files, tmp_path / "screen")
    walk, shots = rows[len(recorded["screens"])]  # type: ignore[misc]
    steps = recorded["walks"][0]["steps"]
    assert [found[1] for found in actions_of(walk)] == [step["action"] for step in steps]
    for found in trained(walk, shots, tmp_path / "walk"):
        assert [call["arguments"]["action"] for call in calls(found)] == [step["action"] for step in steps]


def test_a_page_with_faults_costs_that_page(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(a_picture(64, 48))
    item = {"role": "link", "text": "Home", "box": [1, 2, 30, 20]}
    good = {"file": "a.png", "width": 64, "height": 48, "elements": [item]}
    wrong = [{**good, "elements": []}, {**good, "width": 0}, {**good, "elements": [{**item, "box": [1, 2]}]}]
    walks = [{"site": "x", "steps": [{"screen": 9, "action": "left_click", "element": 0}]}]
    (tmp_path / "screens.json").write_text(json.dumps({"screens": [good, *wrong], "walks": walks}))
    rows = made(read("web_dom", tmp_path / "screens.json"), "agent")
    assert [row.reason if isinstance(row, Bad) else "good" for row in rows] == [
        "good", "no-objects", "no-objects", "wrong-form", "wrong-form",
    ]  # fmt: skip
