"""What the command line says to a newcomer: help for every option, errors in the command's own words."""

from __future__ import annotations

import errno
import json
import re
from importlib import resources
from pathlib import Path

import pytest

from pipelines import lock
from pipelines.cli.main import COMMANDS, edge, main
from pipelines.settle import settle
from tests.commands import REFERENCE, commands, reference
from tests.prepare.builders import a_picture
from trainer import storage
from trainer.errors import OutputInUse, StageMismatch, StorageError

ROOT = Path(__file__).parents[1]
NO_DIGEST, DIGEST = "sha256:" + "0" * 64, "sha256:" + "1" * 64


def test_every_option_and_argument_has_help() -> None:
    found = [
        f"{command.words} {action.option_strings or action.dest}"
        for command in commands()
        for action in command.arguments
        if not action.help
    ]
    assert found == []
    assert [command.words for command in commands() if not command.help] == []


def test_every_command_is_in_the_readme_or_in_the_reference_that_it_names() -> None:
    readme, written = (ROOT / "README.md").read_text(), (ROOT / REFERENCE).read_text()
    assert REFERENCE in readme
    assert [noun for noun in COMMANDS if f"`qwenvl {noun} " not in readme] == []
    assert [command.words for command in commands() if f"## {command.words}\n" not in written] == []
    assert written == reference(), "make generated"


def test_what_the_readme_calls_is_there() -> None:
    """Negative control of the tables: a command that was taken out would still be named."""
    known = {command.words for command in commands()} | {f"qwenvl {noun}" for noun in COMMANDS}
    called = re.findall(r"`(qwenvl [a-z]+(?: [a-z]+)*)", (ROOT / "README.md").read_text())
    assert len(called) > 15
    assert [words for words in called if not any(words == one or words.startswith(f"{one} ") for one in known)] == []


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["run", "tiny", "--out", ""], "--out"),
        (["data", "ingest", "rows.jsonl", "--out="], "--out"),
        (["data", "ingest", "", "--out", "shards"], "behind ingest"),
        (["data", "prepare", "tiny", "--out", " "], "--out"),
        (["evaluate", ""], "behind evaluate"),
        (["recipe", "show", "tiny", "--set", ""], "--set"),
    ],
)
def test_an_empty_argument_is_never_the_folder_at_hand(
    words: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"an empty argument\n  where: {where}\n" in capsys.readouterr().err


# ---------------------------------------------------------------- data ingest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two captions, one without its picture."""
    (tmp_path / "red.png").write_bytes(a_picture())
    path = tmp_path / "rows.jsonl"
    entries = [{"image": name, "caption": "a red square"} for name in ("red.png", "gone.png")]
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ((), "raise --max-bad-fraction"),
        (("--format", "llva"), "--format: no such format 'llva'"),
        (("--max-bad-fraction", "2"), "--max-bad-fraction: expected a number less than 1, got 2.0"),
        (("--kind", "captoin"), "--kind: expected 'caption', "),
        (("--name", "A b"), "--name: expected text that matches"),
        (("--format", "preference"), "--kind: caption does not go with the format preference"),
        (("--format", "text", "--rendering", "chat"), "--rendering: the format text needs document"),
    ],
)
def test_ingest_names_its_own_options(
    rows: Path, words: tuple[str, ...], want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = () if "--kind" in words else ("--kind", "caption")
    assert main(["data", "ingest", str(rows), "--out", str(rows.parent / "shards"), *kind, *words]) in (2, 64)
    told = capsys.readouterr().err
    assert want in told and "prepare." not in told and "Input should" not in told
    assert not (rows.parent / "shards").exists()


def test_a_folder_without_annotations_is_told_apart_from_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "red.png").write_bytes(a_picture())
    for source, want in ((tmp_path, "a folder without a file that ends in .json, "), (tmp_path / "x", "nothing there")):
        assert main(["data", "ingest", str(source), "--out", str(tmp_path.parent / "shards")]) == 64
        assert f"got: {want}" in capsys.readouterr().err


# ---------------------------------------------------------------- an output that is in use, or made otherwise


def test_an_output_in_which_a_run_lives_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    settle("tiny_smoke", [], out=out)
    before = sorted(tmp_path.rglob("*"))
    with lock.held(out):
        for words in (["data", "prepare", "tiny_smoke"], ["export"], ["evaluate"]):
            assert main([*words, "--out", out]) == OutputInUse.code
            assert "another run lives in this output" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [*before[:1], tmp_path / "out/.lock", *before[1:]]


def test_prepare_does_not_replace_data_that_was_made_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    settle("tiny_smoke", [], out=out)
    storage.write_json(storage.join(out, "data", "funnel.json"), {})
    assert main(["data", "prepare", "tiny_smoke", "--out", out, "--set", "seed=99"]) == StageMismatch.code
    told = capsys.readouterr().err
    assert "seed: 99 (asked for)" in told and "--accept-change seed" in told
    assert storage.read_json(storage.join(out, "data", "funnel.json")) == {}


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_number_of_threads_is_one_or_more(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--out", "out", "--threads", threads])
    assert ended.value.code == 2 and "expected a whole number, 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "got: No space left on device\n  do: free space (TMPDIR"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "where: /x\n  got: Read-only file system\n  do: name a"),
        (OSError(errno.ENOENT, "No such file or directory", "/x/y"), "where: /x/y\n"),
    ],
)
def test_what_the_system_refuses_is_one_message(error: OSError, want: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command(words: list[str]) -> int:
        raise error

    assert edge(command, []) == StorageError.code
    assert want in capsys.readouterr().err


# ---------------------------------------------------------------- recipe check --cluster


def a_cluster(folder: Path, *changes: tuple[str, str]) -> str:
    text = (resources.files("k8s") / "clusters" / "onprem.yaml").read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_cluster_file_that_is_still_the_example_is_an_error_that_names_the_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_cluster(tmp_path)
    assert main(["recipe", "check", "qwen2_5_vl_7b", "--cluster", path]) == 2
    told = capsys.readouterr().err
    for name in ("trainer", "launcher", "prepare"):
        assert f"images.{name}: the example's digest" in told
    assert "images/README.md" in told and path in told


def test_a_value_in_angle_brackets_is_still_to_be_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_cluster(tmp_path, (NO_DIGEST, DIGEST), ("https://s3.example.com", "https://<host>"))
    assert main(["recipe", "check", "qwen2_5_vl_7b", "--cluster", path]) == 2
    assert "storage.endpoint: https://<host> is still to be filled in" in capsys.readouterr().err


def test_an_example_s_own_name_and_reserved_hosts_are_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "check", "qwen2_5_vl_7b", "--cluster", "onprem"]) == 0
    assert "warning: cluster onprem: images.trainer: the example's digest" in capsys.readouterr().err
    own = a_cluster(tmp_path, (NO_DIGEST, DIGEST))
    assert main(["recipe", "check", "qwen2_5_vl_7b", "--cluster", own]) == 0
    assert "storage.endpoint: https://s3.example.com is an example's address" in capsys.readouterr().err
    own = a_cluster(tmp_path, (NO_DIGEST, DIGEST), ("s3.example.com", "s3.example-corp.net"))
    assert main(["recipe", "check", "qwen2_5_vl_7b", "--cluster", own]) == 0
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("noun", ["export", "evaluate"])
@pytest.mark.parametrize(
    ("words", "want"),
    [
        (("--out", "{out}"), "no run has written into this output\n  where: {out}/recipe.json"),
        (("{out}",), "no run has written into this output\n  where: {out}/recipe.json"),
        (("{out}", "--out", "{out}"), "which output?"),
        ((), "which output?"),
    ],
)
def test_an_output_is_named_by_out_as_in_every_other_command(
    noun: str, words: tuple[str, ...], want: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([noun, *(word.format(out=tmp_path) for word in words)]) == 2
    assert want.format(out=tmp_path) in capsys.readouterr().err


def test_a_job_of_an_output_without_a_recipe_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "render", "sft", "--cluster", "onprem", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert (
        f"no run has written into this output\n  where: {tmp_path}/recipe.json\n  do: " in told and "--recipe" in told
    )


def test_kubeflow_that_does_not_answer_is_one_message_with_its_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["runs", "list", "--host", "http://127.0.0.1:9"]) == 75
    told = capsys.readouterr().err
    assert "Kubeflow Pipelines did not answer\n  where: http://127.0.0.1:9\n  got: Connection refused\n  do: " in told
    assert "port-forward" in told and "MaxRetryError" not in told
