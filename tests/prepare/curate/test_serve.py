"""A judge behind `transformers serve`: the real wire format with image upload, and answers that have no form. The model
is tiny and knows nothing: what is proven is the wire, not the judgement."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.prepare.curate.record import Record
from pipelines.prepare.curate.step import curate
from tests.after.test_export import a_finished_run
from tests.prepare.curate.builders import a_document, a_photo, a_recipe, write_source
from trainer import storage

LIMIT_S = 180


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(URL, model) of a server on loopback with a tiny exported model."""
    pytest.importorskip("accelerate", reason="transformers serve loads models with it")
    pytest.importorskip("openai", reason="transformers serve imports its types")
    from trainer.after.export import export

    out = str(tmp_path_factory.mktemp("model"))
    export(a_finished_run(out), out)
    model = storage.join(out, "export")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", model, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = Path(out, "serve.log")
    with log.open("wb") as told:
        server = subprocess.Popen(command, env=env, stdout=told, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.slow
def test_a_real_server_takes_documents_with_pictures_and_its_words_are_recorded(
    serving: tuple[str, str], tmp_path: Path
):
    url, model = serving
    write_source(tmp_path, [a_document(f"d{n}", f"Text {n}.", [a_photo(n, 60, 60)]) for n in range(2)])
    about = json.dumps({"url": url, "model": model, "max_tokens": 16, "max_failed": 1.0})
    recipe = a_recipe(f"{{score: {{scorer: judge, min: {{text_quality: 0.5}}, judge: {about}}}}}")
    found = curate(recipe, str(tmp_path))["web"]
    judge = found["judge"]
    assert judge["asked"] == judge["malformed"] == 6, "two documents, three tries each"
    assert judge["failed"] == 2 and found["kept"] == 2, "a model that knows nothing drops nothing"
    answers = Record(str(tmp_path / "data/answers/judge/web")).answers
    assert len(answers) == judge["asked"] and all(given.finish in ("stop", "length") for given in answers.values())
