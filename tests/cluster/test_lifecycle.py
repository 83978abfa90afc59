"""Up and down: nothing is left, also of a cluster whose owner was killed in the middle. Before any other test: the
cluster must be down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import control, lifecycle, programs
from tests.cluster.bench import ROOT
from tests.cluster.processes import SYSCTLS, leftovers, wait_for
from trainer.errors import UsageError

pytestmark = pytest.mark.cluster


@pytest.fixture
def nothing_up() -> None:
    if os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG's cluster is not ours to start and stop")
    if lifecycle.current() is not None:
        pytest.skip("a cluster is up that should stay; make cluster-down first")


def test_what_a_killed_start_left_is_removed(nothing_up: None) -> None:
    settings = {key: Path("/proc/sys", key).read_text() for key in SYSCTLS}
    programs.build()
    command = [sys.executable, "-u", "-m", "tests.cluster", "up"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as starting:
        assert starting.stdout is not None
        for line in starting.stdout:
            if "control plane" in line:
                break
        wait_for("a kubelet", lambda: any(name.startswith("kubelet") for name, *_ in control.running()))
        starting.send_signal(signal.SIGKILL)
    left = leftovers()
    assert any("processes" in one for one in left) and any("network" in one for one in left), left
    lifecycle.down()
    assert leftovers() == []
    assert {key: Path("/proc/sys", key).read_text() for key in SYSCTLS} == settings
    lifecycle.down()  # again is fine


def test_a_machine_that_lacks_something_is_told_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda program: None)
    monkeypatch.setattr(programs, "folder", lambda: Path("/nowhere"))
    with pytest.raises(UsageError, match=r"containerd .*Go 1\.26"):
        lifecycle.check_machine()
