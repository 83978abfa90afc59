"""The plan: which samples make which pack, which packs make which step and lane. Made once per stage, on CPU; pure.

    make_plan(sources, order) -> Plan      from counts (mixture.SourceCounts) to steps
    plan.write(uri), Plan.read(uri)        plan.json and segment-00000.arrow: memory-mapped columns of a range of steps
    step_packs(plan, step)                 packs by lane
    assign(plan, step, num_groups)         packs by group: the same packs a step, whatever the number of groups

The packs of a window are sorted by cost, cut into steps so that the packs of a step are alike (under ZeRO-3 vision and
language are separate barriers), and the steps are shuffled by seed. Within the first EARLY_STEPS steps one step has the
most patches of all, and one has a pack of text only beside a pack with pictures, if the data has them: what only these
can break, memory or a collective, breaks in minutes and not in days.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from trainer import resolve, storage
from trainer.data.mixture import PLACE_TYPES, Order, Place, Pool, SourceCounts, drops_of, source_table, statistics
from trainer.data.order import mix, unit
from trainer.data.packing import pack_windows
from trainer.errors import PlanError

__all__ = ["Order", "Pack", "Place", "Plan", "SourceCounts", "assign", "drops_of", "make_plan", "step_packs"]

FORMAT = 1
EMPTY = -1
EARLY_STEPS = 10
STRATA = 10
SEGMENT_BYTES = 64 * 1024**2
PACK_TYPES = {"pack_tokens": np.int32, "pack_patches": np.int32, "pack_targets": np.int32, "pack_pairs": np.int32}
BYTES_PER_PLACE = sum(np.dtype(kind).itemsize for kind in PLACE_TYPES.values())


@dataclass(frozen=True)
class Pack:
    index: int
    places: tuple[Place, ...]
    tokens: int
    patches: int
    targets: int
    pairs: int


class Plan:
    """`header` is the content of plan.json. Columns come from memory (just made) or from segment files, the two last
    used of which stay mapped. Threads may share a plan."""

    def __init__(self, header: dict[str, Any], tables: Sequence[pa.Table] | None = None, uri: str | None = None):
        self.header, self.uri = header, uri
        self._tables: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._keep = 2 if tables is None else len(tables)
        self._written = tables
        self._lock = threading.Lock()
        for number, table in enumerate(tables or ()):
            self._tables[number] = _columns(table)

    # ------------------------------------------------------------ facts

    @property
    def digest(self) -> str:
        return self.header["digest"]

    @property
    def num_steps(self) -> int:
        return self.header["num_steps"]

    @property
    def num_packs(self) -> int:
        return self.header["num_packs"]

    @property
    def length(self) -> int:
        return self.header["length"]

    @property
    def patch_budget(self) -> int:
        return self.header["patch_budget"]

    @property
    def lanes(self) -> int:
        return self.header["lanes"]

    @property
    def packs_per_step(self) -> int:
        return self.header["packs_per_step"]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """name, split, kind, uri (relative to OUT), digest, rules_digest and what was used, in order of number."""
        return self.header["sources"]

    @property
    def fits(self) -> list[list[int]]:
        """Rows of layout.Fit."""
        return self.header["fits"]

    @property
    def statistics(self) -> dict[str, Any]:
        return self.header["statistics"]

    @property
    def fill(self) -> float:
        return self.statistics["fill"]

    # ------------------------------------------------------------ steps

    def _segment(self, number: int) -> dict[str, np.ndarray]:
        with self._lock:
            if number not in self._tables:
                assert self.uri is not None
                self._tables[number] = _columns(_read_segment(self.uri, self.header["segments"][number]))
                while len(self._tables) > self._keep:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(number)
            return self._tables[number]

    def _find(self, what: str, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """(position in its segment, the segment's columns) of a step or a pack."""
        for number, facts in enumerate(self.header["segments"]):
            first = facts[f"first_{what}"]
            if first <= index < first + facts[f"num_{what}s"]:
                return index - first, self._segment(number)
        raise PlanError(f"no such {what}", where=self.uri, expected=f"below {self.header[f'num_{what}s']}", got=index)

    def packs_of(self, step: int) -> np.ndarray:
        """int64[packs_per_step]: pack indices by place, lane by lane; EMPTY where a last step is short."""
        at, columns = self._find("step", step)
        return columns["step_packs"][at * self.packs_per_step : (at + 1) * self.packs_per_step]

    def pack(self, index: int) -> Pack:
        at, columns = self._find("pack", index)
        rows = slice(int(columns["pack_offsets"][at]), int(columns["pack_offsets"][at + 1]))
        places = zip(*(columns[name][rows].tolist() for name in PLACE_TYPES), strict=True)
        return Pack(index, tuple(Place(*place) for place in places), *(int(columns[name][at]) for name in PACK_TYPES))

    def _sum(self, step: int, column: str) -> int:
        found = [number for number in self.packs_of(step).tolist() if number != EMPTY]
        total = 0
        for number in found:
            at, columns = self._find("pack", number)
            total += int(columns[column][at])
        return total

    def tokens(self, step: int) -> int:
        """Real tokens of a step, without padding."""
        return self._sum(step, "pack_tokens")

    def patches(self, step: int) -> int:
        return self._sum(step, "pack_patches")

    def target_tokens(self, step: int) -> int:
        """The denominator of the step's loss; less what was skipped (Loader.denominators)."""
        return self._sum(step, "pack_targets")

    def pairs(self, step: int) -> int:
        """Preference pairs of a step: the denominator of DPO's loss."""
        return self._sum(step, "pack_pairs")

    # ------------------------------------------------------------ storage

    def write(self, uri: str) -> None:
        """Segments first, plan.json last: a plan without it does not exist."""
        assert self._written is not None, "only a plan that was just made is written"
        for facts, table in zip(self.header["segments"], self._written, strict=True):
            storage.write_bytes(storage.join(uri, facts["name"]), _bytes_of(table))
        storage.write_json(storage.join(uri, "plan.json"), self.header)
        self.uri = uri

    @classmethod
    def read(cls, uri: str) -> Plan:
        """Raises PlanError: missing, of another format, or edited. Segments are verified when they are first used."""
        where = storage.join(uri, "plan.json")
        try:
            header = storage.read_json(where)
        except FileNotFoundError as error:
            raise PlanError("there is no plan", where=where, do="run the step that prepares this stage") from error
        if header.get("format") != FORMAT:
            raise PlanError("a plan of another format", where=where, expected=FORMAT, got=header.get("format"))
        if (found := _digest(header)) != header["digest"]:
            raise PlanError("the plan was changed", where=where, expected=header["digest"], got=found)
        return cls(header, uri=uri)


def _digest(header: dict[str, Any]) -> str:
    return resolve.digest({key: value for key, value in header.items() if key != "digest"})


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    """One row, one list a column: columns of different lengths in one file, without a copy."""
    combined = {name: table.column(name).chunk(0) for name in table.column_names}
    return {name: column.values.to_numpy(zero_copy_only=True) for name, column in combined.items()}


def _table(columns: dict[str, np.ndarray]) -> pa.Table:
    lists = {
        name: pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values))
        for name, values in columns.items()
    }
    return pa.table(lists)


def _bytes_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _read_segment(uri: str, facts: dict[str, Any]) -> pa.Table:
    where = storage.join(uri, facts["name"])
    try:
        path = storage.local_path(where)
        buffer = pa.memory_map(path).read_buffer() if path else pa.py_buffer(storage.read_bytes(where))
    except FileNotFoundError as error:
        raise PlanError("a segment of the plan is missing", where=where, do="prepare the stage again") from error
    if (found := hashlib.sha256(buffer).hexdigest()) != facts["sha256"]:
        raise PlanError("a segment of the plan is damaged", where=where, expected=facts["sha256"], got=found)
    return pa.ipc.open_file(buffer).read_all()


# ---------------------------------------------------------------- step -> packs -> groups


def step_packs(plan: Plan, step: int) -> list[list[int]]:
    """Pack indices of a step by lane; EMPTY where a last step is short."""
    packs = plan.packs_of(step).tolist()
    per_lane = plan.packs_per_step // plan.lanes
    return [packs[lane * per_lane : (lane + 1) * per_lane] for lane in range(plan.lanes)]


def assign(plan: Plan, step: int, num_groups: int) -> list[list[int]]:
    """Pack indices of a step by group, all of one length: lanes belong to groups in contiguous blocks, a group that is
    short runs EMPTY packs."""
    if not 1 <= num_groups <= plan.lanes:
        raise PlanError(
            "more rank groups than lanes",
            where=plan.uri,
            expected=f"1 to {plan.lanes} groups",
            got=num_groups,
            do="plan with prepare.lanes of at least the number of groups",
        )
    lanes = step_packs(plan, step)
    cuts = [group * plan.lanes // num_groups for group in range(num_groups + 1)]
    groups = [[pack for lane in lanes[a:b] for pack in lane] for a, b in pairwise(cuts)]
    most = max(map(len, groups))
    return [packs + [EMPTY] * (most - len(packs)) for packs in groups]


# ---------------------------------------------------------------- making


def make_plan(sources: Sequence[SourceCounts], order: Order) -> Plan:
    """Raises PlanError when a source of the mixture has nothing that fits, or lanes do not divide a step."""
    _check(sources, order)
    pool = Pool(sources, order)
    packs: list[list[int]] = []
    waiting: list[int] = []
    steps: list[list[int]] = []
    num_tokens = 0
    carried = order.packs_per_step if pool.windows_per_epoch == 1 else None
    closed = pack_windows(
        pool.windows(),
        pool.tokens,
        pool.patches,
        length=order.length,
        patch_budget=order.patch_budget,
        max_carried=carried,
    )
    for number, members in enumerate(closed):
        members = sorted(members)
        if number == 0 and pool.text_pack:
            members.append(pool.text_pack)
        waiting += range(len(packs), len(packs) + len(members))
        packs += members
        made, waiting = _steps(pool, packs, waiting, number, order)
        steps += made
        num_tokens += sum(pool.pack_tokens(packs[index]) for step in made for index in step)
        if order.steps is not None and len(steps) >= order.steps:
            break
        if order.tokens is not None and num_tokens >= order.tokens:
            break
    if waiting and order.steps is None and order.tokens is None:  # one pass ends with a step that may be short
        steps.append(waiting + [EMPTY] * (order.packs_per_step - len(waiting)))
    steps = _cut(pool, packs, _early(pool, packs, steps, order), order)
    return _plan(pool, packs, steps, order)


def _check(sources: Sequence[SourceCounts], order: Order) -> None:
    if order.packs_per_step % order.lanes:
        raise PlanError(
            "a step takes the same number of packs from every lane",
            where="schedule.packs_per_step",
            expected=f"a multiple of {order.lanes} lanes",
            got=order.packs_per_step,
        )
    if not sources:
        raise PlanError("the stage has no source", where="stages.*.data")
    for source in sources:
        refuse_unfit(source, order)


def refuse_unfit(source: SourceCounts, order: Order, sizes: str = "") -> None:
    """
    Args:
        sizes: added to the message: how large the samples are.

    Raises:
        PlanError: no sample of the source fits.
    """
    if (source.fit >= 0).any():
        return
    counted = ", ".join(f"{count} {reason}" for reason, count in drops_of(source).items()) or "it has none"
    raise PlanError(
        "no sample of the source fits the packing",
        where=f"source {source.name} ({source.split})",
        expected=f"at least one within {order.length} tokens and {order.patch_budget} patches",
        got=f"{len(source.row)} samples, dropped: {counted}{sizes}",
        do="raise packing.length or packing.patch_budget, lower pixels.image_min, or take the source out",
    )


def _steps(
    pool: Pool, packs: list[list[int]], waiting: list[int], window: int, order: Order
) -> tuple[list[list[int]], list[int]]:
    """(steps of whole blocks in seeded order, packs left over for the next window). Sorted by vision cost first (it
    differs most between packs), then by the language model's attention, which grows with the square of a sample.
    Like lies beside like within a step; over the steps each tenth of the costs is spread evenly, so that every stretch
    of a stage sees the whole mixture and the loss of one stretch compares with that of another."""
    tokens, patches = pool.tokens, pool.patches

    def cost(index: int) -> tuple[int, int, int]:
        members = np.asarray(packs[index])
        return int(patches[members].sum()), int((tokens[members].astype(np.int64) ** 2).sum()), index

    size = order.packs_per_step
    left = len(waiting) % size
    keep = np.argsort(mix(order.seed, window, 5, np.asarray(waiting, np.int64)), kind="stable")
    spare = {waiting[place] for place in keep[:left].tolist()}
    ordered = sorted((index for index in waiting if index not in spare), key=cost)
    blocks = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    when = np.zeros(len(blocks))
    for stratum in np.array_split(np.arange(len(blocks)), STRATA):
        chance = mix(order.seed, window, 4, stratum)
        when[stratum] = (np.argsort(np.argsort(chance, kind="stable")) + unit(mix(chance, 6))) / max(len(stratum), 1)
    return [blocks[number] for number in np.argsort(when, kind="stable").tolist()], sorted(spare)


def _cut(pool: Pool, packs: list[list[int]], steps: list[list[int]], order: Order) -> list[list[int]]:
    """Exactly as many steps as asked for."""
    if order.steps is not None:
        return steps[: order.steps]
    if order.tokens is not None:
        counts = [sum(pool.pack_tokens(packs[index]) for index in step) for step in steps]
        return steps[: int(np.searchsorted(np.cumsum(counts), order.tokens)) + 1]
    if order.max_packs is not None:
        return steps[: -(-order.max_packs // order.packs_per_step)]
    return steps


def _early(pool: Pool, packs: list[list[int]], steps: list[list[int]], order: Order) -> list[list[int]]:
    """The heaviest step, and text alone beside pictures, within the first EARLY_STEPS steps. Only exchanges places."""
    steps = [list(step) for step in steps]
    first = min(EARLY_STEPS, len(steps))
    if first < 2 or order.lanes < 2:
        return steps

    def patches(index: int) -> int:
        return pool.pack_patches(packs[index]) if index != EMPTY else 0

    weights = [sum(map(patches, step)) for step in steps]
    heaviest = int(np.argmax(weights))
    if heaviest >= first:
        steps[0], steps[heaviest] = steps[heaviest], steps[0]

    def kinds(step: list[int]) -> set[bool]:
        return {patches(index) > 0 for index in step if index != EMPTY}

    if any(len(kinds(step)) == 2 for step in steps[:first]):
        return steps
    everywhere = ((s, p, index) for s, step in enumerate(steps) for p, index in enumerate(step) if index != EMPTY)
    text = next(((s, p) for s, p, index in everywhere if not patches(index)), None)
    host = next((s for s in range(1, first) if all(index != EMPTY and patches(index) for index in steps[s])), None)
    if text is not None and host is not None:
        s, p = text
        steps[host][-1], steps[s][p] = steps[s][p], steps[host][-1]
    return steps


def _places(step: list[int], number: int, order: Order) -> list[int]:
    """Lane-major places of a step's packs. Packs that run at the same time (one a lane) are neighbours in cost; the
    heavier of them go to another lane each step."""
    lanes, per_lane = order.lanes, order.packs_per_step // order.lanes
    places = [EMPTY] * len(step)
    for at, index in enumerate(step):
        micro, lane = divmod(at, lanes)
        places[(lane + number) % lanes * per_lane + micro] = index
    return places


def _plan(pool: Pool, packs: list[list[int]], steps: list[list[int]], order: Order) -> Plan:
    """Numbers packs in the order in which steps use them and cuts the columns into segments."""
    places = [_places(step, number, order) for number, step in enumerate(steps)]
    used = [index for step in places for index in step if index != EMPTY]
    number = {index: position for position, index in enumerate(used)}
    segments, tables = [], []
    start = first_pack = 0
    while start < len(places):
        stop, size = start, 0
        while stop < len(places) and (size < SEGMENT_BYTES or stop == start):
            size += BYTES_PER_PLACE * sum(len(packs[index]) for index in places[stop] if index != EMPTY)
            stop += 1
        mine = [index for step in places[start:stop] for index in step if index != EMPTY]
        table = _segment_table(pool, [packs[index] for index in mine], places[start:stop], number)
        data = _bytes_of(table)
        segments.append(
            {
                "name": f"segment-{len(segments):05d}.arrow",
                "first_step": start,
                "num_steps": stop - start,
                "first_pack": first_pack,
                "num_packs": len(mine),
                "size_bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        tables.append(table)
        start, first_pack = stop, first_pack + len(mine)
    header = {
        "format": FORMAT,
        "length": order.length,
        "patch_budget": order.patch_budget,
        "lanes": order.lanes,
        "packs_per_step": order.packs_per_step,
        "seed": order.seed,
        "num_steps": len(places),
        "num_packs": len(used),
        "facts": dict(order.facts),
        "predecessor": None,
        "fits": pool.fits,
        "segments": segments,
        "sources": source_table(pool, [packs[index] for index in used]),
        "statistics": statistics(pool, [packs[index] for index in used], order),
    }
    header["digest"] = _digest(header)
    return Plan(header, tables)


def _segment_table(pool: Pool, packs: list[list[int]], places: list[list[int]], number: dict[int, int]) -> pa.Table:
    members = np.array([entry for pack in packs for entry in pack], np.int64)
    sizes = np.array([len(pack) for pack in packs], np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    columns = {name: pool.columns[name][members] for name in PLACE_TYPES}
    preference = np.array([source.kind == "preference" for source in pool.sources], np.int32)
    per_place = [columns["tokens"], columns["patches"], columns["targets"], preference[columns["source"]]]
    for name, values in zip(PACK_TYPES, per_place, strict=True):
        sums = np.add.reduceat(values.astype(np.int64), offsets[:-1]) if len(sizes) else np.zeros(0, np.int64)
        columns[name] = sums.astype(PACK_TYPES[name])
    columns["pack_offsets"] = offsets
    columns["step_packs"] = np.array([number.get(index, EMPTY) for step in places for index in step], np.int64)
    return _table(columns)
