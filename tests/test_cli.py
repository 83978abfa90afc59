"""The command line: quick help, one message an error, documented exit codes, recipes resolved and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.cli.main import COMMANDS, main
from trainer.errors import StorageError
from trainer.observe.gpu import Gpu

HEAVY = ("torch", "kfp", "mlflow", "daft", "kubernetes", "transformers", "pyarrow", "huggingface_hub", "pydantic")


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    script = (
        "import sys; from pipelines.cli.main import main; main(['--help']);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 3, "0.05 s on a quiet machine"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("noun", sorted(COMMANDS))
def test_every_command_has_help(noun: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([noun, "--help"])
    assert ended.value.code == 0
    assert f"qwenvl {noun}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "want"),
    [
        ([], 2, "usage: qwenvl"),
        (["rum", "tiny"], 2, "did you mean run?"),
        (["recipe", "show", "tinny"], 2, "did you mean tiny?"),
        (["recipe", "check", "tiny", "--set", "stages.stage1.packing.lenght=4"], 2, "did you mean length?"),
        (["recipe", "check", "tiny", "--set", "seed"], 2, "not an override"),
        (["recipe", "check", "tiny", "--set", "prepare.sources.text.format=txt"], 2, "did you mean text?"),
        (["recipe", "check", "tiny", "--set", "prepare.sources.text.rendering=chat"], 2, "needs document, got chat"),
        (
            ["recipe", "check", "tiny", "--set", "prepare.sources.preferences.format=llava"],
            2,
            "have the kind preference",
        ),
        (
            ["recipe", "check", "tiny", "--set", "prepare.sources.text.path=corpus://txt.jsonl"],
            2,
            "did you mean text.jsonl",
        ),
        (["recipe", "check", "tiny", "--set", "family=gwen"], 2, "no such model family"),
        (["recipe", "check", "tiny", "--set", "model.config.model_type=llava"], 2, "model.config.model_type"),
        (["recipe", "check", "tiny", "--set", "model.pretrain.sources.text=[none]"], 2, "no such source 'none'"),
        (["recipe", "check", "tiny", "--set", "model.pretrain.sources={}"], 2, "model.pretrain.sources.pairs: needed"),
        (["recipe", "check", "tiny", "--set", "model.tokenizer=null"], 2, "tokenizer: needed"),
        (["recipe", "check", "tiny", "--set", "model.vocab_size=null"], 2, "vocab_size: needed"),
        (
            [
                "recipe",
                "check",
                "tiny",
                "--set",
                "evaluate.sources=[text]",
                "--set",
                "prepare.sources.text.held_out=null",
            ],
            2,
            "has no held_out data",
        ),
        (["run", "tiny", "--out", "x", "--cluster", "onprem"], 2, "use qwenvl submit"),
        (["export", "/nonexistent/output"], 2, "no run has written into this output"),
        (["submit", "tiny", "--out", "out/x", "--cluster", "onprem"], 2, "share no folder"),
        (["fetch", "data", "nothing", "--to", "x"], 2, "no such data set"),
        (["fetch", "model", "alice/tiny", "--to", "x"], 2, "a revision is needed"),
    ],
)
def test_a_mistake_is_one_message_and_the_documented_code(
    words: list[str], code: int, want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    told = "".join(capsys.readouterr())
    assert want in told
    assert "Traceback" not in told


@pytest.mark.skipif(Gpu().is_there, reason="a GPU is there")
def test_a_run_on_a_gpu_that_is_not_there_prepares_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "--out", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "no GPU on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_shipped_recipe_passes_its_check() -> None:
    from trainer.resolve import shipped

    for name in shipped():
        assert main(["recipe", "check", name]) == 0


def test_the_exit_codes_of_diff_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipe", "diff", "--help"])
    assert "exit code 0: the same, 1: they differ" in " ".join(capsys.readouterr().out.split())
    assert "exit code 0" in Path(__file__).parents[1].joinpath("README.md").read_text()


def test_show_gives_a_resolved_recipe_that_is_itself_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "show", "tiny", "--json", "--set", "seed=7"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["seed"] == 7 and content["sha256"]
    stored = tmp_path / "recipe.json"
    stored.write_text(json.dumps(content))
    assert main(["recipe", "check", str(stored)]) == 0
    assert content["sha256"][:12] in capsys.readouterr().out
    assert main(["recipe", "diff", "tiny", str(stored)]) == 1
    assert capsys.readouterr().out == "result    seed: 1234 -> 7\n"
    assert main(["recipe", "diff", str(stored), str(stored)]) == 0


# ---------------------------------------------------------------- addresses that do not answer


def asked_elsewhere(*words: str, tries: int = 5, **env: str) -> tuple[int, str]:
    """Exit code and what is said on a machine without credentials but those in `env`."""
    script = (
        f"import sys; from trainer import storage, tries; storage.NUM_TRIES = tries.S3_TRIES = {tries};"
        "from pipelines.cli.main import main; sys.exit(main())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    alone = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none"}
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **alone, **env}, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("recipe", "check", "s3://b/x.yaml"),
        ("run", "tiny", "--out", "s3://b/out"),
        ("data", "ingest", "s3://b/part-*.jsonl", "--out", "never"),
    ],
)
def test_s3_without_credentials_is_one_message_that_says_what_to_set(words: tuple[str, ...]) -> None:
    code, told = asked_elsewhere(*words)
    assert code == StorageError.code
    assert "no credentials" in told and "s3://b/" in told and "AWS_ACCESS_KEY_ID" in told and "Traceback" not in told


def test_an_s3_that_does_not_answer_is_one_message_that_names_its_address() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    env = {**keys, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    code, told = asked_elsewhere("recipe", "check", "s3://b/x.yaml", tries=1, **env)
    assert code == StorageError.code
    assert "http://127.0.0.1:1" in told and "AWS_ENDPOINT_URL" in told and "Traceback" not in told


class Files(BaseHTTPRequestHandler):
    """One recipe and a page that is not there."""

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        found = self.path == "/mine.yaml"
        content = b"extends: tiny\nname: mine\n" if found else b"nothing here"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def test_a_recipe_is_read_over_http_and_one_that_is_not_there_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert main(["recipe", "check", f"{host}/mine.yaml"]) == 0
        assert "mine: valid" in capsys.readouterr().out
        assert main(["recipe", "check", f"{host}/gone.yaml"]) == 2
        told = capsys.readouterr().err
        assert "no such recipe" in told and f"{host}/gone.yaml" in told
    finally:
        server.shutdown()
    server.server_close()
    monkeypatch.setattr("trainer.storage.NUM_TRIES", 1)
    assert main(["recipe", "check", f"{host}/mine.yaml"]) == StorageError.code
    assert "did not read" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["nosuch://x/mine.yaml", "dropbox://x/mine.yaml"])
def test_a_kind_of_storage_that_is_not_known_or_not_installed_is_one_message(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "check", uri]) == 2
    assert "no such kind of storage" in capsys.readouterr().err
