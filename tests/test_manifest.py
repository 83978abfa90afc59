"""Manifests: written last and once, the newest committed one counts, damage is told and never skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer import manifest as manifests
from trainer import storage
from trainer.errors import CheckpointError
from trainer.manifest import Manifest, Object


def a_checkpoint(stage: Path, step: int, *, commit: bool = True, **more: Any) -> Manifest:
    data = f"slices of step {step}".encode()
    key = manifests.object_key(1, 0, "abcd")
    storage.create_once(storage.join(manifests.step_folder(str(stage), step), key), data)
    entry = Object(key=key, rank=0, size_bytes=len(data), header_bytes=8, sha256=storage.sha256_bytes(data))
    facts: dict[str, Any] = {
        "stage": "sft",
        "attempt": 1,
        "nonce": "abcd",
        "world_size": 1,
        "stage_digest": "s",
        "plan_digest": "p",
    }
    facts |= {"base_model_digest": "b", "objects": (entry,), "num_parameters": 1, "optimizer": {}}
    manifest = Manifest(step=step, **(facts | more))
    if commit:
        manifests.commit(str(stage), manifest)
    return manifest


def test_the_newest_committed_checkpoint_counts_and_objects_without_manifest_do_not(tmp_path: Path) -> None:
    assert manifests.newest(str(tmp_path)) is None
    a_checkpoint(tmp_path, 50)
    a_checkpoint(tmp_path, 100)
    a_checkpoint(tmp_path, 150, commit=False)
    found = manifests.newest(str(tmp_path))
    assert found is not None and found.step == 100


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "format"])
def test_damage_is_told_by_name_and_not_skipped(tmp_path: Path, damage: str) -> None:
    a_checkpoint(tmp_path, 50)
    manifest = a_checkpoint(tmp_path, 100)
    folder = Path(manifests.step_folder(str(tmp_path), 100))
    target = folder / manifest.objects[0].key
    if damage == "truncated":
        target.write_bytes(b"sl")
    if damage == "missing":
        target.unlink()
    if damage == "manifest":
        target = folder / manifests.NAME
        target.write_text("{")
    if damage == "format":
        target = folder / manifests.NAME
        target.write_text(target.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError) as told:
        manifests.newest(str(tmp_path))
    assert str(target) in str(told.value)
    assert told.value.code == 68


def test_two_attempts_cannot_commit_the_same_step(tmp_path: Path) -> None:
    first = a_checkpoint(tmp_path, 50)
    manifests.commit(str(tmp_path), first)  # its own bytes again: a lost answer
    with pytest.raises(CheckpointError, match="two attempts"):
        manifests.commit(str(tmp_path), first.model_copy(update={"attempt": 2, "nonce": "ef01"}))


def test_retention_keeps_the_last_and_removes_what_crashes_left(tmp_path: Path) -> None:
    for step in (50, 100, 150):
        a_checkpoint(tmp_path, step)
    a_checkpoint(tmp_path, 120, commit=False)
    a_checkpoint(tmp_path, 200, commit=False)  # being written
    assert manifests.retain(str(tmp_path), 2) == [50, 120]
    assert manifests.steps(str(tmp_path)) == [100, 150, 200]


def test_a_crash_in_the_middle_of_retention_leaves_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (50, 100):
        a_checkpoint(tmp_path, step)

    def crash(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "remove_tree", crash)
    with pytest.raises(KeyboardInterrupt):
        manifests.retain(str(tmp_path), 1)
    assert not storage.exists(manifests.manifest_uri(str(tmp_path), 50))
    newest = manifests.newest(str(tmp_path))
    assert newest is not None and newest.step == 100


def test_a_manifest_survives_being_written_and_read(tmp_path: Path) -> None:
    manifest = a_checkpoint(tmp_path, 7, skips=("a/1",), loader={"step": 7}, extra={"loss": 0.1 + 0.2})
    assert manifests.read(manifests.manifest_uri(str(tmp_path), 7)) == manifest
