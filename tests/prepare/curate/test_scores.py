"""The two scorers: statistics, and a judge behind a scripted endpoint; thresholds do not score again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.curate import asking, judge, scores, statistics
from pipelines.prepare.curate.columns import Work
from pipelines.prepare.curate.record import Asked, Given, Record
from pipelines.prepare.curate.step import curate
from tests.prepare.curate.builders import a_document, a_photo, a_recipe, as_file, prose, write_source
from tests.prepare.curate.test_near import kept_ids, photo, undecodable
from trainer import storage
from trainer.after import completions
from trainer.curation import Judge
from trainer.errors import DataError, MediaError

GOOD = {"text_quality": 5, "image_text_relevance": 4, "image_text_complementarity": 3, "information_balance": 2}
BAD = {**GOOD, "text_quality": 1}


# ---------------------------------------------------------------- statistics


def of(text: str, *pictures: bytes, **meta: Any) -> dict[str, float]:
    sample, files = a_document("x", text, pictures, **meta)
    return statistics.scores(sample, files)


def test_prose_is_better_than_repetition_and_boilerplate():
    good = of(prose(1))["text_quality"]
    for bad in ("buy now buy now " * 40, "Accept all cookies\nPrivacy policy\nRead more", "#a ... #b ... " * 20, ""):
        assert of(bad)["text_quality"] < 0.8 * good, bad
    assert good > 0.9


def test_text_that_names_what_the_images_show_is_relevant():
    picture = as_file(photo().resize((200, 200)))
    about = of("An astronaut in an orange suit smiles.", picture, alt="an astronaut in orange")
    apart = of("Quarterly figures rose by nine percent.", picture, alt="an astronaut in orange")
    assert about["image_text_relevance"] > 0.9 > 0.1 > apart["image_text_relevance"]


def test_text_that_only_says_the_alt_text_again_adds_nothing():
    picture = as_file(photo().resize((200, 200)))
    again = of("An astronaut in orange.", picture, tags=["astronaut", "orange"])
    more = of("Eileen Collins commanded two missions to the space station.", picture, tags=["astronaut", "orange"])
    assert again["image_text_complementarity"] < 0.1 < 0.5 < more["image_text_complementarity"]


def test_balance_wants_both():
    picture, flat = as_file(photo().resize((200, 200))), a_flat_picture()
    text = prose(1, 150)
    assert of(text, picture)["information_balance"] > 0.3
    assert of("One.", picture)["information_balance"] < 0.1
    assert of(text, flat)["information_balance"] < 0.1


def a_flat_picture() -> bytes:
    from PIL import Image

    return as_file(Image.new("RGB", (100, 100), (200, 10, 10)))


def test_without_images_only_the_text_has_a_score_and_is_judged():
    found = of(prose(1))
    assert [name for name, value in found.items() if not math.isnan(value)] == ["text_quality"]


ASKED = "{score: {scorer: statistics, min: {text_quality: 0.6, information_balance: 0.15}}}"


def test_scores_are_a_column_and_thresholds_come_later(tmp_path: Path):
    picture = as_file(photo().resize((200, 200)))
    documents = [
        a_document("good", prose(1), [picture]), a_document("spam", "buy now buy now " * 40, [picture]),
        a_document("flat", prose(2), [a_flat_picture()]), a_document("text", prose(3)),
    ]  # fmt: skip
    write_source(tmp_path, documents)
    works = [Work("native") for _ in range(3)]
    found = curate(a_recipe(ASKED), str(tmp_path), works[0])["web"]
    assert kept_ids(tmp_path) == ["good", "text"]
    assert found["dropped"] == {"score.text_quality": 1, "score.information_balance": 1}
    assert works[0].computed == {"score": 4}
    curate(a_recipe("{score: {scorer: statistics, min: {text_quality: 0}}}"), str(tmp_path), works[1])
    assert len(kept_ids(tmp_path)) == 4 and works[1].computed == {}
    write_source(tmp_path, documents[:2])
    curate(a_recipe(ASKED), str(tmp_path), works[2])
    assert works[2].computed == {"score": 2}, "negative control: other shards are scored"


def test_a_picture_that_cannot_be_decoded_leaves_the_text_its_score_and_is_counted(tmp_path: Path):
    documents = [a_document("good", prose(1), [as_file(photo())]), a_document("cut", prose(2), [undecodable(photo())])]
    documents.append(a_document("half", prose(3), [as_file(photo()), undecodable(photo())]))
    write_source(tmp_path, documents)
    found = curate(a_recipe(ASKED), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["good", "cut", "half"] and found["undecodable"] == 2
    values = {sample.id: statistics.scores(sample, files) for sample, files in documents}
    for name in ("cut", "half"):
        told = [criterion for criterion, value in values[name].items() if not math.isnan(value)]
        assert told == ["text_quality"] and values[name]["text_quality"] > 0.9


def test_planted_documents_are_told_apart(tmp_path: Path):
    """Recall and precision of the baseline where form tells: 60 documents of prose, 30 of spam, menus and noise."""
    defects: list[Callable[[int], str]] = [
        lambda n: f"buy {n} now and save " * 30,
        lambda n: "\n".join(["Home", "Read more", "Share on Facebook", "Privacy policy", f"Log in to {n}"] * 3),
        lambda n: " ".join(f"#{n}{k} ... 00{k}" for k in range(40)),
    ]
    documents = [a_document(f"g{n}", prose(n)) for n in range(60)]
    documents += [a_document(f"b{n}", defects[n % 3](n)) for n in range(30)]
    write_source(tmp_path, documents)
    curate(a_recipe("{score: {scorer: statistics, min: {text_quality: 0.75}}}"), str(tmp_path))
    left = kept_ids(tmp_path)
    assert sum(name.startswith("g") for name in left) == 60 and len(left) == 60


# ---------------------------------------------------------------- a scripted endpoint

Script = Callable[[dict[str, Any], int], tuple[int, str]]
"""(body, how many requests came before) -> (code or a word, content)"""


class Server:
    """The one fake: an OpenAI-compatible endpoint that answers as a script says, on loopback."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self.script: Script = lambda body, number: (200, json.dumps(GOOD))
        self.takes_format = False
        self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.answer(self, body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            probe = "ready" in json.dumps(body)
            number = len([one for one in self.bodies if "ready" not in json.dumps(one)])
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        if "response_format" in body and not self.takes_format:
            code, content = 400, "response_format is not supported"
        else:
            code, content = (200, '{"ready": true}') if probe else self.script(body, number)
        finish = "stop"
        if content.endswith("<cut>"):
            content, finish = content.removesuffix("<cut>"), "length"
        data = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}]}).encode()
        with self._lock:
            self._now -= 1
        handler.send_response(200 if code == 0 else code)
        if code == 429:
            handler.send_header("Retry-After", "0.3")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if code == 0 else data)  # 0: the connection ends in the middle

    def asked(self) -> list[dict[str, Any]]:
        """Requests without probes."""
        return [body for body in self.bodies if "ready" not in json.dumps(body)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(asking, "PAUSES_S", ())  # nobody mends the script meanwhile
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def tries_wait(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], None] = lambda s: None) -> None:
    """Between the tries of one request."""
    defaults = completions.request.__kwdefaults__ or {}
    monkeypatch.setattr(completions.request, "__kwdefaults__", {**defaults, "sleep": sleep})


def judged(server: Server, more: str = "", least: str = "text_quality: 0.5", *, allowed: float = 0) -> Any:
    about = f"url: '{server.url}', model: m, concurrency: 4, max_failed: {allowed}{', ' if more else ''}{more}"
    return a_recipe(f"{{score: {{scorer: judge, min: {{{least}}}, judge: {{{about}}}}}}}")


def some_documents(out: Path, num: int = 3) -> None:
    write_source(out, [a_document(f"d{n}", f"{prose(n, 40)} number {n}", [a_photo(n)]) for n in range(num)])


def test_valid_answers_become_scores_and_are_never_asked_for_again(tmp_path: Path, server: Server):
    some_documents(tmp_path)
    server.script = lambda body, number: (200, json.dumps(BAD if "number 1" in json.dumps(body) else GOOD))
    found = curate(judged(server), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["d0", "d2"] and found["dropped"] == {"score.text_quality": 1}
    assert found["judge"] == {"asked": 3, "recorded": 0, "malformed": 0, "failed": 0, "unanswered": 0}
    assert found["examples"]["score.text_quality"][0]["value"] == 0.2
    count = len(server.bodies)
    curate(judged(server, least="text_quality: 0.1"), str(tmp_path))
    assert len(kept_ids(tmp_path)) == 3 and len(server.bodies) == count, "a threshold asks nothing"
    column = next(Path(tmp_path, "data/sources/web/train").glob("*.score-*.parquet"))
    column.unlink()
    found = curate(judged(server), str(tmp_path))["web"]
    assert (
        found["judge"] == {"asked": 0, "recorded": 3, "malformed": 0, "failed": 0, "unanswered": 0}
        and len(server.bodies) == count
    )


def test_the_request_has_the_prompt_the_text_and_the_picture(tmp_path: Path, server: Server):
    some_documents(tmp_path, 1)
    curate(judged(server), str(tmp_path))
    [body] = server.asked()
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    kinds = [part["type"] for part in body["messages"][1]["content"]]
    assert kinds == ["text", "image_url"] and body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:")
    assert "JSON" in body["messages"][0]["content"] and "response_format" not in body and "n" not in body
    assert 0 <= body["seed"] < 2**31


def test_response_format_is_sent_only_where_the_probe_found_it(tmp_path: Path, server: Server):
    server.takes_format = True
    some_documents(tmp_path, 1)
    curate(judged(server), str(tmp_path))
    assert server.asked()[0]["response_format"] == {"type": "json_object"}
    assert len(server.bodies) == 2, "one probe"


def test_an_answer_of_another_form_is_asked_for_again_with_the_next_seed(tmp_path: Path, server: Server):
    some_documents(tmp_path, 1)
    wrong = ['{"text_quality": 9}', f"{json.dumps(GOOD)[:-8]}<cut>", f"Sure! ```json\n{json.dumps(GOOD)}\n```"]
    server.script = lambda body, number: (200, wrong[number])
    found = curate(judged(server), str(tmp_path))["web"]
    assert (
        found["judge"] == {"asked": 3, "recorded": 0, "malformed": 2, "failed": 0, "unanswered": 0}
        and found["kept"] == 1
    )
    assert len({body["seed"] for body in server.asked()}) == 3


def test_a_judge_that_never_gives_the_form_fails_the_step_and_what_it_said_is_recorded(tmp_path: Path, server: Server):
    some_documents(tmp_path, 2)
    server.script = lambda body, number: (200, "I like it.")
    with pytest.raises(DataError, match="without a valid answer") as error:
        curate(judged(server), str(tmp_path))
    assert error.value.code == 64 and "max_failed" in str(error.value)
    assert len(server.asked()) == 2 * asking.NUM_FORMS
    found = curate(judged(server, allowed=1), str(tmp_path))["web"]
    assert found["kept"] == 2 and found["judge"]["failed"] == 2 and found["judge"]["asked"] == 0


def test_too_many_requests_and_a_cut_connection_are_waited_out(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
):
    waits: list[float] = []
    monkeypatch.setattr(completions.time, "sleep", waits.append)
    tries_wait(monkeypatch, waits.append)
    codes = [429, 0, 503, 200]
    server.script = lambda body, number: (codes[number], json.dumps(GOOD))
    some_documents(tmp_path, 1)
    found = curate(judged(server), str(tmp_path))["web"]
    assert found["kept"] == 1 and found["judge"]["asked"] == 1
    assert len(server.asked()) == 4 and len(waits) == 3 and waits[0] >= 0.3, "Retry-After is kept"


def test_slow_answers_run_side_by_side_within_the_bound(tmp_path: Path, server: Server):
    def slow(body: dict[str, Any], number: int) -> tuple[int, str]:
        time.sleep(0.3)
        return 200, json.dumps(GOOD)

    server.script = slow
    some_documents(tmp_path, 12)
    curate(judged(server), str(tmp_path))
    assert 2 <= server.most_at_once <= 4


def test_an_endpoint_that_is_not_there_is_one_error(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    tries_wait(monkeypatch)
    some_documents(tmp_path, 1)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DataError, match="the judge does not answer"):
        curate(judged(server), str(tmp_path))


def test_a_picture_that_cannot_be_decoded_is_no_call_that_failed_however_many_ask_it(tmp_path: Path, server: Server):
    def messages() -> list[dict[str, Any]]:
        raise MediaError("no picture")

    judge = Judge(url=server.url, model="m")
    asked = asking.Asking(judge, Record(str(tmp_path)), lambda text: text, seed=1, field="here")
    assert asked.answers([asking.Request("same", name, messages) for name in ("one", "two")]) == [[], []]
    assert (asked.counts.failed, asked.counts.unanswered) == (2, 0)


def test_blocks_of_answers_beyond_99999_do_not_replace_each_other(tmp_path: Path):
    (tmp_path / "99999.parquet").write_bytes(_a_block(tmp_path, "first"))
    for name in ("second", "third"):
        Record(str(tmp_path)).add({Asked(name, 1, "m"): Given("text", "stop")})
    assert {asked.request for asked in Record(str(tmp_path)).answers} == {"first", "second", "third"}


def _a_block(folder: Path, name: str) -> bytes:
    Record(str(folder / name)).add({Asked(name, 1, "m"): Given("text", "stop")})
    return (folder / name / "00000.parquet").read_bytes()


def test_several_answers_are_several_requests_and_the_median_counts(tmp_path: Path, server: Server):
    some_documents(tmp_path, 1)
    values = [1, 5, 4]
    server.script = lambda body, number: (200, json.dumps({**GOOD, "text_quality": values[number]}))
    found = curate(judged(server, "answers: 3", "text_quality: 0.9"), str(tmp_path))["web"]
    assert found["examples"]["score.text_quality"][0]["value"] == 0.8
    assert len({body["seed"] for body in server.asked()}) == 3


def still_open(folder: Path) -> list[str]:
    """Shards below the folder that this process holds open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return [name for name in found if name.startswith(str(folder)) and name.endswith(".tar")]


def test_an_interrupted_step_asks_only_what_is_missing(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    tries_wait(monkeypatch)
    monkeypatch.setattr(asking, "BLOCK", 2)
    some_documents(tmp_path, 6)
    server.script = lambda body, number: (200 if number < 4 else 400, json.dumps(GOOD))
    with pytest.raises(DataError, match="without a valid answer"):
        curate(judged(server), str(tmp_path))
    server.bodies.clear()
    server.script = lambda body, number: (200, json.dumps(GOOD))
    found = curate(judged(server), str(tmp_path))["web"]
    assert found["judge"]["recorded"] == 4 and found["judge"]["asked"] == 2 == len(server.asked())


def test_a_call_that_failed_is_made_again_when_scores_are_needed_again(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
):
    tries_wait(monkeypatch)
    some_documents(tmp_path, 4)
    server.script = lambda body, number: (400 if "number 1" in json.dumps(body) else 200, json.dumps(BAD))
    found = curate(judged(server, allowed=1), str(tmp_path))["web"]
    assert found["judge"] == {"asked": 4, "recorded": 0, "malformed": 0, "failed": 1, "unanswered": 1}
    assert kept_ids(tmp_path) == ["d1"]
    assert not list(Path(tmp_path, "data/sources/web/train").glob("*.score-*.parquet")), "a hole is not stored"
    server.bodies.clear()
    curate(judged(server, allowed=1), str(tmp_path))
    assert not server.bodies, "the decision stands for as long as nothing else is asked for"
    server.script = lambda body, number: (200, json.dumps(BAD))
    found = curate(judged(server, least="text_quality: 0.6", allowed=1), str(tmp_path))["web"]
    assert (
        len(server.asked()) == 1 and found["judge"]["recorded"] == 3 and found["dropped"] == {"score.text_quality": 4}
    )
    assert list(Path(tmp_path, "data/sources/web/train").glob("*.score-*.parquet"))


def test_a_picture_that_cannot_be_decoded_is_not_judged_and_ends_nothing(tmp_path: Path, server: Server):
    documents = [a_document("good", prose(1), [a_photo(1)]), a_document("cut", prose(2), [undecodable(photo())])]
    write_source(tmp_path, documents)
    found = curate(judged(server, allowed=0.5), str(tmp_path))["web"]
    assert kept_ids(tmp_path) == ["good", "cut"] and len(server.asked()) == 1
    assert found["judge"] == {"asked": 1, "recorded": 0, "malformed": 0, "failed": 1, "unanswered": 0}
    write_source(tmp_path, documents[1:])
    with pytest.raises(DataError, match="cannot be decoded"):
        curate(judged(server), str(tmp_path))


def test_another_model_or_another_text_is_asked_anew(tmp_path: Path, server: Server):
    some_documents(tmp_path, 1)
    curate(judged(server), str(tmp_path))
    curate(judged(server, "revision: two"), str(tmp_path))
    assert len(server.asked()) == 2
    write_source(tmp_path, [a_document("other id", f"{prose(0, 40)} number 0", [a_photo(0)])])
    curate(judged(server), str(tmp_path))
    assert len(server.asked()) == 2, "the same content under another id is the same request"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (json.dumps(GOOD), True),
        (f"Here it is:\n{json.dumps({**GOOD, 'why': 'x'})} done", True),
        (f'{{"thoughts": 1}} {json.dumps(GOOD)}', True),
        (json.dumps({**GOOD, "text_quality": 6}), False),
        (json.dumps({**GOOD, "text_quality": 2.5}), False),
        (json.dumps({**GOOD, "text_quality": "5"}), False),
        (json.dumps({"text_quality": 5}), False),
        (json.dumps(GOOD)[:-1], False),
        ("", False),
        ("{" * 5000, False),
    ],
)
def test_only_the_form_that_was_asked_for_is_an_answer(text: str, valid: bool):
    assert (judge.parse(text) is not None) == valid


def test_what_does_not_fit_is_cut_and_said_to_be():
    small = "max_characters: 100, max_images: 1, image_max_pixels: 1000"
    recipe = a_recipe(f"{{score: {{scorer: judge, judge: {{url: 'http://x', model: m, {small}}}}}}}")
    asked = recipe.prepare.sources["web"].curate
    assert asked is not None and asked.score is not None and asked.score.judge is not None
    sample, files = a_document("x", prose(1), [a_photo(1), a_photo(2)])
    content = judge.messages_of(sample, files, asked.score.judge)[1]["content"]
    assert content[0]["text"].endswith("[the rest is cut]") and len(content[0]["text"]) < 120
    assert [part["type"] for part in content] == ["text", "image_url", "text"]


def test_records_that_cannot_be_read_are_one_error(tmp_path: Path, server: Server):
    some_documents(tmp_path, 1)
    storage.write_bytes(str(tmp_path / "data/answers/judge/web/00000.parquet"), b"nothing")
    with pytest.raises(DataError, match="recorded answers cannot be read"):
        curate(judged(server), str(tmp_path))


def test_every_criterion_is_a_column():
    assert scores.SCHEMA.names == list(judge.CRITERIA)
