"""A page of samples, everything inside one file: pictures with boxes, points and masks on them, pages beside their
HTML, clips as frames with times, trajectories step by step, pairs beside each other. All text is escaped; HTML that a
sample holds is shown as text and rendered in a sandboxed frame without scripts.

    write_preview(sources, "preview.html", samples=24)
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from importlib import resources

from pipelines.prepare.preview.draw import colour, frames, picture
from trainer.data.coordinates import Convention
from trainer.data.objects import Pen, page_html
from trainer.data.sample import Action, Message, Object, Objects, Sample, Span, parts_of
from trainer.data.shards import ShardReader, Source
from trainer.errors import MediaError

Numbered = dict[int, list[tuple[int, Object]]]
"""Medium -> its objects with their numbers in the sample."""
LINES = (
    "<style>div[format] > div { white-space: pre-line; } "
    "p, li, td, th, h1, h2, h3, h4, h5, h6 { unicode-bidi: plaintext; }</style>"
)
"""ABC has lines, Arabic runs from right to left; what the model writes has no style."""


def write_preview(sources: Sequence[Source], path: str, *, samples: int) -> int:
    """Writes the page, piece by piece; returns how many samples it shows."""
    style = (resources.files("pipelines.report") / "style.css").read_text(encoding="utf-8")
    style += (resources.files("pipelines.prepare.preview") / "style.css").read_text(encoding="utf-8")
    shown = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Samples</title><meta name='viewport' "
            "content='width=device-width, initial-scale=1'><meta http-equiv='Content-Security-Policy' "
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-src 'self'\">"
            f"<style>{style}</style></head><body><main><header><h1>Samples</h1><p class='quiet'>"
            f"{len(sources)} source{'s' if len(sources) != 1 else ''}; coordinates are pixels of the original files"
            "</p></header>"
        )
        for source in sources:
            file.write(f"<section><h2>{_text(_title(source))}</h2><p class='quiet'>{_samples(source.num_samples)}</p>")
            for card in _cards(source, samples):
                file.write(card)
                shown += 1
            file.write("</section>")
        file.write("</main></body></html>\n")
    return shown


def _samples(count: int) -> str:
    return f"{count:,} sample{'s' if count != 1 else ''}"


def _title(source: Source) -> str:
    name, split = source.manifest.get("source"), source.manifest.get("split")
    return f"{name}, {split}" if name else source.uri


def _cards(source: Source, samples: int) -> Iterator[str]:
    places = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    count = min(samples, len(places))
    reader = ShardReader(source)
    try:
        for number in range(count):
            shard, row = places[number * len(places) // count]
            yield card(source.sample(shard, row), reader.media(shard, row))
    finally:
        reader.close()


def card(sample: Sample, files: Sequence[bytes]) -> str:
    """One sample as HTML."""
    shown = _Sample(sample, files)
    facts = [f"kind {sample.kind}", *(f"{item.width}x{item.height} {item.suffix}" for item in sample.media[:4])]
    facts += [f"key {sample.key.task}: {sample.key.value}"] if sample.key else []
    facts += [f"{name} {value:.3g}" for name, value in sample.scores.items()]
    head = f"<h3>{_text(sample.id)}</h3><p class='quiet'>{_text('; '.join(facts))}</p>"
    body = "".join(shown.message(message) for message in sample.messages)
    if sample.chosen:
        pair = (("chosen", sample.chosen), ("rejected", sample.rejected))
        sides = "".join(f"<div><h4>{name}</h4>{''.join(map(shown.message, said))}</div>" for name, said in pair)
        body += f"<div class='two'>{sides}</div>"
    return f"<article class='card'>{head}{body}</article>"


class _Sample:
    """Numbers the objects of a sample once, so that text and pictures agree."""

    def __init__(self, sample: Sample, files: Sequence[bytes]):
        self.sample, self.files = sample, files
        self.on: Numbered = {}
        self.number: dict[int, int] = {}
        """id of a part -> number of its first object."""
        self.pages: set[int] = set()
        """Media that are shown beside their HTML."""
        self.actions: dict[int, list[tuple[int, Action]]] = {}
        self.steps = [message for message in sample.messages if any(isinstance(p, Action) for p in message.parts)]
        count = 0
        for part in parts_of(sample):
            if isinstance(part, Objects):
                self.number[id(part)] = count
                self.on.setdefault(part.media, []).extend(enumerate(part.objects, count))
                count += len(part.objects)
                self.pages |= {part.media} if part.form == "html" else set()
            elif isinstance(part, Action):
                self.actions.setdefault(part.media, []).append((len(self.actions), part))

    def message(self, message: Message) -> str:
        body = "".join(self.part(part) for part in message.parts)
        at = next((number for number, step in enumerate(self.steps, 1) if step is message), 0)
        told = f", step {at} of {len(self.steps)}" if at else ""
        return f"<div class='message {message.role}'><span class='role'>{message.role}{told}</span>{body}</div>"

    def part(self, part: object) -> str:
        kind = part.part  # type: ignore[attr-defined]
        if kind == "text":
            return f"<p class='said'>{_text(part.text)}</p>" if part.text.strip() else ""  # type: ignore[attr-defined]
        if kind in ("image", "video"):
            number = part.media  # type: ignore[attr-defined]
            return self.medium(number) if number not in self.pages else f"<p class='quiet'>page {number + 1}</p>"
        if isinstance(part, Objects):
            return self.objects(part)
        if isinstance(part, Action):
            given = {**part.arguments, **{name: list(xy) for name, xy in part.coordinates.items()}}
            told = ", ".join(f"{name} {value}" for name, value in given.items())
            return (
                f"<p class='act'><b>{_text(part.action)}</b> {_text(told)} <span class='quiet'>{part.tool}</span></p>"
            )
        return f"<p class='quiet'>tools: {_text(part.tool)}</p>"  # type: ignore[attr-defined]

    def medium(self, number: int) -> str:
        item, data = self.sample.media[number], self.files[number]
        objects = self.on.get(number, [])
        try:
            if item.kind == "video":
                return frames(item, data, objects)
            return picture(item, data, objects, self.actions.get(number, []))
        except MediaError as error:
            return f"<p class='bad'>{_text(error)}</p>"

    def objects(self, part: Objects) -> str:
        first = self.number[id(part)]
        listed = "".join(f"<li>{self._line(number, thing)}</li>" for number, thing in enumerate(part.objects, first))
        listed = f"<ul class='objects'>{listed}</ul>"
        if part.form != "html":
            return listed
        item = self.sample.media[part.media]
        pen = Pen(self.sample, 0, Convention("absolute"), lambda _: (item.width, item.height))
        written = page_html(part, pen)
        shown = html.escape(LINES + written, quote=True)
        frame = f"<iframe sandbox title='the page as HTML' srcdoc='{shown}'></iframe>"
        source = (
            f"<details><summary>{len(part.objects)} elements as text</summary><pre>{_text(written)}</pre></details>"
        )
        return f"<div class='page'>{self.medium(part.media)}{frame}</div>{source}"

    def _line(self, number: int, thing: Object) -> str:
        at = thing.at
        if isinstance(at, Span):
            where = f"{at.start_s:.2f} to {at.end_s:.2f} s"
        else:
            where = ", ".join(f"{value:g}" for value in (at.xy if at.shape == "point" else at.xyxy))
        told = f"{thing.role}: " if thing.role else ""
        content = f" <span class='quiet'>{_text(thing.content)}</span>" if thing.content else ""
        swatch = f"<b class='swatch' style='background:{colour(number)}'>{number + 1}</b>"
        return f"{swatch} {_text(told + thing.label)} <code>{at.shape} {where}</code>{content}"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
