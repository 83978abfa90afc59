"""Answers to requests: the newest model of the run, or an endpoint. `python -m trainer.after.generate --stage sft ...`

    OUT/prepare-STAGE/requests.jsonl -> OUT/prepare-STAGE/answers/00000.parquet, ...

One block of requests after the other; a block that is written and was made from the same things is left alone, so the
step goes on where it stopped. One node, no ZeRO: under ZeRO-3 every token would gather the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer import handover, storage
from trainer.after import answers, decode, endpoint, opening
from trainer.after.answers import Answer, Request, seed_of
from trainer.after.decode import Ask
from trainer.after.prompts import Prompt, as_prompt
from trainer.data.layout import Drop, Rules, rules_of
from trainer.data.shards import ShardReader, Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import QwenVLError, UsageError
from trainer.fields import identity
from trainer.models import config as configs
from trainer.progress import Progress
from trainer.recipe import Recipe, Sampling
from trainer.resolve import digest

OF_SELECTION = ("keep", "requests", "tasks", "checks")
"""Settings that answers do not depend on."""


@dataclass
class Media:
    """Media of requests, by their place in the output's shards; each source is opened once."""

    out: str
    readers: dict[str, ShardReader]

    def of(self, request: Request) -> list[bytes]:
        place = request.place
        if place.source not in self.readers:
            self.readers[place.source] = ShardReader(Source.open(storage.join(self.out, place.source)))
        return self.readers[place.source].media(place.shard, place.row)

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()


def generate(recipe: Recipe, stage: str, out: str) -> dict[str, int]:
    """Answer every request of a stage's sampling; counts of how the answers ended.

    Raises:
        UsageError: the stage samples nothing, or there is no model yet.
    """
    sampling = recipe.stages.named()[stage].sampling if stage in recipe.stages.named() else None
    if sampling is None:
        raise UsageError(
            "the stage samples no answers",
            where=f"stages.{stage}.sampling",
            do="name sft or dpo with a sampling section",
        )
    folder = storage.join(out, f"prepare-{stage}")
    requests = answers.read_requests(storage.join(folder, "requests.jsonl"))
    origin, begin = _origin(recipe, stage, out, sampling)
    settings = _settings(recipe, stage, out, sampling)
    blocks = answers.blocks_of(requests)
    progress = Progress(f"answers for {stage}", len(requests), "requests")
    media = Media(out, {})
    answer_block: Callable[[Sequence[Request], Media], list[Answer]] | None = None
    found: list[Answer] = []
    try:
        for number, block in enumerate(blocks):
            key = answers.block_key(block, model=origin, settings=settings)
            known = answers.read_block(storage.join(folder, "answers"), number, key)
            if known is None:
                answer_block = answer_block or begin()
                known = answer_block(block, media)
                answers.write_block(storage.join(folder, "answers"), number, key, known)
            elif answer_block is None:
                progress.skipped((number + 1) * answers.BLOCK_REQUESTS)
            found += known
            progress.at(min((number + 1) * answers.BLOCK_REQUESTS, len(requests)), _told(answers.counts(found)))
    finally:
        media.close()
    return answers.counts(found)


def _told(counts: dict[str, int]) -> str:
    return f"{counts['stop'] + counts['length']} answers, {counts['error']} errors"


def _settings(recipe: Recipe, stage: str, out: str, sampling: Sampling) -> dict[str, object]:
    """What else the answers depend on."""
    return {
        "sampling": {name: value for name, value in identity(sampling).items() if name not in OF_SELECTION},
        "seed": recipe.seed,
        "pixels": identity(recipe.stages.named()[stage].pixels),
        "packing": identity(recipe.stages.named()[stage].packing),
        "tokenizer": Tokenizer.load(configs.tokenizer_uri(recipe, out)).digest,
        "tokens_per_second": recipe.model.tokens_per_second,
    }


def _origin(
    recipe: Recipe, stage: str, out: str, sampling: Sampling
) -> tuple[str, Callable[[], Callable[[Sequence[Request], Media], list[Answer]]]]:
    """(what is recorded as the answers' model, how to begin answering): nothing is loaded before it is needed."""
    result = handover.newest_result(out, before=stage)
    if result is None:
        raise UsageError("there is no model to ask", where=handover.result_uri(out, handover.INIT), do="run init first")
    uri = opening.result_model(out, result)
    tokenizer = Tokenizer.load(configs.tokenizer_uri(recipe, out))
    rules = rules_of(recipe.stages.named()[stage], "chat", configs.family_of(recipe, out), tokenizer)
    if sampling.endpoint:
        name = f"endpoint:{digest([sampling.endpoint, sampling.endpoint_model])[:16]}"

        def by_endpoint(block: Sequence[Request], media: Media) -> list[Answer]:
            asked = [endpoint.answer(r, media.of(r), rules, sampling, seed=recipe.seed, model=name) for r in block]
            return [answer for answers_of_one in asked for answer in answers_of_one]

        return name, lambda: by_endpoint

    def begin() -> Callable[[Sequence[Request], Media], list[Answer]]:
        model = opening.load_pretrained(uri)
        digest_of_model = result.model.digest
        return lambda block, media: own_answers(model, block, media, rules, sampling, recipe.seed, digest_of_model)

    return result.model.digest, begin


def own_answers(
    model: object, block: Sequence[Request], media: Media, rules: Rules, sampling: Sampling, seed: int, origin: str
) -> list[Answer]:
    """Answers of a loaded model to one block. A request that cannot be asked has answers with finish `error`."""
    asks: list[tuple[Request, Ask]] = []
    found: list[Answer] = []
    for request in block:
        seeds = tuple(seed_of(seed, request.id, number) for number in range(sampling.answers))
        prompt = _prompt(request, media, rules)
        if isinstance(prompt, Prompt):
            asks.append((request, Ask(prompt, seeds)))
        else:
            found += [endpoint.failed(request.id, number, own, origin, prompt) for number, own in enumerate(seeds)]
    tokenizer, marks = rules.tokenizer, rules.family.markers
    settings = decode.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        stop=(tokenizer.id(marks.turn_end), tokenizer.id(marks.eos)),
    )
    completions = decode.complete(model, [ask for _, ask in asks], settings, rules.family)  # type: ignore[arg-type]
    for (request, ask), completed in zip(asks, completions, strict=True):
        for number, (own, one) in enumerate(zip(ask.seeds, completed, strict=True)):
            text = tokenizer.decode(list(one.ids))
            found.append(
                Answer(request.id, number, own, origin, text, one.finish, "", len(ask.prompt.ids), len(one.ids))
            )
    order = {request.id: place for place, request in enumerate(block)}
    return sorted(found, key=lambda answer: (order[answer.request], answer.answer))


def _prompt(request: Request, media: Media, rules: Rules) -> Prompt | str:
    """The prompt, or why it cannot be asked."""
    try:
        found = as_prompt(request.sample, media.of(request), request.variant, rules)
    except QwenVLError as error:
        return str(error)
    return f"{found.reason}: {found.detail}" if isinstance(found, Drop) else found


def main() -> None:
    recipe, arguments = opening.asked(__doc__, "--stage")
    counts = generate(recipe, arguments.stage, arguments.out)
    print(f"answers for {arguments.stage}: {counts['stop']} ended, {counts['length']} cut, {counts['error']} errors")


if __name__ == "__main__":
    opening.run_program(main)
