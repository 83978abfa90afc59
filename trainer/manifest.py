"""The manifest of a checkpoint: the JSON that, once it exists, makes the checkpoint exist.

    OUT/STAGE/checkpoints/step-00000050/a0001-r00000-5f3c9a1e.safetensors   one object a rank, never written twice
    OUT/STAGE/checkpoints/step-00000050/manifest.json                       written last, create-once
    OUT/STAGE/metrics/step-00000050-a0001-5f3c9a1e.jsonl                    metrics since the commit before

Objects without a manifest are left-overs of a crash and are never read. A manifest whose objects are missing or have
another size is damage, not a crash: it is told, never skipped.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import storage
from trainer.errors import CheckpointError

FORMAT = 1
NAME = "manifest.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Object(Record):
    """One rank's slices, as a safetensors file whose header names the ranges."""

    key: str
    """File name beside the manifest."""
    rank: int
    size_bytes: int
    header_bytes: int
    """Length of the safetensors header with its 8 length bytes: one ranged read finds every slice."""
    sha256: str


class MetricsPart(Record):
    """Metrics of the steps (first, last], as JSON lines; `key` is relative to the stage's folder."""

    key: str
    first_step: int
    last_step: int
    size_bytes: int
    sha256: str


class Change(Record):
    """A result field changed on purpose in the middle of a stage (--accept-change)."""

    field: str
    stored: Any = None
    asked: Any = None
    step: int


class Manifest(Record):
    format: Literal[1] = FORMAT
    stage: str
    step: int
    """Steps whose update is in the weights."""
    attempt: int
    nonce: str
    world_size: int
    """Of the writers; any other can load."""
    stage_digest: str
    plan_digest: str
    base_model_digest: str
    """Of the parent's model: frozen parameters are read from there."""
    objects: tuple[Object, ...]
    num_parameters: int
    """Elements of all slices together."""
    optimizer: dict[str, Any]
    """step (Adam's own count), groups: [hyperparameters], gas"""
    scheduler: dict[str, Any] | None = None
    loader: dict[str, Any] = {}
    """State of the data loader: {plan digest, step, skips}."""
    skips: tuple[str, ...] = ()
    """Ids of samples that are left out from here on."""
    rng: dict[str, Any] = {}
    """How random state is kept: {"kept": "object header", "ranks": n}."""
    metrics: tuple[MetricsPart, ...] = ()
    """All parts since the stage began."""
    accepted_changes: tuple[Change, ...] = ()
    extra: dict[str, Any] = {}
    """What the program wants back on resume (running sums, held-out losses); JSON."""
    written_at: str = ""
    """UTC, for people."""


# ---------------------------------------------------------------- names


def folder(stage_uri: str) -> str:
    return storage.join(stage_uri, "checkpoints")


def step_folder(stage_uri: str, step: int) -> str:
    return storage.join(folder(stage_uri), f"step-{step:08d}")


def object_key(attempt: int, rank: int, nonce: str) -> str:
    return f"a{attempt:04d}-r{rank:05d}-{nonce}.safetensors"


def manifest_uri(stage_uri: str, step: int) -> str:
    return storage.join(step_folder(stage_uri, step), NAME)


def metrics_key(step: int, attempt: int, nonce: str) -> str:
    return f"metrics/step-{step:08d}-a{attempt:04d}-{nonce}.jsonl"


def steps(stage_uri: str) -> list[int]:
    """Steps that have a folder, with or without a manifest, ascending."""
    names = storage.list_dir(folder(stage_uri))
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


# ---------------------------------------------------------------- read, write, find


def encode(manifest: Manifest) -> bytes:
    return storage.json_bytes(manifest.model_dump(mode="json"))


def digest(manifest: Manifest) -> str:
    """sha256 of the manifest's bytes."""
    return storage.sha256_bytes(encode(manifest))


def commit(stage_uri: str, manifest: Manifest) -> str:
    """Write the manifest, which makes the checkpoint exist; its URI.

    Raises:
        CheckpointError: another attempt has committed the same step.
    """
    uri = manifest_uri(stage_uri, manifest.step)
    try:
        storage.create_once(uri, encode(manifest))
    except FileExistsError:
        other = read(uri)
        raise CheckpointError(
            "another writer has committed this step",
            where=uri,
            expected=f"attempt {manifest.attempt}, {manifest.nonce}",
            got=f"attempt {other.attempt}, {other.nonce}",
            do="two attempts of the stage were alive at once: start the stage again, alone",
        ) from None
    return uri


def read(uri: str) -> Manifest:
    """Read a manifest.

    Raises:
        FileNotFoundError, CheckpointError
    """
    content = storage.read_bytes(uri)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            "not a checkpoint manifest of this format",
            where=uri,
            expected=f"format {FORMAT}",
            got=f"{at}: {first['msg']}" if at else first["msg"],
            do="remove this step's folder to go on from the checkpoint before it",
        ) from None


def newest(stage_uri: str) -> Manifest | None:
    """The newest committed checkpoint, its objects present with the sizes written; None when there is none.

    Raises:
        CheckpointError: the manifest or one of its objects is damaged; the message names it.
    """
    for step in reversed(steps(stage_uri)):
        uri = manifest_uri(stage_uri, step)
        try:
            manifest = read(uri)
        except FileNotFoundError:
            continue  # a crash before the commit: its objects are never read
        check_sizes(stage_uri, manifest)
        return manifest
    return None


def check_sizes(stage_uri: str, manifest: Manifest) -> None:
    """Every object is there with the size that the manifest names."""
    for entry in manifest.objects:
        uri = storage.join(step_folder(stage_uri, manifest.step), entry.key)
        try:
            found: int | str = storage.size(uri)
        except FileNotFoundError:
            found = "no such object"
        if found != entry.size_bytes:
            raise damaged(
                uri, expected=f"{entry.size_bytes} bytes", got=f"{found} bytes" if found != "no such object" else found
            )


def damaged(uri: str, *, expected: object, got: object) -> CheckpointError:
    return CheckpointError(
        "an object of the checkpoint is damaged",
        where=uri,
        expected=expected,
        got=got,
        do=f"restore it, or remove {uri.rsplit('/', 1)[0]} to go on from the checkpoint before it",
    )


def retain(stage_uri: str, keep: int) -> list[int]:
    """Remove all but the newest `keep` checkpoints, and left-overs older than the newest; the steps removed.

    The manifest goes first, so a crash in between leaves objects that are never read, not a damaged checkpoint.
    """
    assert keep >= 1
    found = steps(stage_uri)
    committed = [step for step in found if storage.exists(manifest_uri(stage_uri, step))]
    if not committed:
        return []
    kept = set(committed[-keep:])
    gone = [step for step in found if step < committed[-1] and step not in kept]
    for step in gone:
        storage.remove(manifest_uri(stage_uri, step))
        storage.remove_tree(step_folder(stage_uri, step))
    return gone
