"""Checkpoints with real ZeRO-3 ranks: any world size loads any checkpoint, bit for bit; damage and crashes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.state.weed import BUCKET, program, s3_server
from trainer import cache, storage, warm
from trainer import manifest as manifests
from trainer.errors import CheckpointError, StageMismatch, StorageError
from trainer.observe.metrics import Row, history
from trainer.state import resume, slices
from trainer.state.snapshot import Snapshot
from trainer.state.upload import Identity, Uploader

IDENTITY = Identity("sft", 1, "s", "p", "b")
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(world_size: int, out: str, script: list[list[Any]], *, want: int = 0, **more: str) -> dict[str, Any]:
    """tests/state/program.py under the launcher; what rank 0 told."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("QWENVL_") or key == warm.VARIABLE}
    env = kept | ON_CPU | more
    args = [
        "--nproc-per-node",
        str(world_size),
        "--module",
        "tests.state.program",
        "--stage-uri",
        out,
        "--",
        out,
        json.dumps(script),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.launch", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == want, done.stdout[-3000:] + done.stderr[-3000:]
    if want:
        return {"stderr": done.stderr}
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))[5:])


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The ranks below are forks of one process that has torch and DeepSpeed imported, as in `qwenvl run`."""
    path = str(tmp_path_factory.mktemp("warm") / "socket")
    code = f"import trainer.warm as w; w.PRELOAD = ('trainer.step.imports:import_large',); w.main([{path!r}])"
    server = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **ON_CPU})
    while not os.path.exists(path):
        assert server.poll() is None
        time.sleep(0.01)
    os.environ[warm.VARIABLE] = path
    yield
    del os.environ[warm.VARIABLE]
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, imported: None) -> tuple[Path, dict[str, Any]]:
    """Two ranks: two steps, a commit, two more steps."""
    out = tmp_path_factory.mktemp("trained")
    script = [["train", 2], ["commit"], ["digest", "at2"], ["train", 2], ["wait"], ["digest", "at4"]]
    return out, run(2, str(out), script)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_loads_into_one_and_one_of_one_into_three(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "checkpoints", out / "checkpoints")
    shutil.copytree(trained[0] / "metrics", out / "metrics")
    one = run(
        1,
        str(out),
        [["load"], ["digest", "at2"], ["train", 1], ["commit"], ["digest", "at3"], ["wait"]],
        QWENVL_ATTEMPT="2",
    )
    assert one["at2"] == trained[1]["at2"]
    assert one["loaded"] == [2, 4]
    assert one["committed"] == 3
    # persistent parameters (threshold above every size) are gathered again from the new masters
    three = run(3, str(out), [["load"], ["digest", "at3"]], THRESHOLD="100000")
    assert three["at3"] == one["at3"] != one["at2"]
    manifest = manifests.newest(str(out))
    assert manifest is not None
    assert [row.step for row in history(str(out), manifest)] == [2, 3]


@pytest.mark.slow
def test_going_on_from_a_checkpoint_gives_the_same_bits_as_never_having_stopped(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "checkpoints")
    again = run(2, str(tmp_path), [["load"], ["train", 2], ["digest", "at4"]])
    assert again["at4"] == trained[1]["at4"]
    assert again["losses"] == trained[1]["losses"][4:]


@pytest.mark.slow
def test_a_flipped_byte_ends_every_rank_with_the_objects_name(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "checkpoints")
    target = sorted((tmp_path / "checkpoints/step-00000002").glob("*-r00001-*.safetensors"))[0]
    data = bytearray(target.read_bytes())
    data[-3] ^= 1
    target.write_bytes(data)
    told = run(2, str(tmp_path), [["load"]], want=68)["stderr"]
    assert target.name in told and "an object of the checkpoint is damaged" in told


@pytest.mark.slow
def test_checkpoints_in_s3_load_at_another_world_size(tmp_path: Path, imported: None) -> None:
    if program() is None:
        pytest.skip("SeaweedFS (dev extra) is not installed")
    with s3_server(tmp_path / "weed") as env:
        out = f"s3://{BUCKET}/run/sft"
        first = run(2, out, [["train", 1], ["commit"], ["digest", "at1"], ["wait"]], **env)
        assert first["committed"] == 1
        assert run(1, out, [["load"], ["digest", "at1"]], **env)["at1"] == first["at1"]
        assert "rank1.log" in storage.list_dir(f"{out}/attempts/0001")


# ---------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def a_snapshot(step: int, content: bytes = b"slices") -> Snapshot:
    buffer = np.frombuffer(bytearray(content * 100), dtype=np.uint8)
    return Snapshot(step, 0, 1, memoryview(buffer), 8, 25, {"step": step}, None, 0.0)


def an_uploader(stage: Path, **more: Any) -> Uploader:
    return Uploader(str(stage), IDENTITY, store=dist.HashStore(), **more)


def test_a_commit_lands_in_the_background_and_the_step_is_known(tmp_path: Path, group: None) -> None:
    uploader = an_uploader(tmp_path)
    assert uploader.committed is None
    uploader.commit(a_snapshot(5), loader={"step": 5}, metrics=[Row(5, 0.0, {"loss": 1.0})], skips=["a/1"])
    assert uploader.wait() == uploader.poll() == 5
    manifest = manifests.newest(str(tmp_path))
    assert manifest is not None
    assert (manifest.step, manifest.loader, manifest.skips, manifest.attempt) == (5, {"step": 5}, ("a/1",), 1)
    uploader.commit(a_snapshot(5), loader={})  # the last step of a stage may be a commit step already
    assert uploader.wait() == 5


def test_an_attempt_that_resumes_at_the_last_step_does_not_commit_it_again(tmp_path: Path, group: None) -> None:
    first = an_uploader(tmp_path)
    first.commit(a_snapshot(5), loader={})
    first.wait()
    again = an_uploader(tmp_path, resumed=manifests.newest(str(tmp_path)))
    again.commit(a_snapshot(5, b"others"), loader={})
    assert again.wait() is None  # nothing was committed in this attempt
    assert len(os.listdir(manifests.step_folder(str(tmp_path), 5))) == 2  # one object, one manifest


@pytest.mark.parametrize("crash_at", [1, 2, 3, None])
def test_a_crash_at_any_write_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, crash_at: int | None
) -> None:
    """Writes of a commit are the object (1), the metrics (2), the manifest (3); None is the control without a crash."""
    uploader = an_uploader(tmp_path)
    uploader.commit(a_snapshot(5), loader={}, metrics=[Row(5, 0.0, {"loss": 1.0})])
    uploader.wait()
    real, count = storage.create_once, [0]

    def create_once(uri: str, data: Any) -> bool:
        count[0] += 1
        if count[0] == crash_at:
            raise SystemExit("the process dies here")
        return real(uri, data)

    monkeypatch.setattr(storage, "create_once", create_once)
    uploader.commit(a_snapshot(10), loader={}, metrics=[Row(10, 0.0, {"loss": 1.0})])
    if crash_at is None:
        uploader.wait()
    else:
        with pytest.raises(SystemExit):
            uploader.wait()
    manifest = manifests.newest(str(tmp_path))
    assert manifest is not None
    assert manifest.step == (10 if crash_at is None else 5)
    assert len(history(str(tmp_path), manifest)) == (2 if crash_at is None else 1)


def test_a_failed_upload_is_raised_at_the_next_poll(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uri: str, data: Any) -> bool:
        raise StorageError("storage did not create in 5 tries", where=uri)

    monkeypatch.setattr(storage, "create_once", refuse)
    uploader = an_uploader(tmp_path)
    uploader.commit(a_snapshot(5), loader={})
    flight = uploader._flight
    assert flight is not None and flight.thread is not None
    flight.thread.join()
    with pytest.raises(StorageError):
        uploader.poll()


def test_the_buffer_is_busy_until_its_object_is_stored(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    snapshot, real = a_snapshot(5), storage.create_once

    def create_once(uri: str, data: Any) -> bool:
        seen.append(snapshot.written.is_set())
        return real(uri, data)

    monkeypatch.setattr(storage, "create_once", create_once)
    uploader = an_uploader(tmp_path)
    uploader.commit(snapshot, loader={})
    uploader.wait()
    assert seen == [False, True]  # the object, then the manifest
    assert snapshot.written.is_set()


def test_a_checkpoint_of_something_else_is_a_mismatch(tmp_path: Path, group: None) -> None:
    uploader = an_uploader(tmp_path)
    uploader.commit(a_snapshot(5), loader={})
    uploader.wait()
    manifest = manifests.newest(str(tmp_path))
    assert manifest is not None
    resume.check(manifest, IDENTITY)
    for change in ({"plan_digest": "x"}, {"base_model_digest": "x"}, {"stage_digest": "x"}, {"stage": "dpo"}):
        with pytest.raises(StageMismatch):
            resume.check(manifest, Identity(**{**IDENTITY.__dict__, **change}))
    accepted = (manifests.Change(field="optim.lr", stored=1, asked=2, step=5),)
    resume.check(manifest, replace(IDENTITY, stage_digest="x", accepted_changes=accepted))
    for change in ({"plan_digest": "another plan"}, {"base_model_digest": "x"}, {"stage": "dpo"}):
        with pytest.raises(StageMismatch) as told:
            resume.check(manifest, replace(IDENTITY, accepted_changes=accepted, **change))
        assert f"expected: {manifest.plan_digest if 'plan_digest' in change else ''}" in str(told.value)
        assert next(iter(change.values())) in str(told.value)


def test_objects_lie_in_the_bounded_node_cache_and_are_fetched_again_when_their_room_was_taken(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints of one object each, in an object store; the cache has room for one."""
    monkeypatch.setenv(cache.DIR, str(tmp_path))
    monkeypatch.setenv(cache.BYTES, "1000")
    monkeypatch.setattr(cache, "YOUNG_S", 0.0)
    paths = []
    for step, content in ((1, b"a" * 800), (2, b"b" * 800)):
        entry = manifests.Object(
            key="object", rank=0, size_bytes=800, header_bytes=8, sha256=storage.sha256_bytes(content)
        )
        manifest = manifests.Manifest(
            stage="sft", step=step, attempt=1, nonce="n", world_size=1, stage_digest="s", plan_digest="p",
            base_model_digest="b", objects=(entry,), num_parameters=1, optimizer={},
        )  # fmt: skip
        uri = f"memory://bucket/{tmp_path.name}"
        storage.write_bytes(f"{manifests.step_folder(uri, step)}/object", content)
        with resume._Files(uri, manifest, None) as files:
            files.fetch([entry])
            paths.append(Path(files.path(entry)))
            assert bytes(files.map(entry)) == content
        os.utime(paths[-1], (step, step))
    assert [path.exists() for path in paths] == [False, True], "least recently used goes, and what is kept stays kept"
    with resume._Files(uri, manifest, None) as files:
        files.fetch([entry])
        paths[1].unlink()  # another job
        assert bytes(files.map(entry)) == b"b" * 800


def test_an_object_whose_header_is_not_one_is_damage(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{bad}")
    entry = manifests.Object(key="x.safetensors", rank=0, size_bytes=13, header_bytes=13, sha256="")
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        resume.read_header(str(tmp_path / "x.safetensors"), entry)


@pytest.mark.parametrize(
    ("numel", "world_size", "want"),
    [
        (10, 2, [(0, 5), (5, 10)]),
        (10, 3, [(0, 4), (4, 8), (8, 10)]),
        (2, 3, [(0, 1), (1, 2), (2, 2)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
    ],
)
def test_ranks_own_a_parameter_once_and_whole(numel: int, world_size: int, want: list[tuple[int, int]]) -> None:
    assert [slices.bounds(numel, rank, world_size) for rank in range(world_size)] == want
