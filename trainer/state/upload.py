"""Uploader: a snapshot becomes a committed checkpoint while training goes on.

    main thread        commit(snapshot) -> returns at once;  poll() at every step: raises what failed in the background
    each rank, thread  sha256, create-once of its own object, report {key, size, sha256} through the process group's
    store rank 0, thread     waits for all reports, writes the metrics part, then the manifest (create-once), then
    retention

No collective is issued: ranks meet in the key-value store that the process group began with, so a slow upload never
stands in the way of a gradient reduction. One commit is in flight at a time: the next one waits for it, and the wait
is counted as stall. A crash at any point leaves the checkpoint before or this one.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer import heartbeat, storage
from trainer import manifest as manifests
from trainer.errors import PeerLost, QwenVLError, StorageError
from trainer.manifest import Change, Manifest, MetricsPart
from trainer.observe.metrics import Row, encode_rows
from trainer.state.snapshot import Snapshot

TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Identity:
    """What every manifest of this stage and attempt says about itself."""

    stage: str
    attempt: int
    stage_digest: str
    plan_digest: str
    base_model_digest: str
    accepted_changes: tuple[Change, ...] = ()


@dataclass
class _Flight:
    """One commit on its way."""

    number: int
    step: int
    thread: threading.Thread | None = None
    error: BaseException | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Uploader:
    """Commits of one stage. Made by every rank after the process group exists.

    Args:
        stage_uri: OUT/STAGE.
        keep: checkpoints that stay.
        resumed: the manifest that this attempt started from; its metrics parts stay listed.
        store: where ranks meet; default: the process group's own.
    """

    def __init__(
        self,
        stage_uri: str,
        identity: Identity,
        *,
        keep: int = 2,
        resumed: Manifest | None = None,
        store: Any = None,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stage_uri, self.identity, self.keep = stage_uri, identity, keep
        self.timeout_s, self.clock = timeout_s, clock
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.committed: int | None = None
        """Last step committed in this attempt, as far as this rank knows."""
        self.stall_s = 0.0
        """Seconds that training stood still for copies and for commits before, together."""
        meeting = store or default_store()
        self._store = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage] - documented, not exported
            f"qwenvl/commit/{identity.stage}", meeting
        )
        self._parts: tuple[MetricsPart, ...] = resumed.metrics if resumed else ()
        self._flight: _Flight | None = None
        self._number = 0
        # A resumed step is committed already: an attempt that only hands over does not commit it again.
        self._last_step: int | None = resumed.step if resumed else None

    # ------------------------------------------------------------ main thread

    def commit(
        self,
        snapshot: Snapshot,
        *,
        loader: Mapping[str, Any],
        skips: Iterable[str] = (),
        metrics: Iterable[Row] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to commit. All ranks call it at the same step; rank 0's loader state, skips, metrics and extra are
        stored.

        A step that was begun already is not begun twice.

        Raises:
            StorageError, PeerLost, CheckpointError: of the commit before this one.
        """
        if snapshot.step == self._last_step:
            return
        began = self.clock()
        self._settle()
        self.stall_s += self.clock() - began + snapshot.stall_s
        self._number += 1
        self._last_step = snapshot.step
        facts = {"loader": dict(loader), "skips": tuple(skips), "metrics": list(metrics), "extra": dict(extra or {})}
        flight = _Flight(self._number, snapshot.step, facts=facts)
        flight.thread = threading.Thread(target=self._run, args=(flight, snapshot), daemon=True, name="qwenvl-commit")
        self._flight = flight
        snapshot.written.clear()
        flight.thread.start()

    def poll(self) -> int | None:
        """Last committed step of this attempt; raises what went wrong in the background. Cheap enough for every
        step."""
        flight = self._flight
        if flight is not None and flight.thread is not None and not flight.thread.is_alive():
            if flight.error is not None:
                raise flight.error
            if self.rank == 0 or self._store.check([f"{flight.number}/done"]):
                self._landed(flight)
        return self.committed

    def wait(self) -> int | None:
        """Block until everything begun is committed, on every rank; the last committed step.

        Raises:
            StorageError, PeerLost, CheckpointError
        """
        self._settle()
        return self.committed

    def _settle(self) -> None:
        flight = self._flight
        if flight is None:
            return
        assert flight.thread is not None
        flight.thread.join(self.timeout_s)
        if flight.thread.is_alive():
            raise StorageError(
                "a commit did not end in time", where=f"step {flight.step}", expected=f"{self.timeout_s:.0f} s"
            )
        if flight.error is not None:
            raise flight.error
        if self.rank != 0:
            self._wait_for([f"{flight.number}/done"], flight, "rank 0's manifest")
        self._landed(flight)

    def _landed(self, flight: _Flight) -> None:
        self.committed, self._flight = flight.step, None
        heartbeat.pulse().beat(committed_step=flight.step)

    # ------------------------------------------------------------ background

    def _run(self, flight: _Flight, snapshot: Snapshot) -> None:
        try:
            try:
                entry = self._upload(snapshot)
            finally:
                snapshot.written.set()
            self._store.set(
                f"{flight.number}/{self.rank}", json.dumps({"object": entry.model_dump(), "of": snapshot.num_elements})
            )
            if self.rank == 0:
                self._finish(flight, snapshot)
                self._store.set(f"{flight.number}/done", str(flight.step))
        except BaseException as error:
            flight.error = error
            self._report_failure(flight, error)

    def _report_failure(self, flight: _Flight, error: BaseException) -> None:
        try:
            if self.rank != 0:
                told = error.args[0] if isinstance(error, QwenVLError) else f"{type(error).__name__}: {error}"
                self._store.set(f"{flight.number}/{self.rank}", json.dumps({"error": told}))
        except Exception as second:  # the store is gone as well: this rank's own error is what counts
            print(f"rank {self.rank} could not report its failed upload: {second}", file=sys.stderr, flush=True)

    def _upload(self, snapshot: Snapshot) -> manifests.Object:
        key = manifests.object_key(self.identity.attempt, self.rank, secrets.token_hex(4))
        entry = manifests.Object(
            key=key,
            rank=self.rank,
            size_bytes=len(snapshot.buffer),
            header_bytes=snapshot.header_bytes,
            sha256=storage.sha256_bytes(snapshot.buffer),
        )
        storage.create_once(storage.join(manifests.step_folder(self.stage_uri, snapshot.step), key), snapshot.buffer)
        return entry

    def _finish(self, flight: _Flight, snapshot: Snapshot) -> None:
        keys = [f"{flight.number}/{rank}" for rank in range(self.world_size)]
        self._wait_for(keys, flight, "every rank's object")
        reports = [json.loads(self._store.get(key)) for key in keys]
        for rank, report in enumerate(reports):
            if "error" in report:
                raise StorageError(
                    f"rank {rank} could not store its part of the checkpoint",
                    where=f"step {flight.step}",
                    got=report["error"],
                )
        parts = self._parts + self._metrics_part(flight)
        manifests.commit(self.stage_uri, self._manifest(flight, snapshot, reports, parts))
        self._parts = parts
        for key in keys:
            self._store.delete_key(key)
        try:
            manifests.retain(self.stage_uri, self.keep)
        except StorageError as error:  # the checkpoint exists; old ones are removed after the next commit
            print(f"old checkpoints of {self.stage_uri} were not removed: {error}", file=sys.stderr, flush=True)

    def _metrics_part(self, flight: _Flight) -> tuple[MetricsPart, ...]:
        rows: list[Row] = flight.facts["metrics"]
        if not rows:
            return ()
        data = encode_rows(rows)
        key = manifests.metrics_key(flight.step, self.identity.attempt, secrets.token_hex(4))
        storage.create_once(storage.join(self.stage_uri, key), data)
        part = MetricsPart(
            key=key,
            first_step=rows[0].step,
            last_step=rows[-1].step,
            size_bytes=len(data),
            sha256=storage.sha256_bytes(data),
        )
        return (part,)

    def _manifest(
        self, flight: _Flight, snapshot: Snapshot, reports: list[dict], parts: tuple[MetricsPart, ...]
    ) -> Manifest:
        identity = self.identity
        return Manifest(
            stage=identity.stage,
            step=flight.step,
            attempt=identity.attempt,
            nonce=secrets.token_hex(4),
            world_size=self.world_size,
            stage_digest=identity.stage_digest,
            plan_digest=identity.plan_digest,
            base_model_digest=identity.base_model_digest,
            objects=tuple(manifests.Object.model_validate(report["object"]) for report in reports),
            num_parameters=sum(report["of"] for report in reports),
            optimizer=snapshot.optimizer,
            scheduler=snapshot.scheduler,
            loader=flight.facts["loader"],
            skips=flight.facts["skips"],
            rng={"kept": "object header", "ranks": self.world_size},
            metrics=parts,
            accepted_changes=identity.accepted_changes,
            extra=flight.facts["extra"],
            written_at=heartbeat.utc(time.time()),
        )

    def _wait_for(self, keys: list[str], flight: _Flight, what: str) -> None:
        """Poll: a blocking wait would hold the store's connection against the main thread."""
        end, pause = self.clock() + self.timeout_s, 0.002
        while not self._store.check(keys):
            if self.clock() > end:
                missing = [key.split("/")[1] for key in keys if not self._store.check([key])]
                raise PeerLost(
                    f"waited in vain for {what}",
                    where=f"step {flight.step}",
                    expected=f"within {self.timeout_s:.0f} s",
                    got=f"nothing from {', '.join(missing[:8])}",
                )
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)


def default_store() -> Any:
    """The store that the process group met in. torch has no public name for it; its own elastic and checkpoint code
    use this one."""
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=TIMEOUT_S))
    return store
