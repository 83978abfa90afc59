"""Whether a base model's chat template writes what training and the exported template write.

A Thinking base begins its answers with <think>, for one: trained here and exported, it is asked without.
"""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from trainer import storage
from trainer.models.family import Family
from trainer.recipe import Pixels

PROBE: list[dict[str, Any]] = [
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (("user", "What?"), ("assistant", "A table."), ("user", "Why?"))
]
SHOWN = 120


def chat_template_of(uri: str) -> str | None:
    """The template of a folder in Hugging Face layout, from the files that transformers looks into, in its order; None
    where there is none."""
    try:
        return storage.read_bytes(storage.join(uri, "chat_template.jinja")).decode()
    except FileNotFoundError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            found = storage.read_json(storage.join(uri, name)).get("chat_template")
        except FileNotFoundError:
            continue
        if isinstance(found, list):  # older tokenizers name several
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def chat_template_warnings(family: Family, chat_template: str | None) -> list[str]:
    """One warning where `chat_template` writes a conversation of two turns otherwise than the exported one. Both are
    rendered by transformers, in its sandbox."""
    if chat_template is None:
        return []
    ours = family.processor_files(Pixels())["chat_template.jinja"]
    settings = family.tokenizer_settings()
    special = {name: settings.get(name) or "" for name in ("bos_token", "eos_token")}
    want = _rendered(ours, special)
    try:
        found = _rendered(chat_template, special)
    except (TemplateError, TypeError, ValueError) as error:
        return [f"the base's chat template does not render a conversation of two turns: {error}"]
    found = found.removeprefix(special["bos_token"])  # which the tokenizer adds to ours
    if found == want:
        return []
    start = next((at for at, (a, b) in enumerate(zip(found, want, strict=False)) if a != b), min(len(found), len(want)))
    return [
        "the base's chat template writes a conversation otherwise than training here, and the export has the template "
        f"of training: {found[start : start + SHOWN]!r} where training has {want[start : start + SHOWN]!r}"
    ]


def _rendered(chat_template: str, special: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[PROBE], chat_template=chat_template, add_generation_prompt=True, **special
    )
    return texts[0]
