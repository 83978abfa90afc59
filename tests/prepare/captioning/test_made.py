"""Captions of long videos: frames, segments, groups, by a scripted endpoint; recorded, resumed, planned, encoded."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.prepare.captioning.levels import Part, events, groups, segments
from pipelines.prepare.captioning.made import DESCRIBE, make
from pipelines.prepare.corpus.draw import encode_video
from pipelines.prepare.describe import describe
from pipelines.prepare.formats.rows import MediaRef
from pipelines.prepare.resumable import Unfinished
from pipelines.prepare.stored import problems
from tests.prepare.builders import a_recipe, a_source
from tests.prepare.curate.test_scores import Server, server
from tests.prepare.through import trained
from trainer import storage
from trainer.after import completions
from trainer.data.sample import Media, Objects, Sample, Span
from trainer.data.shards import ShardReader, ShardWriter, Source
from trainer.errors import DataError, RecipeError
from trainer.recipe import Recipe

__all__ = ["server"]  # the fixture
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
LENGTH_S = 1860
"""31 minutes, 620 s of each colour."""
Made = tuple[Sample, list[bytes]]


@pytest.fixture(scope="module")
def film() -> bytes:
    frames = [Image.new("RGB", (64, 48), colour) for colour in COLOURS.values() for _ in range(LENGTH_S // 3)]
    return encode_video(frames, 1)


def a_video(data: bytes, identity: str = "film", **changes: Any) -> Made:
    found: Media = describe(data, MediaRef(f"{identity}.mp4", "video"))
    asked = {"role": "user", "parts": [{"part": "video", "media": 0}, {"part": "text", "text": "What is it?"}]}
    said = {"role": "assistant", "parts": [{"part": "text", "text": "A film."}]}
    facts = {
        "id": identity,
        "source": "films",
        "kind": "video",
        "messages": [asked, said],
        "media": [found.model_dump()],
    }
    return Sample.model_validate({**facts, **changes}), [data]


def stored(out: Path, made: list[Made]) -> None:
    uri = storage.join(str(out), "data", "sources", "films", "train")
    storage.remove_tree(uri)
    writer = ShardWriter(uri, shard_bytes=10**7)
    for sample, files in made:
        writer.add(sample, files)
    writer.close(source="films", split="train")


def asked(server: Server, **more: Any) -> Recipe:
    judge = {"url": server.url, "model": "m", "concurrency": 4, "max_failed": 0.05, **more.pop("judge", {})}
    settings = {"judge": judge, "frames_per_segment": 4, **more}
    films = a_source("captions", "unread.json", kind="video").model_dump(mode="json", exclude_none=True)
    captioned = {"format": "video_captions", "path": "source://films", "kind": "video", "rendering": "chat"}
    sources = json.dumps({"mine": films, "films": films, "captioned": {**captioned, "captioning": settings}})
    return a_recipe(a_source("captions"), f"prepare.sources={sources}")


def told(body: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")


def shown(body: dict[str, Any]) -> str | None:
    """The colour of the frame that is sent."""
    urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    if not urls:
        return None
    picture = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2]))).convert("RGB")
    pixel: Any = picture.getpixel((picture.width // 2, picture.height // 2))
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))


def watches(body: dict[str, Any], number: int = 0) -> tuple[int, str]:
    """An endpoint that looks: the colour of a frame, else the colours of the captions that it is given, in order."""
    colour = shown(body)
    if colour is not None:
        return 200, json.dumps({"caption": f"The screen is {colour}."})
    seen = dict.fromkeys(re.findall("|".join(COLOURS), told(body)))
    return 200, json.dumps({"caption": f"It is {', then '.join(seen)}."})


def the_sample(out: Path) -> Made:
    source = Source.open(storage.join(str(out), "data", "sources", "captioned", "train"))
    assert not list(problems(source)) and source.num_samples == 1
    return source.sample(0, 0), list(ShardReader(source).media(0, 0))


def test_a_video_of_31_minutes_has_captions_at_every_level_with_their_times(
    tmp_path: Path, server: Server, film: bytes
):
    stored(tmp_path, [a_video(film)])
    server.script = watches
    found = make(asked(server), str(tmp_path), "captioned")["train"]
    assert found["made"] == {"captions above": 3, "captions of segments": 16} and found["kept"] == 1
    assert found["judge"]["asked"] == 64 + 16 + 2 + 1
    sample, _ = the_sample(tmp_path)
    [question, whole, _, listed] = sample.messages
    assert question.parts[1].text == DESCRIBE and whole.parts[0].text == "It is red, then green, then blue."  # type: ignore[union-attr]
    [objects] = listed.parts
    assert isinstance(objects, Objects) and len(objects.objects) == 16
    for thing in objects.objects:
        assert isinstance(thing.at, Span)
        colours = [
            name for at, name in enumerate(COLOURS) if at * 620 < thing.at.end_s and thing.at.start_s < (at + 1) * 620
        ]
        assert set(re.findall("|".join(COLOURS), thing.label)) <= set(colours) and thing.label.startswith("It is")
    ends = [(thing.at.start_s, thing.at.end_s) for thing in objects.objects if isinstance(thing.at, Span)]
    assert ends[0][0] == 0 and ends[-1][1] == sample.media[0].duration_s == LENGTH_S
    assert all(before[1] == after[0] and after[1] - after[0] <= 120 for before, after in pairwise(ends))
    assert sample.meta["from"] == "films/film" and sample.meta["captions"] == "judge m"


def test_requests_say_what_time_it_is_and_levels_are_built_on_each_other(tmp_path: Path, server: Server, film: bytes):
    stored(tmp_path, [a_video(film)])
    server.script = watches
    make(asked(server), str(tmp_path), "captioned")
    bodies = server.asked()
    frames = sorted(told(body) for body in bodies if shown(body))
    assert frames[0] == "The frame at 00:00:14." and frames[-1] == "The frame at 00:30:45."
    texts = [told(body) for body in bodies if not shown(body)]
    first = next(text for text in texts if text.startswith("From 00:00:00 to 00:01:56:"))
    assert first.splitlines()[1] == "00:00:14: The screen is red." and len(first.splitlines()) == 5
    halves = [text for text in texts if len(text.splitlines()) == 9]
    assert [text.splitlines()[0] for text in sorted(halves)] == [
        "From 00:00:00 to 00:15:30:",
        "From 00:15:30 to 00:31:00:",
    ]
    assert sorted(halves)[0].splitlines()[1] == "00:00:00 - 00:01:56: It is red."
    assert texts[-1].splitlines()[0] == "From 00:00:00 to 00:31:00:" and len(texts[-1].splitlines()) == 3


def test_a_record_answers_instead_of_the_endpoint(tmp_path: Path, server: Server, film: bytes):
    stored(tmp_path, [a_video(film)])
    server.script = watches
    make(asked(server), str(tmp_path), "captioned")
    before, count = the_sample(tmp_path), len(server.bodies)
    make(asked(server), str(tmp_path), "captioned")
    assert len(server.bodies) == count, "it is there"
    storage.remove_tree(str(tmp_path / "data" / "sources" / "captioned"))
    found = make(asked(server), str(tmp_path), "captioned")["train"]
    assert the_sample(tmp_path) == before and len(server.bodies) == count
    assert found["judge"] == {"asked": 0, "recorded": 83, "malformed": 0, "unanswered": 0, "failed": 0}
    make(asked(server, segment_s=620.0), str(tmp_path), "captioned")
    assert len(server.asked()) > 83, "negative control: other segments are asked about"
    sample, _ = the_sample(tmp_path)
    labels = [thing.label for part in sample.messages[3].parts if isinstance(part, Objects) for thing in part.objects]
    assert labels == ["It is red.", "It is green.", "It is blue."]


def test_an_endpoint_that_goes_away_is_an_error_and_the_next_run_asks_for_the_rest(
    tmp_path: Path, server: Server, film: bytes
):
    stored(tmp_path, [a_video(film)])
    server.script = lambda body, number: watches(body) if number < 30 else (400, "gone")
    with pytest.raises(DataError, match="no answer came for"):
        make(asked(server), str(tmp_path), "captioned")
    assert not storage.exists(storage.join(str(tmp_path), "data", "sources", "captioned", "train", "source.json"))
    server.script = watches
    found = make(asked(server), str(tmp_path), "captioned")["train"]
    assert found["judge"]["recorded"] >= 30 and found["judge"]["asked"] + found["judge"]["recorded"] == 83


def test_an_endpoint_that_goes_away_costs_no_whole_shard(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Three videos, a shard each: the endpoint goes away in the third one, and is not there when it is run again."""
    no_wait = {**(completions.request.__kwdefaults__ or {}), "sleep": lambda s: None}
    monkeypatch.setattr(completions.request, "__kwdefaults__", no_wait)
    films = [encode_video([Image.new("RGB", (64, 48), colour)] * 60, 1) for colour in COLOURS.values()]
    for out in (tmp_path, tmp_path / "whole"):
        stored(out, [a_video(data, name) for name, data in zip(COLOURS, films, strict=True)])

    def recipe(**judge: Any) -> Recipe:
        found = asked(server, min_duration_s=30.0, segment_s=60.0, frames_per_segment=2, judge=judge)
        return found.model_copy(update={"prepare": found.prepare.model_copy(update={"shard_bytes": 1000})})

    server.script = watches
    want = make(recipe(), str(tmp_path / "whole"), "captioned")["train"]
    server.script = lambda body, number: (400, "gone") if shown(body) == "blue" else watches(body)
    with pytest.raises(Unfinished, match="no answer came for") as error:
        make(recipe(), str(tmp_path), "captioned")
    assert error.value.code == 64
    folder = tmp_path / "data" / "sources" / "captioned" / "train"
    [tar] = (folder / ".tmp-new").glob("*.tar")
    written = tar.stat().st_ino
    assert "1 whole shards with 1 samples stay; the same command goes on after them" in capsys.readouterr().out
    with pytest.raises(Unfinished, match="judge does not answer"):
        make(recipe(url="http://127.0.0.1:9/v1"), str(tmp_path), "captioned")
    assert tar.stat().st_ino == written
    server.script = watches
    found = make(recipe(), str(tmp_path), "captioned")["train"]
    assert "goes on after 1 samples, in whole shards already" in capsys.readouterr().out
    assert {**found, "judge": None} == {**want, "judge": None} and found["kept"] == 3
    assert (folder / tar.name).stat().st_ino == written, "it is not written again"
    other = tmp_path / "whole" / "data" / "sources" / "captioned" / "train"
    names = [path.name for path in folder.iterdir() if path.name != "input.json"]
    assert len(names) >= 7 and all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def broken(where: Callable[[str], bool]) -> Callable[[dict[str, Any], int], tuple[int, str]]:
    return lambda body, number: (200, "I cannot say.") if where(told(body)) else watches(body)


def test_a_frame_without_a_caption_is_left_out_and_a_segment_costs_the_video(
    tmp_path: Path, server: Server, film: bytes
):
    stored(tmp_path, [a_video(film)])
    server.script = broken(lambda text: text == "The frame at 00:00:14.")
    found = make(asked(server), str(tmp_path), "captioned")["train"]
    assert (found["judge"]["failed"], found["judge"]["malformed"], found["kept"]) == (1, 3, 1)
    first = next(told(body) for body in server.asked() if told(body).startswith("From 00:00:00 to 00:01:56:"))
    assert len(first.splitlines()) == 4
    storage.remove_tree(str(tmp_path / "data" / "answers"))
    server.script = broken(lambda text: text.startswith("From 00:00:00 to 00:01:56:"))
    with pytest.raises(DataError, match="no video was captioned") as error:
        make(asked(server, frames_per_segment=3), str(tmp_path), "captioned")
    assert "1 without-caption" in str(error.value)
    server.script = broken(lambda text: text.startswith("The frame"))
    with pytest.raises(DataError, match="too many captions without a valid answer"):
        make(asked(server, frames_per_segment=5), str(tmp_path), "captioned")


def test_a_video_that_cannot_be_decoded_is_left_out_and_is_no_fault_of_the_endpoint(
    tmp_path: Path, server: Server, film: bytes
):
    """prepare.verify_media: header lets it through."""
    server.script = watches
    damaged = film[: len(film) // 4] + bytes(len(film) - len(film) // 4)
    sample, _ = a_video(film, "damaged")
    facts = {"digest": hashlib.sha256(damaged).hexdigest(), "size_bytes": len(damaged)}
    stored(
        tmp_path,
        [(sample.model_copy(update={"media": (sample.media[0].model_copy(update=facts),)}), [damaged]), a_video(film)],
    )
    found = make(asked(server), str(tmp_path), "captioned")["train"]
    assert (found["kept"], found["bad"], found["judge"]["failed"]) == (1, {"damaged-media": 1}, 0)
    assert found["examples"] == ["films/damaged: damaged-media: the video cannot be decoded"]


def test_short_videos_and_other_samples_are_counted(tmp_path: Path, server: Server, film: bytes):
    server.script = watches
    short = encode_video([Image.new("RGB", (64, 48), "red")] * 30, 1)
    words = {"role": "document", "parts": [{"part": "text", "text": "words"}]}
    stored(
        tmp_path, [a_video(short, "short"), a_video(film), (a_video(film, "text", messages=[words], media=[])[0], [])]
    )
    found = make(asked(server), str(tmp_path), "captioned")["train"]
    assert (found["read"], found["kept"], found["bad"]) == (3, 1, {"not-one-video": 1, "short": 1})


def test_what_is_written_reaches_the_tokens_with_its_times(tmp_path: Path, server: Server, film: bytes):
    stored(tmp_path, [a_video(film)])
    server.script = watches
    make(asked(server), str(tmp_path), "captioned")
    for found in trained(*the_sample(tmp_path), tmp_path / "through"):
        assert "It is red, then green, then blue." in found.targets
        seconds, clocks = re.search(r"116\.25?", found.targets), re.search("00:01:56", found.targets)
        assert seconds or clocks, found.targets


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("duration", [1800.0, 1800.1, 36_000.0, 59.9])
def test_segments_cover_the_video_and_are_not_too_long(duration: float):
    found = segments(duration, 120.0)
    assert found[0][0] == 0 and found[-1][1] == duration and max(end - start for start, end in found) <= 120 + 1e-9
    assert all(before[1] == after[0] for before, after in pairwise(found))


@pytest.mark.parametrize(("num", "most"), [(1, 8), (8, 8), (9, 8), (300, 8), (300, 2)])
def test_groups_are_of_like_size_and_end_in_one(num: int, most: int):
    sizes = [end - begin for begin, end in groups(num, most)]
    assert sum(sizes) == num and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    while num > 1:
        assert len(groups(num, most)) < num
        num = len(groups(num, most))


def test_the_events_are_of_the_finest_level_that_is_not_too_long():
    levels = [[Part(n, n + 1, "x") for n in range(size)] for size in (300, 38, 5, 1)]
    assert [len(events(levels, most)) for most in (300, 299, 40, 5, 1)] == [300, 38, 38, 5, 1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"judge": {"answers": 2}}, "one caption is used"),
        ({"combined": 1}, "combined"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_field(change: dict[str, Any], told: str, server: Server):
    with pytest.raises(RecipeError, match=told):
        asked(server, **change)


def test_only_other_sources_can_be_captioned(server: Server):
    recipe = asked(server)
    for name, changes, message in (
        ("path", {"path": "source://gone"}, "no such source"),
        ("kind", {"kind": "caption"}, "kind video"),
    ):
        content = recipe.model_dump(mode="json")
        content["prepare"]["sources"]["captioned"] |= changes
        with pytest.raises(ValueError, match=message):
            Recipe.model_validate(content)
        assert name in changes
