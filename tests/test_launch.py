"""The launcher: codes are kept, the first cause is named, nobody outlives a parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer import launch
from trainer.attempt import attempts
from trainer.edge import code_of
from trainer.errors import PeerLost, UsageError
from trainer.heartbeat import Termination, read_heartbeats
from trainer.launch import parse

OUTLIVE_S = 10.0


def command(stage: Path, behaviour: str, rank: int = 1, *flags: str, procs: int = 2) -> list[str]:
    own = [
        "--nproc-per-node",
        str(procs),
        "--module",
        "tests.launch_program",
        "--stage-uri",
        str(stage),
        "--heartbeat",
        "0.3",
        "--peer-grace",
        "1",
    ]
    return [sys.executable, "-m", "trainer.launch", *own, *flags, "--", behaviour, str(rank)]


def clean_env(**more: str) -> dict[str, str]:
    dropped = ("QWENVL_", "PET_", "RANK", "WORLD_SIZE", "MASTER_")
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(dropped)},
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run(stage: Path, behaviour: str, rank: int = 1, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    args = command(stage, behaviour, rank, *flags)
    return subprocess.run(args, env=clean_env(**more), capture_output=True, text=True, timeout=90, check=False)


def ending(stage: Path) -> Termination:
    folder = stage / "attempts" / f"{attempts(str(stage))[-1]:04d}"
    return Termination.model_validate_json(next(folder.glob("end-*.json")).read_bytes())


@pytest.mark.parametrize(
    ("behaviour", "rank", "want_code", "want_rank", "want_decision", "want_error"),
    [
        ("done", 1, 0, -1, "done", ""),
        (
            "media",
            1,
            65,
            1,
            "permanent",
            "the image cannot be read\n  where: cat.png\n  expected: PNG\n  got: 7 bytes\n  do: restore the file",
        ),
        ("bug", 0, 1, 0, "retry-once", "ZeroDivisionError: one over nothing"),
        ("killed", 1, 137, 1, "retry", "killed by SIGKILL"),
        ("hang", 1, 145, 1, "retry", "no progress within the phase's limit"),
        ("peer-first", 1, 65, 0, "permanent", "where: late.png"),
    ],
)
def test_the_first_cause_decides_the_code_and_is_the_last_block(
    tmp_path: Path, behaviour: str, rank: int, want_code: int, want_rank: int, want_decision: str, want_error: str
) -> None:
    patience = ("--peer-grace", "10") if behaviour == "peer-first" else ()  # the late one may have to wait for a core
    done = run(tmp_path / "sft", behaviour, rank, *patience)
    end = ending(tmp_path / "sft")
    assert done.returncode == want_code == end.code
    assert (end.rank, end.decision) == (want_rank, want_decision)
    assert want_error in end.error
    assert done.stderr.count(end.error) == (1 if want_code else 0) or not end.error
    if want_code:
        assert done.stderr.startswith("attempt 1 ended: rank")
    assert "rank 0 of 2" in done.stdout


def test_a_python_bug_leaves_its_traceback_in_the_ranks_log_and_a_hang_its_stacks(tmp_path: Path) -> None:
    run(tmp_path / "a", "bug", 1)
    run(tmp_path / "b", "hang", 1)
    assert "Traceback" in (tmp_path / "a/attempts/0001/rank1.log").read_text()
    assert "in main" in (tmp_path / "b/attempts/0001/rank1.log").read_text()


def test_every_attempt_has_its_own_folder_and_the_termination_message_is_written(tmp_path: Path) -> None:
    message = tmp_path / "termination-log"
    for _ in range(2):
        run(tmp_path / "sft", "media", 0, QWENVL_TERMINATION_LOG=str(message))
    assert attempts(str(tmp_path / "sft")) == [1, 2]
    assert json.loads(message.read_text())["attempt"] == 2
    events = [
        json.loads(line)["event"] for line in (tmp_path / "sft/attempts/0002/events.jsonl").read_text().splitlines()
    ]
    assert events == ["start", "rank ended", "end"]


# ---------------------------------------------------------------- signals and sudden death


@contextlib.contextmanager
def running(args: list[str], **more: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        args, env=clean_env(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def wait_for(what: Callable[[], object], timeout_s: float = 40.0) -> float:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < timeout_s, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


def pids(stage: Path, word: str, count: int) -> list[int]:
    """Process ids that ranks have printed after `word`."""

    def found() -> list[int]:
        text = "".join(path.read_text() for path in stage.glob("attempts/*/rank*.log"))
        lines = [
            line.split()
            for line in text.splitlines()
            if f"{word} pid " in line or (word == "rank" and line.startswith("rank "))
        ]
        return [int(words[words.index("pid") + 1]) for words in lines]

    wait_for(lambda: len(found()) >= count)
    return found()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sigterm_reaches_the_ranks_and_a_commit_made_in_time_is_told(tmp_path: Path) -> None:
    with running(command(tmp_path / "sft", "commit")) as launcher:
        pids(tmp_path / "sft", "rank", 2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=30) == 143
    end = ending(tmp_path / "sft")
    assert (end.decision, end.committed_step) == ("preempted", 4)


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    flags = ("--shutdown-timeout", "0.1")
    with running(command(tmp_path / "sft", "commit", 1, *flags)) as launcher:
        ranks = pids(tmp_path / "sft", "rank", 2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=30) == PeerLost.code  # a retry that counts: nothing was committed
    assert ending(tmp_path / "sft").committed_step is None
    assert not any(alive(pid) for pid in ranks)


@pytest.mark.parametrize("victim", ["top", "group"])
def test_ranks_die_with_the_launcher(tmp_path: Path, victim: str) -> None:
    with running(command(tmp_path / "sft", "helper")) as launcher:
        ranks = pids(tmp_path / "sft", "rank", 2)
        helpers = pids(tmp_path / "sft", "helper", 2)  # untied on purpose; real ones tie themselves (trainer/warm.py)
        if victim == "top":
            launcher.kill()
        else:
            os.killpg(launcher.pid, signal.SIGKILL)
        took = wait_for(lambda: not any(alive(pid) for pid in ranks), OUTLIVE_S)
        assert took < OUTLIVE_S
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)


def test_without_the_tie_a_rank_outlives_its_parent(tmp_path: Path) -> None:
    """The control of the test above: the same death without PR_SET_PDEATHSIG."""
    code = (
        "import subprocess, sys, time; child = [sys.executable, '-c', 'import time; time.sleep(60)'];"
        "print(subprocess.Popen(child).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    time.sleep(0.3)
    assert alive(child)
    os.kill(child, signal.SIGKILL)
    parent.communicate()


def test_when_one_rank_is_killed_its_helper_and_the_other_ranks_end(tmp_path: Path) -> None:
    with running(command(tmp_path / "sft", "helper")) as launcher:
        ranks, helpers = pids(tmp_path / "sft", "rank", 2), pids(tmp_path / "sft", "helper", 2)
        os.kill(ranks[1], signal.SIGKILL)
        assert launcher.wait(timeout=OUTLIVE_S + 10) == 137
        wait_for(lambda: not any(alive(pid) for pid in ranks + helpers), 2.0)


def test_asked_to_the_launcher_dies_with_its_own_parent(tmp_path: Path) -> None:
    args = command(tmp_path / "sft", "helper", 1, "--die-with-parent")
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    with running([sys.executable, "-c", code, *args]) as top:
        ranks, helpers = pids(tmp_path / "sft", "rank", 2), pids(tmp_path / "sft", "helper", 2)
        top.kill()
        wait_for(lambda: not any(alive(pid) for pid in ranks), OUTLIVE_S)
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)


def test_a_heartbeat_shows_step_phase_and_living_ranks(tmp_path: Path) -> None:
    with running(command(tmp_path / "sft", "helper")):
        pids(tmp_path / "sft", "rank", 2)
        wait_for(lambda: any(len(beat.ranks_alive) == 2 for beat in read_heartbeats(str(tmp_path / "sft")).values()))
        first = next(iter(read_heartbeats(str(tmp_path / "sft")).values()))
        assert (first.step, first.phase, first.attempt) == (3, "train", 1)
        wait_for(lambda: next(iter(read_heartbeats(str(tmp_path / "sft")).values())).sequence > first.sequence)
        for helper in pids(tmp_path / "sft", "helper", 2):
            os.kill(helper, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["media", "commit"])
def test_through_torchrun_codes_and_signals_arrive_as_well(tmp_path: Path, behaviour: str) -> None:
    with running(command(tmp_path / "sft", behaviour, 1, "--torchrun")) as launcher:
        ranks = pids(tmp_path / "sft", "rank", 2)
        if behaviour == "commit":
            launcher.send_signal(signal.SIGTERM)
        want = {"media": 65, "commit": 143}[behaviour]
        assert launcher.wait(timeout=90) == want
    assert ending(tmp_path / "sft").code == want
    assert not any(alive(pid) for pid in ranks)


# ---------------------------------------------------------------- small parts


@pytest.mark.parametrize("name", ["PET_NNODES", "PET_NPROC_PER_NODE", "QWENVL_ATTEMPT"])
def test_what_is_no_number_in_the_environment_is_wrong_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--", "--stage", "sft", "--out", "out"]
    assert parse(words, {name: "3"})
    with pytest.raises(SystemExit) as ended:
        parse(words, {name: "auto"})
    assert ended.value.code == UsageError.code and "'auto'" in capsys.readouterr().err


def test_the_stage_is_found_in_the_programs_own_arguments() -> None:
    options = parse(["--nproc-per-node", "2", "--", "--recipe", "tiny", "--stage", "sft", "--out", "s3://b/out"], {})
    assert options.stage_uri == "s3://b/out/sft"
    assert options.args == ("--recipe", "tiny", "--stage", "sft", "--out", "s3://b/out")
    assert not options.torchrun
    assert parse(["--", "--stage=sft", "--out=o"], {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:1"}).torchrun
    with pytest.raises(UsageError, match="--stage-uri"):
        parse(["--", "--recipe", "tiny"], {})


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (MemoryError(), 147),
        (SystemExit(0), 0),
        (SystemExit("no"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:999"), 144),
        (RuntimeError("shapes differ"), 1),
        (ValueError("connection closed by peer"), 1),
        (UsageError("x"), 2),
    ],
)
def test_each_error_has_its_code(error: BaseException, want: int) -> None:
    assert code_of(error) == want


def test_the_launcher_imports_without_torch() -> None:
    code = (
        "import sys, trainer.launch;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'daft', 'torchx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_termination_message_is_whole_json_within_what_kubernetes_keeps(tmp_path: Path) -> None:
    end = Termination(code=71, decision="permanent", rank=1, step=7, error="ü€😀" * 3000)
    launch._write_message(end, {launch.TERMINATION_FILE: str(tmp_path / "message")})
    message = (tmp_path / "message").read_bytes()
    assert 3000 < len(message) <= launch.MESSAGE_BYTES
    assert Termination.model_validate_json(message).code == end.code


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_what_the_kernel_killed_for_want_of_memory_is_counted(
    file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CGROUP", str(tmp_path))
    assert launch._oom_kills() == 0
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert launch._oom_kills() == 2
