"""Requests and answers: a recorded table that resumes, and an endpoint that fails now and then."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import tokenizers

from tests.after.builders import PIXELS, a_question, some_rules
from tests.after.test_export import a_finished_run
from tests.data.builders import tokenizer_json
from tests.models.configs import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from trainer import storage
from trainer.after import answers, endpoint, generate
from trainer.after.answers import Answer, Place, Request
from trainer.after.prompts import Prompt, as_prompt
from trainer.data.sample import Box, Image, Message, Object, Objects, Text
from trainer.data.shards import ShardWriter
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.models.family import load_family
from trainer.recipe import Recipe, Sampling

SAMPLING = Sampling(tasks=["instructions"], requests=2, answers=3, max_new_tokens=4)


def a_request(number: int = 0) -> Request:
    sample, _ = a_question(f"q{number}", seed=number)
    return Request(
        id=f"instructions/q{number}",
        sample=sample,
        place=Place(source="data/sources/instructions/train", shard=0, row=number),
    )


def an_answer(request: str, number: int = 0, text: str = "red") -> Answer:
    return Answer(request, number, 7, "model", text, "stop", "", 10, 2)


def test_requests_come_back_as_they_were(tmp_path):
    requests = [a_request(n) for n in range(3)]
    uri = str(tmp_path / "requests.jsonl")
    answers.write_requests(uri, requests)
    assert answers.read_requests(uri) == requests


def test_two_requests_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="two requests have one id"):
        answers.write_requests(str(tmp_path / "requests.jsonl"), [a_request(), a_request()])


def test_a_block_made_from_something_else_is_not_used(tmp_path):
    answers.write_block(str(tmp_path), 0, "key", [an_answer("r")])
    assert answers.read_block(str(tmp_path), 0, "key") == [an_answer("r")]
    assert answers.read_block(str(tmp_path), 0, "other") is None
    assert answers.read_block(str(tmp_path), 1, "key") is None


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ([], "answers are missing"),
        (["instructions/q0", "who"], "was not asked"),
        (["instructions/q0"], "has no answers"),
    ],
)
def test_answers_that_do_not_fit_the_requests_are_told(tmp_path, written: list[str], want: str):
    if written:
        answers.write_block(str(tmp_path), 0, "key", [an_answer(name) for name in written])
    with pytest.raises(DataError, match=want):
        answers.read_answers(str(tmp_path), [a_request(0), a_request(1)])


def test_seeds_hang_on_names_only():
    assert answers.seed_of(1, "a", 0) == answers.seed_of(1, "a", 0)
    seeds = {answers.seed_of(seed, name, n) for seed in (1, 2) for name in "ab" for n in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------- this run's own model


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    out = str(tmp_path_factory.mktemp("out"))
    recipe = a_finished_run(out)
    writer = ShardWriter(storage.join(out, "data", "sources", "instructions", "train"), shard_bytes=2**20)
    for number in range(20):
        writer.add(*a_question(f"q{number}", seed=number))
    writer.close()
    lost = a_request(0).model_copy(
        update={"id": "instructions/lost", "place": Place(source="data/sources/instructions/train", shard=0, row=99)}
    )
    answers.write_requests(
        storage.join(out, "prepare-sft", "requests.jsonl"), [*(a_request(n) for n in range(20)), lost]
    )
    return recipe, out


def table(out: str) -> dict[str, list[Answer]]:
    folder = storage.join(out, "prepare-sft")
    return answers.read_answers(
        storage.join(folder, "answers"), answers.read_requests(storage.join(folder, "requests.jsonl"))
    )


def test_every_request_is_answered_and_what_cannot_be_asked_is_an_error(asked: tuple[Recipe, str]):
    recipe, out = asked
    counts = generate.generate(recipe, "sft", out)
    sampling = recipe.stages.named()["sft"].sampling
    assert sampling is not None
    assert counts["error"] == sampling.answers
    found = table(out)
    assert all(len(one) == sampling.answers for one in found.values())
    assert "no such row" in found["instructions/lost"][0].error
    assert len({answer.text for one in found.values() for answer in one}) > 5


def test_an_interrupted_step_goes_on_with_the_same_answers(asked: tuple[Recipe, str], monkeypatch):
    recipe, out = asked
    generate.generate(recipe, "sft", out)
    before = table(out)
    storage.remove(storage.join(out, "prepare-sft", "answers", answers.block_name(1)))
    generate.generate(recipe, "sft", out)
    assert table(out) == before
    monkeypatch.setattr(generate.opening, "load_pretrained", lambda *_: pytest.fail("a finished step loads no model"))
    generate.generate(recipe, "sft", out)


# ---------------------------------------------------------------- endpoint


class Handler(BaseHTTPRequestHandler):
    plan: ClassVar[list[int]] = []
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code = Handler.plan.pop(0) if Handler.plan else 200
        Handler.seen.append(body)
        text = {
            "choices": [{"message": {"content": f"seed {body['seed']}"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 3},
        }
        data = json.dumps(text if code == 200 else {"error": "no"}).encode() if code != 999 else b"not json"
        self.send_response(200 if code == 999 else code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.plan, Handler.seen = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    thread.join()


def ask(url: str, count: int = 1) -> list[Answer]:
    _, media = a_question()
    sampling = SAMPLING.model_copy(update={"endpoint": url, "answers": count})
    return endpoint.answer(a_request(), media, some_rules(), sampling, seed=1, model="endpoint:x", sleep=lambda _: None)


@pytest.mark.parametrize(
    ("codes", "finish", "calls"),
    [([], "stop", 1), ([503, 429], "stop", 3), ([500] * 4, "error", 4), ([400], "error", 1), ([999], "error", 1)],
)
def test_calls_are_tried_again_where_that_may_help(server: str, codes: list[int], finish: str, calls: int):
    Handler.plan = list(codes)
    found = ask(server)
    assert [answer.finish for answer in found] == [finish]
    assert len(Handler.seen) == calls
    assert bool(found[0].error) == (finish == "error")


@pytest.mark.parametrize(
    ("answered", "shown"),
    [(b"<html>Log in</html>", "'<html>Log in</html>'"), (b"", "answered nothing"), (b'{"detail": "no"}', "detail"),
     (b"null", "null"), (b'{"choices": []}', "choices"), (b"\xff" * 900, "...")],
)  # fmt: skip
def test_what_is_no_completion_is_shown_with_the_address(
    answered: bytes, shown: str, server: str, monkeypatch: pytest.MonkeyPatch
):
    def do_POST(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(answered)

    monkeypatch.setattr(Handler, "do_POST", do_POST)
    (found,) = ask(server)
    assert found.finish == "error" and f"{server}/chat/completions answered" in found.error and shown in found.error
    assert "JSONDecodeError" not in found.error and len(found.error) < 500


def test_an_endpoint_gets_the_question_with_its_picture_and_a_seed_of_its_own_per_answer(server: str):
    found = ask(server, count=3)
    assert len({answer.text for answer in found}) == 3
    (message,) = Handler.seen[0]["messages"]
    assert message["role"] == "user"
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert message["content"][1]["text"] == "Which colour?"


def test_an_endpoint_sees_what_was_said_before_the_question():
    sample, media = a_question()
    earlier = (
        Message(role="system", parts=(Text(text="Be brief."),)),
        Message(role="user", parts=(Text(text="Hello."),)),
        Message(role="assistant", parts=(Text(text="Hi."),)),
    )
    talk = sample.model_copy(update={"messages": (*earlier, *sample.messages)})
    found = endpoint.messages_of(talk, media, 0, some_rules())
    assert [(one["role"], one["content"]) for one in found[:3]] == [
        ("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi."),
    ]  # fmt: skip
    assert len(found) == 4


def test_an_endpoint_that_is_not_there_makes_errors_and_no_end():
    found = ask("http://127.0.0.1:9/v1", count=2)
    assert [answer.finish for answer in found] == ["error", "error"]


@pytest.mark.parametrize("module", [qwen_vl, qwen2_vl, qwen2_5_vl, qwen3_vl])
def test_what_an_endpoint_s_template_makes_of_the_messages_is_the_training_text(module: Any):
    from transformers.utils.chat_template_utils import render_jinja_template

    family = load_family(module.FAMILY, module.config())
    inner = tokenizers.Tokenizer.from_str(tokenizer_json())
    inner.add_special_tokens(list(family.special_tokens))
    rules = replace(some_rules(), family=family, tokenizer=Tokenizer(inner.to_str().encode()))
    sample, media = a_question()
    box = Objects(media=0, objects=(Object(label="dog", at=Box(xyxy=(10, 20, 50, 60))),))
    asked = Message(role="user", parts=(Text(text="See "), Image(media=0), Text(text="Is "), box, Text(text=" red?")))
    sample = sample.model_copy(update={"messages": (asked, *sample.messages[1:])})
    prompt = as_prompt(sample, media, 0, rules)
    assert isinstance(prompt, Prompt)
    trained = rules.tokenizer.decode(prompt.ids.tolist())
    (message,) = endpoint.messages_of(sample, media, 0, rules)
    assert [item["type"] for item in message["content"]] == ["text", "image_url", "text"]
    pictured = [item if item["type"] == "text" else {"type": "image"} for item in message["content"]]
    texts, _ = render_jinja_template(
        conversations=[[message | {"content": pictured}]],
        chat_template=family.processor_files(PIXELS)["chat_template.jinja"],
        add_generation_prompt=True,
    )
    pad = re.escape(family.markers.image_pad)
    assert [re.sub(f"({pad})+", "PICTURE", text) for text in texts] == [re.sub(f"({pad})+", "PICTURE", trained)]
    assert "dog" in trained and trained.count("PICTURE") == 0
