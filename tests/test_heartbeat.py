"""What ranks and nodes say about themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import heartbeat
from trainer.heartbeat import Ending, Figures, Heartbeat, Pulse


def test_a_pulse_is_read_back_and_grows_with_every_beat(tmp_path: Path) -> None:
    pulse = Pulse(str(tmp_path), 3)
    first = heartbeat.read_pulse(str(tmp_path), 3)
    pulse.beat(step=5, phase="train", committed_step=4)
    second = heartbeat.read_pulse(str(tmp_path), 3)
    assert first is not None and second is not None
    assert (first.sequence, second.sequence) == (0, 1)
    assert (second.step, second.phase, second.committed_step, second.phase_limit_s) == (5, "train", 4, 600)
    assert heartbeat.pulse_path(str(tmp_path), 3).stat().st_size == heartbeat.PULSE_BYTES
    assert heartbeat.read_pulse(str(tmp_path), 0) is None


def test_a_reader_never_sees_half_a_beat(tmp_path: Path) -> None:
    pulse = Pulse(str(tmp_path), 0)
    for step in range(300):
        pulse.beat(step=10 ** (step % 12), phase="train" if step % 2 else "commit")
        seen = heartbeat.read_pulse(str(tmp_path), 0)
        assert seen == pulse.state


def test_figures_fit_into_a_pulse_and_what_is_not_finite_never_leaves_the_rank(tmp_path: Path) -> None:
    pulse = Pulse(str(tmp_path), 511)
    longest = Figures(num_steps=10**9, loss=-1.2345678901234567e-300, tokens_per_s=1.2345678901234567e300)
    pulse.beat(step=10**9, phase="preflight", limit_s=86400.123456, committed_step=10**9, figures=longest)
    found = heartbeat.read_pulse(str(tmp_path), 511)
    assert found is not None and found.figures == longest
    # storage takes no NaN: a heartbeat with one would end the thread that writes them
    pulse.beat(figures=Figures(num_steps=1, loss=float("nan"), tokens_per_s=1.0))
    again = heartbeat.read_pulse(str(tmp_path), 511)
    assert again is not None and again.figures == longest and again.sequence == found.sequence + 1


def test_an_ending_is_left_where_the_launcher_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = Ending(rank=1, code=65, error="the image cannot be read", step=3)
    monkeypatch.delenv(heartbeat.RUN_DIR, raising=False)
    heartbeat.write_ending(ending)  # no launcher: nothing is written
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(heartbeat.RUN_DIR, str(tmp_path))
    heartbeat.write_ending(ending)
    assert heartbeat.read_ending(str(tmp_path), 1) == ending


def test_heartbeats_of_all_nodes_are_found(tmp_path: Path) -> None:
    for node in ("a", "b"):
        beat = Heartbeat(node=node, attempt=1, sequence=2, step=9, phase="train", phase_limit_s=600, ranks_alive=(0, 1))
        heartbeat.write_heartbeat(str(tmp_path), beat)
    assert {name: beat.step for name, beat in heartbeat.read_heartbeats(str(tmp_path)).items()} == {"a": 9, "b": 9}
