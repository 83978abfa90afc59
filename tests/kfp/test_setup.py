"""What of our own Kubeflow Pipelines needs none: names, what a machine lacks, the cache, the cluster file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import place
from tests.cluster.programs import doctor, made_once
from tests.kfp import backend, programs
from trainer.errors import UsageError


@pytest.mark.parametrize(("word", "want"), [("", ""), ("kfp", "-kfp"), ("two2", "-two2")])
def test_a_second_cluster_has_names_of_its_own(word: str, want: str) -> None:
    assert place.suffix(word) == want


@pytest.mark.parametrize("word", ["Kfp", "a-b", "../x", "abcdefghijklm"])
def test_a_word_that_fits_into_no_name_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="QWENVL_TEST_CLUSTER"):
        place.suffix(word)


def test_a_machine_that_lacks_something_is_told_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda program: None)
    monkeypatch.setattr(programs, "folder", lambda: Path("/nowhere"))
    with pytest.raises(UsageError, match=r"gcc libc6-dev mariadb-client-core mariadb-server-core.*Go 1\.26"):
        backend.up()


@pytest.mark.parametrize(
    ("lacks", "strict", "code", "said"),
    [
        (["a", "b"], True, UsageError.code, "NOT RUN: what (make it). This machine lacks:\n  a\n  b\nor else\n"),
        (["root"], False, 0, "NOT RUN: what (make it). This machine lacks:\n  root\nor else\n"),
        ([], True, 0, ""),
        ([], False, 0, "Not part of make test: what; make it runs it here.\n"),
    ],
)
def test_a_machine_that_lacks_something_fails_only_where_it_has_to_run(
    lacks: list[str], strict: bool, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("what", "make it", lacks, strict=strict, instead="or else") == code
    assert capsys.readouterr().out == said


def test_programs_are_in_the_cache_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "programs-1"
    with pytest.raises(OSError, match="full"), made_once(place) as new:
        (new / "half").touch()
        raise OSError("full")
    assert list(place.parent.iterdir()) == []
    with made_once(place) as slow:
        (slow / "slow").touch()
        with made_once(place) as quick:
            (quick / "quick").touch()
    assert list(place.parent.iterdir()) == [place] and [path.name for path in place.iterdir()] == ["quick"]


def test_the_cluster_file_names_this_clusters_images_and_nodes() -> None:
    digest = f"sha256:{'1' * 64}"
    made = backend.load_cluster(backend.as_yaml(backend.cluster_file(digest)))
    assert {image.rsplit("@")[1] for image in (made.images.trainer, made.images.launcher, made.images.prepare)} == {
        digest
    }
    pools = {node.pool for node in place.NODES}
    assert {made.pools[name].labels["qwenvl-train/pool"] for name in ("cpu", backend.RANKS)} == pools
    assert made.pools[backend.RANKS].gpu is None, "a pod that is given a GPU uses CUDA"
