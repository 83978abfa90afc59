"""A real S3 server for tests: SeaweedFS from its PyPI wheel (one process: master, volume, filer, S3)."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.warm import die_with_parent

BUCKET = "runs"


def program() -> str | None:
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def arguments(weed: str, folder: Path, host: str, ports: dict[str, int]) -> list[str]:
    """The command line of a server; ports of master, volume, filer, s3."""
    return [
        weed,
        "-logtostderr",
        "server",
        f"-ip={host}",
        "-s3",
        f"-dir={folder}",
        "-s3.port.iceberg=0",  # at fixed ports otherwise: a second server would end at once
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=20",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]


@contextlib.contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """A server with one bucket at an address of this machine; the environment that makes trainer/storage.py use it."""
    with s3_process(folder, host) as (env, _):
        yield env


@contextlib.contextmanager
def s3_process(folder: Path, host: str = "127.0.0.1") -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """s3_server with its process, to be stopped or killed."""
    import fsspec
    import s3fs

    weed = program()
    assert weed is not None, "the dev extra carries SeaweedFS"
    folder.mkdir(parents=True, exist_ok=True)
    # weed listens for gRPC at each port + 10000
    ports = {name: _low_port(host) for name in ("master", "volume", "filer", "s3")}
    args = arguments(weed, folder, host, ports)
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            args,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call
            env={**os.environ, **env},
        )
    try:
        os.environ.update(env)
        s3fs.S3FileSystem.clear_instance_cache()  # those of trainer/storage.py that know another server
        fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        end = time.monotonic() + 60
        while True:
            try:
                fs.mkdir(BUCKET)
                fs.pipe_file(f"{BUCKET}/ready", b"yes")
                break
            except Exception:
                assert process.poll() is None, (folder / "weed.log").read_text()[-2000:]
                assert time.monotonic() < end, (folder / "weed.log").read_text()[-2000:]
                time.sleep(0.3)
        yield env, process
    finally:
        process.kill()
        process.wait()
        for key in env:
            os.environ.pop(key, None)
        s3fs.S3FileSystem.clear_instance_cache()


def _low_port(host: str) -> int:
    while True:
        port = _free_port(host)
        if port < 55000:
            return port


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the bucket of a server for the tests of a module that imports this."""
    if program() is None:
        pytest.skip("SeaweedFS (dev extra) is not installed")
    with s3_server(tmp_path_factory.mktemp("weed")):
        yield f"s3://{BUCKET}"
