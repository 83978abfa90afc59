"""A trajectory as its steps. The reasoning of one: the words of the assistant's message before its first call. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.data.sample import Action, Image, Message, Sample, Text
from trainer.resolve import digest


@dataclass(frozen=True)
class Step:
    number: int
    """From 0, in its trajectory."""
    message: int
    """Index of the assistant's message."""
    query: str
    """What the user said last."""
    actions: tuple[Action, ...]
    """At least one; all on one screenshot."""
    before: int
    """Medium: the screenshot that the actions are carried out on."""
    after: int | None
    """Medium: the one that follows; None where nothing does."""
    reasoning: str
    """As it stands, without white space around it; empty where there is none."""
    earlier: tuple[str, ...]
    """The calls of the steps before, in words."""

    @property
    def calls(self) -> str:
        return "; ".join(map(in_words, self.actions))

    def digest_in(self, sample: Sample) -> str:
        """Of what the reasoning is about: query, calls before and now with their places, both screenshots. Reasoning
        itself does not count, so an answer stays one for this step whatever was written."""
        shown = [sample.media[number].digest for number in (self.before, self.after) if number is not None]
        actions = [action.model_dump(mode="json", exclude={"media"}) for action in self.actions]
        return digest([self.query, actions, shown, list(self.earlier)])


def steps_of(sample: Sample) -> list[Step]:
    """Every assistant's message with an action; none of a sample that is no trajectory."""
    found: list[Step] = []
    query = ""
    for index, message in enumerate(sample.messages):
        if message.role == "user":
            query = "\n".join(part.text for part in message.parts if isinstance(part, Text)).strip() or query
        actions = tuple(part for part in message.parts if isinstance(part, Action))
        if message.role != "assistant" or not actions:
            continue
        after = _next_screenshot(sample, index)
        earlier = tuple(step.calls for step in found)
        step = Step(len(found), index, query, actions, actions[0].media, after, _words(message), earlier)
        found.append(step)
    return found


def _next_screenshot(sample: Sample, index: int) -> int | None:
    for message in sample.messages[index + 1 :]:
        if message.role == "assistant":
            return None
        shown = [part.media for part in message.parts if isinstance(part, Image)]
        if shown:
            return shown[0]
    return None


def _words(message: Message) -> str:
    found = []
    for part in message.parts:
        if isinstance(part, Action):
            break
        if isinstance(part, Text):
            found.append(part.text)
    return "".join(found).strip()


def in_words(action: Action) -> str:
    """A call without its place: `type {"text": "Rome"}`."""
    return action.action + (f" {json.dumps(action.arguments, ensure_ascii=False)}" if action.arguments else "")


def with_reasoning(sample: Sample, texts: Mapping[int, str]) -> Sample:
    """The sample with the reasoning of the steps of these numbers replaced; an empty text takes it away."""
    messages = list(sample.messages)
    for step in steps_of(sample):
        if (text := texts.get(step.number)) is not None:
            old = messages[step.message]
            first = next(n for n, part in enumerate(old.parts) if isinstance(part, Action))
            kept = tuple(part for part in old.parts[:first] if not isinstance(part, Text))
            written = (Text(text=f"{text}\n"),) if text else ()
            messages[step.message] = Message(role=old.role, parts=(*kept, *written, *old.parts[first:]))
    return sample.model_copy(update={"messages": tuple(messages)})


def cut_before(sample: Sample, step: Step) -> Sample | None:
    """The trajectory up to the step, with the media that it still shows; None where nothing is left."""
    ends = [n for n, message in enumerate(sample.messages[: step.message]) if message.role == "assistant"]
    if not ends:
        return None
    messages = sample.messages[: ends[-1] + 1]
    used = [getattr(part, "media", -1) for message in messages for part in message.parts]
    return sample.model_copy(update={"messages": messages, "media": sample.media[: max(used) + 1]})
