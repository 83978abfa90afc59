"""A rank group's packs, step after step. State is {plan digest, step, skips}: nothing else decides what comes next.

    loader = Loader(plan, out, rules, group=0, num_groups=2, start_step=50, skips=())
    for step in loader:                    # Step(number, batches): every group has the same number of batches
        ...
    loader.close()

Threads read, verify, decode and pack ahead of the training loop: PIL, PyAV, hashing and tokenizers release the
interpreter lock, and starting worker processes would cost more than a small run takes. Order does not depend on them.

A MediaError or ShardError carries the sample in `error.sample_id` ("source/id"). A sample is skipped only when its id
is in `skips`: a person decides that in the recipe (stages.STAGE.skip_samples), which is stored before the stage goes
on. A skipped sample keeps its place in the pack as tokens without target.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer import cache, storage
from trainer.data.batch import PackedBatch, pack_batch, without_targets
from trainer.data.encode import Encoded, encode
from trainer.data.layout import Fit, Rules, layout
from trainer.data.plan import EMPTY, Place, Plan, assign
from trainer.data.shards import DEFAULT_CACHE_BYTES, ShardReader, Source
from trainer.errors import CountMismatch, DataError, MediaError, PlanError, QwenVLError


@dataclass(frozen=True)
class Step:
    number: int
    batches: list[PackedBatch]
    target_tokens: int
    """Of all groups: the loss's denominator, less skips."""
    pairs: int
    """Of all groups: DPO's denominator, less skips."""
    left_out: dict[str, int]
    """Of all groups: uses of skipped samples, and the target tokens they would have had: {samples, target_tokens}."""


class Loader:
    """`rules` by source name, as layout.stage_rules gives them; `out` is what the plan's source URIs are relative to.

    Raises PlanError when sources, rules or groups are not those of the plan.
    """

    def __init__(
        self,
        plan: Plan,
        out: str,
        rules: Mapping[str, Rules],
        *,
        group: int,
        num_groups: int,
        start_step: int = 0,
        end_step: int | None = None,
        skips: Iterable[str] = (),
        cache_dir: str | None = None,
        cache_bytes: int | None = None,
        threads: int = 1,
        prefetch_packs: int = 4,
    ):
        self.plan, self.group, self.num_groups = plan, group, num_groups
        self.step = start_step
        self.end_step = plan.num_steps if end_step is None else min(end_step, plan.num_steps)
        self.skips = frozenset(skips)
        self.threads, self.prefetch_packs = threads, prefetch_packs
        self.sources = [_open(out, facts) for facts in plan.sources]
        self.rules = [_rules(rules, facts) for facts in plan.sources]
        cache_bytes = cache_bytes or cache.limit_bytes() or DEFAULT_CACHE_BYTES
        self.readers = [
            ShardReader(source, cache_dir=cache_dir, cache_bytes=cache_bytes // len(self.sources))
            for source in self.sources
        ]
        some = self.rules[0]
        self.pad_id = some.tokenizer.id(some.family.markers.eos)
        self.shape = {"patch_width": some.family.patch_width, "grid_columns": some.family.grid_columns}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        if not 0 <= group < num_groups:
            raise PlanError("no such group", where=plan.uri, expected=f"0 to {num_groups - 1}", got=group)
        if plan.num_steps:
            assign(plan, 0, num_groups)  # raises when there are more groups than lanes

    @property
    def state(self) -> dict[str, Any]:
        """The step that comes next; printable, and enough to go on at any number of groups."""
        return {"plan_digest": self.plan.digest, "step": self.step, "skips": sorted(self.skips)}

    def __iter__(self) -> Iterator[Step]:
        """From `self.step` on. Raises what reading or decoding raised, at the step it belongs to."""
        pool = self._pool = ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="loader")
        waiting: deque[tuple[int, list[Future[PackedBatch]]]] = deque()
        ahead = self.step
        try:
            while self.step < self.end_step:
                while ahead < self.end_step and (not waiting or _pending(waiting) < self.prefetch_packs):
                    packs = assign(self.plan, ahead, self.num_groups)[self.group]
                    waiting.append((ahead, [pool.submit(self.batch, pack) for pack in packs]))
                    ahead += 1
                number, futures = waiting.popleft()
                batches = [future.result() for future in futures]
                targets, pairs, left_out = self.denominators(number)
                self.step = number + 1
                yield Step(number, batches, targets, pairs, left_out)
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()
            pool.shutdown(wait=True, cancel_futures=True)

    def denominators(self, step: int) -> tuple[int, int, dict[str, int]]:
        """(target tokens, preference pairs) of a step over all groups: the plan's, less what is skipped; and that."""
        targets, pairs = self.plan.target_tokens(step), self.plan.pairs(step)
        left_out = {"samples": 0, "target_tokens": 0}
        if not self.skips:
            return targets, pairs, left_out
        for index in self.plan.packs_of(step).tolist():
            for place in self.plan.pack(index).places if index != EMPTY else ():
                if self.sample_id(place) in self.skips:
                    targets -= place.targets
                    pairs -= self.plan.sources[place.source]["kind"] == "preference"
                    left_out["samples"] += 1
                    left_out["target_tokens"] += place.targets
        return targets, pairs, left_out

    def sample_id(self, place: Place) -> str:
        source = self.sources[place.source]
        with self._lock:
            return f"{self.plan.sources[place.source]['name']}/{source.sample_id(place.shard, place.row)}"

    # ---------------------------------------------------------------- one pack

    def batch(self, index: int) -> PackedBatch:
        """The pack `index` of the plan, or an empty one."""
        places = self.plan_pack(index) if index != EMPTY else ()
        ids = [self.sample_id(place) for place in places]
        samples = [self._encoded(place, name) for place, name in zip(places, ids, strict=True)]
        return pack_batch(samples, ids, length=self.plan.length, pad_id=self.pad_id, pack=index, **self.shape)

    def plan_pack(self, index: int) -> tuple[Place, ...]:
        with self._lock:  # the plan keeps the segment it read last
            return self.plan.pack(index).places

    def _encoded(self, place: Place, name: str) -> Encoded:
        if name in self.skips:
            return without_targets(place.tokens, self.pad_id, **self.shape)
        rules = self.rules[place.source]
        try:
            with self._lock:
                sample = self.sources[place.source].sample(place.shard, place.row)
            found = layout(sample, place.variant, Fit(*self.plan.fits[place.fit]), rules)
            _compare(place, (found.num_tokens, found.num_patches, found.num_targets), name)
            files = self.readers[place.source].media(place.shard, place.row)
            where = f"{name}, {self.plan.sources[place.source]['uri']} shard {place.shard} row {place.row}"
            encoded = encode(sample, found, files, rules, where=where)
        except MediaError as error:
            told = MediaError(error.what, where=error.where, expected=error.expected, got=error.got, do=self._do(name))
            told.sample_id = name
            raise told from error
        except QwenVLError as error:
            error.sample_id = name
            raise
        except ValueError as error:
            raise DataError("a planned sample cannot be laid out", where=name, got=str(error)) from error
        _compare(place, (len(encoded.ids), len(encoded.patches), len(encoded.label_ids)), name)
        return encoded

    def _do(self, name: str) -> str:
        stage = self.plan.header["facts"].get("stage", "STAGE")
        field = f"stages.{stage}.skip_samples"
        return (
            f"repair the file and prepare again, or leave the sample out and go on: --set '{field}="
            f"{json.dumps(sorted({*self.skips, name}))}' --accept-change {field}"
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)  # before the files under its threads go away
        for reader in self.readers:
            reader.close()


def _pending(waiting: deque[tuple[int, list[Future[PackedBatch]]]]) -> int:
    return sum(len(futures) for _, futures in waiting)


def _open(out: str, facts: Mapping[str, Any]) -> Source:
    source = Source.open(storage.join(out, facts["uri"]))
    if source.digest != facts["digest"]:
        raise PlanError(
            "a source is not the one that was planned",
            where=source.uri,
            expected=facts["digest"],
            got=source.digest,
            do="prepare the stage again",
        )
    return source


def _rules(rules: Mapping[str, Rules], facts: Mapping[str, Any]) -> Rules:
    name = facts["name"]
    if name not in rules:
        raise PlanError("the stage has no rules for a planned source", where=name, expected=sorted(rules))
    if (found := rules[name].digest) != facts["rules_digest"]:
        raise PlanError(
            "tokenizer, pixels or rendering differ from the plan's",
            where=f"source {name}",
            expected=facts["rules_digest"],
            got=found,
            do="prepare the stage again",
        )
    return rules[name]


def _compare(place: Place, found: tuple[int, int, int], name: str) -> None:
    """Every pack is compared with the plan: the loss's denominator comes from there."""
    expected = (place.tokens, place.patches, place.targets)
    if found == expected:
        return
    raise CountMismatch(
        "a sample's counts differ from the plan's",
        where=f"{name} (variant {place.variant}, fit {place.fit})",
        expected="{} tokens, {} patches, {} targets".format(*expected),
        got="{} tokens, {} patches, {} targets".format(*(int(np.int64(value)) for value in found)),
        do="the plan was made by another version of the data code: prepare the stage again",
    )
