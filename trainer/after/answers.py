"""Requests and answers: the recorded input of rejection sampling and of preference pairs. Torch-free.

    requests.jsonl     one Request a line, written by the requests step (prepare image)
    answers/*.parquet  one file a block of requests, written by trainer/after/generate.py or from an endpoint
    selection.json     what the select step kept (pipelines/prepare/sampling.py)

A block's file carries a key: the digest of everything its answers depend on (the requests, the model, the sampling
settings). A block whose file has the key of today is done; any other is written again. So an interrupted step goes on
where it stopped, and a changed model never meets old answers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import storage
from trainer.data.sample import Message, Sample
from trainer.errors import DataError
from trainer.resolve import digest

FORMAT = 1
BLOCK_REQUESTS = 16


class Place(BaseModel):
    """Where the sample's media lie: a row of a shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    """Source folder relative to the output: data/sources/NAME/SPLIT."""
    shard: int
    row: int


class Request(BaseModel):
    """One task for a model: a sample up to the answer, with the answer's key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FORMAT
    id: str
    """SOURCE/SAMPLE_ID, unique in the file."""
    sample: Sample
    """The whole sample, reference answer included; prompt_of() cuts it."""
    place: Place
    variant: int = 0


@dataclass(frozen=True)
class Answer:
    """One sampled answer; the columns of the table. finish `error` has the reason in `error` and no text."""

    request: str
    answer: int
    seed: int
    model: str
    text: str
    finish: Literal["stop", "length", "error"]
    error: str
    num_prompt_tokens: int
    num_tokens: int


SCHEMA = pa.schema(
    [
        pa.field("request", pa.string(), nullable=False),
        pa.field("answer", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)


def prompt_of(sample: Sample) -> tuple[Message, ...]:
    """The messages before the last assistant one: what a model is asked.

    Raises:
        DataError: when the sample has no assistant message, or nothing before it.
    """
    places = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
    if not places or places[-1] == 0:
        raise DataError(
            "a task has no question before an answer",
            where=f"{sample.source}/{sample.id}",
            do="drop it from sampling.tasks",
        )
    return sample.messages[: places[-1]]


def seed_of(seed: int, request: str, answer: int) -> int:
    """int63 of (recipe seed, request, answer index): the same whatever the batch, the order or a restart."""
    raw = hashlib.sha256(f"{seed}\0{request}\0{answer}".encode()).digest()
    return int.from_bytes(raw[:8], "big") >> 1


# ---------------------------------------------------------------- requests


def write_requests(uri: str, requests: Sequence[Request]) -> None:
    """Write requests.jsonl; equal requests give equal bytes."""
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise DataError("two requests have one id", where=request.id)
        seen.add(request.id)
    lines = [request.model_dump_json(exclude_none=True) + "\n" for request in requests]
    storage.write_bytes(uri, "".join(lines).encode())


def read_requests(uri: str) -> list[Request]:
    """Every request of a file, in order."""
    found = []
    for number, line in enumerate(storage.read_bytes(uri).decode().splitlines(), 1):
        try:
            found.append(Request.model_validate_json(line))
        except ValidationError as error:
            raise DataError("a request cannot be read", where=f"{uri}, line {number}", got=str(error)) from None
    return found


def blocks_of(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests in blocks: the unit that is written, and skipped when done."""
    return [list(requests[start : start + BLOCK_REQUESTS]) for start in range(0, len(requests), BLOCK_REQUESTS)]


def block_key(requests: Iterable[Request], *, model: str, settings: dict[str, Any]) -> str:
    """Digest of everything that a block's answers depend on.

    Args:
        model: digest of the model that answers, or the endpoint's URL and model name.
        settings: temperature, top_p, max_new_tokens, answers, seed, pixels.
    """
    lines = [request.model_dump(mode="json") for request in requests]
    return digest({"format": FORMAT, "requests": lines, "model": model, "settings": settings})


# ---------------------------------------------------------------- answers


def block_name(number: int) -> str:
    return f"{number:05d}.parquet"


def write_block(folder: str, number: int, key: str, answers: Sequence[Answer]) -> None:
    """Write one block atomically."""
    columns = {name: [getattr(answer, name) for answer in answers] for name in SCHEMA.names}
    table = pa.table(columns, schema=SCHEMA.with_metadata({"format": str(FORMAT), "key": key}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(storage.join(folder, block_name(number)), buffer.getvalue())


def read_block(folder: str, number: int, key: str) -> list[Answer] | None:
    """The answers of one block, or None when it is missing or was made from something else."""
    uri = storage.join(folder, block_name(number))
    if not storage.exists(uri):
        return None
    table = _table(uri)
    if (table.schema.metadata or {}).get(b"key", b"").decode() != key:
        return None
    return [Answer(**row) for row in table.to_pylist()]


def read_answers(folder: str, requests: Sequence[Request]) -> dict[str, list[Answer]]:
    """{request id: its answers in order}, of every block that the requests make.

    Raises:
        DataError: when a block is missing, or answers something that was not asked.
    """
    found: dict[str, list[Answer]] = {request.id: [] for request in requests}
    for number in range(len(blocks_of(requests))):
        uri = storage.join(folder, block_name(number))
        if not storage.exists(uri):
            raise DataError(
                "answers are missing", where=uri, do="run the answers step again: it goes on where it stopped"
            )
        for row in _table(uri).to_pylist():
            if row["request"] not in found:
                raise DataError(
                    "an answer to a question that was not asked",
                    where=uri,
                    got=row["request"],
                    do="requests.jsonl changed after the answers were made: run the answers step again",
                )
            found[row["request"]].append(Answer(**row))
    for request, answers in found.items():
        if not answers:
            raise DataError("a request has no answers", where=f"{folder}, request {request}")
        answers.sort(key=lambda answer: answer.answer)
    return found


def counts(answers: Iterable[Answer]) -> dict[str, int]:
    """Answers by how they ended: for the report."""
    total = {"stop": 0, "length": 0, "error": 0}
    for answer in answers:
        total[answer.finish] += 1
    return total


def _table(uri: str) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise DataError(
            "a block of answers cannot be read", where=uri, got=str(error), do="delete it, then run again"
        ) from None
