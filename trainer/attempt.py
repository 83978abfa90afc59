"""One attempt at a stage in storage: its number, its events, its end, and what a node says while it lives."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from trainer import heartbeat, storage
from trainer.errors import QwenVLError
from trainer.heartbeat import Heartbeat, Termination
from trainer.ranks import Ranks, ranks_in

LINES_EVERY_S = 60.0
NUM_LAST_LINES = 200


def attempts(stage_uri: str) -> list[int]:
    """Numbers of the attempts made so far, ascending."""
    return sorted(int(name) for name in storage.list_dir(storage.join(stage_uri, "attempts")) if name.isdigit())


class Attempt:
    """OUT/STAGE/attempts/NNNN, as one node writes it. Events of a node are one object, written again at each event."""

    def __init__(self, stage_uri: str, node: str, number: int, *, one_node: bool):
        self.stage_uri, self.node, self.number = stage_uri, node, number
        self.uri = storage.join(stage_uri, "attempts", f"{number:04d}")
        self._events: list[dict[str, Any]] = []
        self._events_name = "events.jsonl" if one_node else f"events-{node}.jsonl"

    @classmethod
    def begin(cls, stage_uri: str, node: str, number: int | None, *, one_node: bool) -> Attempt:
        """The attempt with this number; without one the next free number is taken, which create-once makes ours."""
        if number is not None:
            return cls(stage_uri, node, number, one_node=one_node)
        number = max(attempts(stage_uri), default=0) + 1
        while True:
            attempt = cls(stage_uri, node, number, one_node=one_node)
            mark = {"attempt": number, "node": node, "pid": os.getpid(), "begun_at": heartbeat.utc()}
            try:
                storage.create_once(storage.join(attempt.uri, "attempt.json"), storage.json_bytes(mark))
                return attempt
            except FileExistsError:
                number += 1

    def event(self, what: str, **facts: Any) -> None:
        """Add an event. Storage that does not answer is told and does not end the attempt."""
        self._events.append(
            {"event": what, "time": heartbeat.utc(), "attempt": self.number, "node": self.node, **facts}
        )
        data = "".join(json.dumps(event) + "\n" for event in self._events).encode()
        try:
            storage.write_bytes(storage.join(self.uri, self._events_name), data)
        except QwenVLError as error:
            print(f"an event was not stored: {error}", file=sys.stderr, flush=True)

    def finish(self, end: Termination, log_folder: str) -> None:
        """Store the end, and the logs when they are not in storage already."""
        if storage.local_path(self.uri) is None:
            for path in sorted(Path(log_folder).glob("rank*.log")):
                storage.upload_file(str(path), storage.join(self.uri, path.name))
        content = storage.json_bytes(end.model_dump(mode="json"))
        storage.write_bytes(storage.join(self.uri, f"end-{self.node}.json"), content)


class Reporter:
    """Writes the node's heartbeat and last lines from a thread of its own: slow storage never delays the launcher."""

    def __init__(self, attempt: Attempt, run_dir: str, log_folder: str, ranks: Ranks, *, every_s: float):
        self.attempt, self.ranks, self.every_s = attempt, ranks, every_s
        self.run_dir, self.log_folder = run_dir, log_folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True, name="qwenvl-report")
        self._sequence = 0
        self._told = False

    def start(self) -> Reporter:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _report(self) -> None:
        since_lines = LINES_EVERY_S
        while True:
            self._try(self._beat)
            since_lines += self.every_s
            if since_lines >= LINES_EVERY_S and storage.local_path(self.attempt.uri) is None:
                since_lines = 0.0
                self._try(self._lines)
            if self._stop.wait(self.every_s):
                self._try(self._beat)
                return

    def _try(self, call: Any) -> None:
        try:
            call()
            self._told = False
        except QwenVLError as error:
            if not self._told:
                print(f"the heartbeat was not stored: {error}", file=sys.stderr, flush=True)
            self._told = True

    def _beat(self) -> None:
        found = {rank: heartbeat.read_pulse(self.run_dir, rank) for rank in ranks_in(self.run_dir)}
        beats = [beat for beat in found.values() if beat is not None]
        self._sequence += 1
        slowest = min(beats, key=lambda beat: (beat.step, beat.sequence), default=None)
        committed = [beat.committed_step for beat in beats if beat.committed_step is not None]
        heartbeat.write_heartbeat(
            self.attempt.stage_uri,
            Heartbeat(
                node=self.attempt.node,
                attempt=self.attempt.number,
                sequence=self._sequence,
                beats=sum(beat.sequence for beat in beats),
                step=slowest.step if slowest else 0,
                phase=slowest.phase if slowest else "start",
                phase_limit_s=slowest.phase_limit_s if slowest else heartbeat.PHASE_LIMIT_S["start"],
                committed_step=max(committed, default=None),
                figures=slowest.figures if slowest else None,
                ranks_alive=tuple(
                    beat.rank for beat in beats if heartbeat.read_ending(self.run_dir, beat.rank) is None
                ),
                written_at=heartbeat.utc(),
            ),
        )

    def _lines(self) -> None:
        parts = []
        for path in sorted(Path(self.log_folder).glob("rank*.log")):
            parts += [f"==> {path.name}", *last_lines(path, NUM_LAST_LINES)]
        text = "\n".join(parts) + "\n"
        storage.write_bytes(storage.join(self.attempt.uri, f"last-lines-{self.attempt.node}.txt"), text.encode())


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
