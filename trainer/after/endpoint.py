"""Answers from an OpenAI-compatible endpoint instead of this run's own model (`sampling.endpoint`).

Each answer is one call of POST URL/chat/completions with its own seed (servers differ in what they support of `n`:
transformers serve refuses it). Images travel as data URIs; videos as the frames that training would see, one image
each. Calls are tried again (completions.py); what still fails is an answer with finish `error`, counted, never an end
of the run. The key is read from QWENVL_ENDPOINT_KEY.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image as Pil

from trainer.after import completions
from trainer.after.answers import Answer, Request, prompt_of, seed_of
from trainer.after.prompts import paired
from trainer.data import media as images
from trainer.data import video
from trainer.data.layout import Drop, Layout, Rules, fit_sample
from trainer.data.render import message_pieces
from trainer.data.sample import Sample
from trainer.errors import DataError, QwenVLError
from trainer.recipe import Sampling

NUM_CALLS = 8
"""Calls on the way at once."""

Content = list[dict[str, Any]]


def answer(
    request: Request,
    media: Sequence[bytes],
    rules: Rules,
    sampling: Sampling,
    *,
    seed: int,
    model: str,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Answer]:
    """All answers to one request; `model` is what the table records as their origin."""
    try:
        messages = messages_of(request.sample, media, request.variant, rules)
    except QwenVLError as error:
        return [
            failed(request.id, number, seed_of(seed, request.id, number), model, str(error))
            for number in range(sampling.answers)
        ]

    def one(number: int) -> Answer:
        own = seed_of(seed, request.id, number)
        try:
            found = call(sampling, messages, own, sleep=sleep)
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"]["content"] or ""
        except (OSError, ValueError, LookupError, TypeError) as error:
            return failed(request.id, number, own, model, f"{type(error).__name__}: {error}")
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        counts = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        return Answer(request.id, number, own, model, text, finish, "", *counts)

    with ThreadPoolExecutor(NUM_CALLS) as pool:
        return list(pool.map(one, range(sampling.answers)))


def failed(request: str, number: int, seed: int, model: str, why: str) -> Answer:
    return Answer(request, number, seed, model, "", "error", why[:500], 0, 0)


def call(
    sampling: Sampling, messages: list[dict[str, Any]], seed: int, *, sleep: Callable[[float], None]
) -> dict[str, Any]:
    """One completion.

    Raises:
        OSError: no answer after all tries, or one that trying again does not change.
        NotAnswered: the answer is no completion.
    """
    assert sampling.endpoint is not None
    body = {
        "model": sampling.endpoint_model or "default",
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed % 2**31,  # some servers take 32 bits
    }
    return completions.request(sampling.endpoint, body, sleep=sleep)


# ---------------------------------------------------------------- messages


def messages_of(sample: Sample, media: Sequence[bytes], variant: int, rules: Rules) -> list[dict[str, Any]]:
    """The prompt in OpenAI's form, text rendered as in training (coordinates in the family's convention).

    Raises:
        DataError: the prompt does not fit.
        MediaError: a medium cannot be read.
    """
    pair = paired(sample)
    fitted = fit_sample(pair, variant, rules)
    if isinstance(fitted, Drop):
        raise DataError(
            "the prompt does not fit", where=f"{sample.source}/{sample.id}", got=f"{fitted.reason}: {fitted.detail}"
        )
    sizes = {span.media: (span.grid.width, span.grid.height) for span in fitted.layout.spans if span.grid}
    found = []
    for message in prompt_of(sample):
        content: Content = []
        for piece in message_pieces(sample, message, variant, rules.family, lambda index: sizes[index]):
            if piece.kind in ("image", "video"):
                content += _pictures(sample, piece.media, media[piece.media], fitted.layout)
            elif content and content[-1]["type"] == "text":  # one item: some servers put a line break between two
                content[-1]["text"] += piece.text
            else:  # tokens of objects by their names, which a server reads as the tokens
                content.append({"type": "text", "text": piece.text})
        found.append({"role": message.role, "content": _joined(content)})
    return found


def _joined(content: Content) -> Content | str:
    """Text alone is one string."""
    if any(item["type"] != "text" for item in content):
        return content
    return content[0]["text"] if content else ""


def _pictures(sample: Sample, index: int, data: bytes, layout: Layout) -> Content:
    file = sample.media[index]
    where = f"{sample.source}/{sample.id}, media {index}"
    if file.kind == "image":
        span = next(span for span in layout.spans if span.grid is not None and span.media == index)
        assert span.grid is not None
        frames = [images.decode_image(data, span.grid.width, span.grid.height, where=where)]
    else:
        spans = [span for span in layout.spans if span.grid is not None and span.media == index]
        # rows of its grid are spans of their own where a family writes times between them
        numbers = sorted({number for span in spans for number in span.frames})
        grid = spans[0].grid
        assert grid is not None
        frames = list(video.decode_video(data, numbers, file.fps, grid.width, grid.height, where=where))
    return [{"type": "image_url", "image_url": {"url": _data_uri(frame)}} for frame in frames]


def _data_uri(pixels: Any) -> str:
    stream = io.BytesIO()
    Pil.fromarray(pixels).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
