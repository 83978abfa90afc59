"""LLaMA-Factory: alpaca rows {"instruction", "input", "output", "system", "history": [[question, answer], ...]},
sharegpt rows {"conversations": [{"from", "value"}], "system", "tools"}, both with `images` and `videos`, and with
`chosen` and `rejected` for ranking. Source: its data/README.md.

A dataset_info.json beside the file, where it names the file, says how columns and roles are called; without one they
have LLaMA-Factory's default names, and a row with a list of turns is sharegpt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.prepare.formats.answers import with_places
from pipelines.prepare.formats.llava import media_of
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    Places,
    Row,
    check_turns,
    each,
    field_of,
    identity_of,
    json_document,
    key_of,
    message,
    rendered,
    text,
    units_of,
)  # fmt: skip
from pipelines.prepare.formats.tools import call, joined, with_tools
from trainer import storage
from trainer.errors import DataError
from trainer.recipe import Source

KIND, RENDERING = "instruction", "chat"
INFO = "dataset_info.json"
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    **{name: name for name in ("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected")},
    "kto_tag": "kto_tag",
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def looks(peek: Peek) -> str | None:
    if peek.holds in ("rows", "object") and _description(peek.path) is not None:
        return f"{INFO} names the file"
    if peek.has("instruction") and (peek.has("output") or peek.all("chosen", "rejected")):
        return "instruction with output, or with chosen and rejected"
    if peek.has("conversations") and (peek.all("chosen", "rejected") or peek.has("tools")):
        return "conversations with chosen and rejected, or with tools"
    return None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    info = _description(path) or {}
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source, info))


def _description(path: str) -> dict[str, Any] | None:
    """What dataset_info.json says of the file. Raises DataError: it says something that it has no words for."""
    folder, _, name = path.rpartition("/")
    where = f"{folder}/{INFO}" if folder else INFO
    if name == INFO or not storage.exists(where):
        return None
    for title, found in json_document(where).items():
        if not isinstance(found, dict) or found.get("file_name") not in (name, path):
            continue
        for part, known in (("columns", COLUMNS), ("tags", TAGS)):
            if unknown := set(found.get(part) or {}) - set(known):
                told = f"{title}.{part}: {', '.join(sorted(unknown))}"
                raise DataError("a column or tag that is not known", where=where, expected=", ".join(known), got=told)
        if found.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
            raise DataError("unknown formatting", where=where, expected="alpaca or sharegpt", got=found["formatting"])
        return found
    return None


def draft(entry: dict, where: str, media_root: str, source: Source, info: Mapping[str, Any] | None = None) -> Draft:
    info = info or {}
    columns, tags = {**COLUMNS, **(info.get("columns") or {})}, {**TAGS, **(info.get("tags") or {})}
    row = {name: entry.get(column) for name, column in columns.items()}
    for name, what in (("kto_tag", "single answers that people liked or not (KTO)"), ("audios", "audio")):
        if row[name] not in (None, []):
            raise BadRow("unsupported", f"a row without {columns[name]}", what)
    media = media_of({name: row[name] for name in ("images", "videos")}, media_root)
    places = Places(media)
    stated = info.get("formatting")
    turns = _sharegpt if stated == "sharegpt" or (stated is None and row["messages"]) else _alpaca
    messages = with_places(turns(row, tags, columns, places))
    chosen, rejected = _answers(row, tags, messages)
    places.finish()
    if chosen:
        check_turns(messages, ends="question")
    elif len(messages) == 1 and turns is _alpaca and source.rendering == "document":
        messages = [message("document", *messages[0]["parts"])]
    else:
        messages = rendered(messages, source)
    identity, units = identity_of(entry, where), units_of(entry)
    return Draft(
        where, identity, messages, media, chosen=chosen, rejected=rejected, key=key_of(entry), units=units
    )  # fmt: skip


def _alpaca(row: dict, tags: dict, columns: dict, places: Places) -> list[dict]:
    asked = [row[name] for name in ("prompt", "query") if row[name]]
    if not asked or not all(isinstance(part, str) for part in asked):
        raise BadRow("wrong-form", f"text in {columns['prompt']}", repr(asked))
    messages = [message("system", text(row["system"]))] if row["system"] else []
    for question, answer in row["history"] or []:
        messages += [message("user", *places.split(question)), _said(answer, places)]
    messages.append(message("user", *places.split("\n".join(asked))))
    if row["response"] is not None and not row["chosen"]:
        messages.append(_said(row["response"], places))
    return messages


def _sharegpt(row: dict, tags: dict, columns: dict, places: Places) -> list[dict]:
    listed = row["messages"]
    if not isinstance(listed, list) or not listed:
        raise BadRow("wrong-form", f"a list of turns in {columns['messages']}", type(listed).__name__)
    system = str(row["system"] or "")
    if listed[0].get(tags["role_tag"]) == tags["system_tag"]:
        system, listed = field_of(listed[0], tags["content_tag"]), listed[1:]
    system = with_tools(system, row["tools"])
    messages = [message("system", text(system))] if system else []
    return joined(messages + [_turn(item, tags, places) for item in listed])


def _turn(item: dict, tags: dict, places: Places) -> dict:
    speaker, words = field_of(item, tags["role_tag"]), item.get(tags["content_tag"])
    if not isinstance(words, str):
        raise BadRow("wrong-form", f"the words of a turn in {tags['content_tag']}", type(words).__name__)
    if speaker == tags["user_tag"]:
        return message("user", *places.split(words))
    if speaker == tags["assistant_tag"]:
        return _said(words, places)
    if speaker == tags["observation_tag"]:
        return message("tool", *places.split(words))
    if speaker == tags["function_tag"]:
        return call(words)
    known = [tags[f"{name}_tag"] for name in ("user", "assistant", "observation", "function")]
    raise BadRow("wrong-form", f"a turn from {', '.join(known)}, or {tags['system_tag']} in the first place", speaker)


def _said(words: object, places: Places) -> dict:
    if not isinstance(words, str):
        raise BadRow("wrong-form", "the words of an answer", type(words).__name__)
    if "<image>" in words or "<video>" in words:
        return message("assistant", *places.split(words))
    return message("assistant", text(words))


def _answers(row: dict, tags: dict, asked: list[dict]) -> tuple[list[dict], list[dict]]:
    """(chosen, rejected) of a ranking row, else nothing."""
    given = [row["chosen"], row["rejected"]]
    if given == [None, None]:
        return [], []
    found = []
    for name, answer in zip(("chosen", "rejected"), given, strict=True):
        if isinstance(answer, dict):
            if (speaker := answer.get(tags["role_tag"])) != tags["assistant_tag"]:
                raise BadRow("wrong-order", f"{name} from {tags['assistant_tag']}", speaker)
            answer = answer.get(tags["content_tag"])
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow("empty-answer", f"a {name} answer with text", repr(answer))
        found.append(with_places([message("assistant", text(answer))], asked))
    if found[0] == found[1]:
        raise BadRow("equal-answers", "two different answers", "the same one twice")
    return found[0], found[1]
