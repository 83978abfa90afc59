"""StageResult: what a finished stage hands to the next one, and the only mark that it is finished.

OUT/STAGE/result.json is created once. Reading it verifies sizes and the digests of the small files (`quick`) or
every byte (`full`). The parent's digest is part of it, so a parent whose weights changed makes the children stale: that
is told with the chain of stages, and nothing is reused.

    parent_of(recipe, "sft")        -> name of the stage (or init) whose model the stage starts from
    newest_result(out, before="sft")-> the newest StageResult before a stage, for generation and resume
    state_of(recipe, stage, out)    -> done | to do, or StageMismatch
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import manifest as manifests
from trainer import storage
from trainer.errors import CheckpointError, StageMismatch, UsageError
from trainer.recipe import STAGES, Recipe
from trainer.resolve import Change, changes, digest, stage_fields

FORMAT = 1
NAME = "result.json"
INIT = "init"

Verify = Literal["none", "quick", "full"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelFile(Record):
    sha256: str
    size_bytes: int


class Model(Record):
    """A model folder in Hugging Face layout."""

    uri: str
    """Relative to OUT (stage1/model) so that an output can be moved, or an address of its own."""
    files: dict[str, ModelFile]
    digest: str
    """sha256 over names, sizes and digests of the files."""


class Parent(Record):
    stage: str
    digest: str
    """Of the parent's result."""


class FreezeRow(Record):
    group: str
    """vision, merger, llm; or a part of one (constant parameters are rows of their own)."""
    trainable: bool
    parameters: int
    digest_before: str
    digest_after: str
    state: Literal["frozen", "trained", "constant"]
    reason: str = ""


class StageResult(Record):
    format: Literal[1] = FORMAT
    stage: str
    recipe_sha256: str
    resolved_stage: dict[str, Any]
    """Result fields by path: what a later run is compared with."""
    stage_digest: str = ""
    accepted_changes: tuple[manifests.Change, ...] = ()
    parent: Parent | None = None
    model: Model
    plan_digest: str = ""
    data_digest: str = ""
    checkpoint: str | None = None
    """Manifest of the last checkpoint, relative to OUT."""
    checkpoint_digest: str = ""
    """sha256 of that manifest."""
    freeze_table: tuple[FreezeRow, ...] = ()
    init_origin: dict[str, str] = {}
    """Module group -> where its first weights came from."""
    metrics: dict[str, Any] = {}
    """steps, tokens, target_tokens, padding_tokens, fill, loss_first, loss_last, ..."""
    attempts: int = 1
    world_size: int = 1
    mlflow_run_id: str | None = None
    wall_s: float = 0.0
    image_digest: str | None = None
    finished_at: str = ""
    """UTC, for people."""


# ---------------------------------------------------------------- the model folder


def describe_model(out: str, uri: str) -> Model:
    """Digest every file of a model folder. `uri` is relative to `out`, or has an address of its own."""
    base = model_uri(out, uri)
    found = {}
    for name in storage.list_dir(base):
        at = storage.join(base, name)
        found[name] = ModelFile(sha256=storage.sha256_of(at), size_bytes=storage.size(at))
    if not found:
        raise CheckpointError(
            "no model to hand over", where=base, expected="a folder in Hugging Face layout", got="nothing"
        )
    return Model(uri=uri, files=found, digest=model_digest(found))


def model_digest(found: Mapping[str, ModelFile]) -> str:
    return digest({name: [entry.sha256, entry.size_bytes] for name, entry in found.items()})


def model_uri(out: str, uri: str) -> str:
    """The address of a StageResult's model."""
    return uri if "://" in uri or uri.startswith("/") else storage.join(out, uri)


# ---------------------------------------------------------------- write, read, verify


def result_uri(out: str, stage: str) -> str:
    return storage.join(out, stage, NAME)


def encode(result: StageResult) -> bytes:
    return storage.json_bytes(result.model_dump(mode="json"))


def result_digest(result: StageResult) -> str:
    """sha256 of the result's bytes: what children name as their parent."""
    return storage.sha256_bytes(encode(result))


def write(out: str, result: StageResult) -> str:
    """Mark the stage as finished; the URI.

    Raises:
        StageMismatch: the stage is finished already, with another result.
    """
    uri = result_uri(out, result.stage)
    try:
        storage.create_once(uri, encode(result))
    except FileExistsError:
        raise StageMismatch(
            "the stage has a result already, and a different one",
            where=uri,
            do="another run finished it in the meantime: use that result, or another output",
        ) from None
    return uri


def read(out: str, stage: str, *, verify: Verify = "quick") -> StageResult:
    """Read and verify a result.

    Args:
        verify: none: only its form; quick: sizes of all files and the manifest's digest; full: every byte.

    Raises:
        FileNotFoundError: the stage is not finished.
        CheckpointError: something is not as it was written; the message names it.
    """
    uri = result_uri(out, stage)
    try:
        result = StageResult.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            "not a stage result of this format",
            where=uri,
            expected=f"format {FORMAT}",
            got=f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            do="remove it to run the stage's end again from its last checkpoint",
        ) from None
    if verify != "none":
        _verify_model(out, result, full=verify == "full")
        _verify_checkpoint(out, result, full=verify == "full")
    return result


def _verify_model(out: str, result: StageResult, *, full: bool) -> None:
    base = model_uri(out, result.model.uri)
    for name, entry in result.model.files.items():
        at = storage.join(base, name)
        try:
            found: object = storage.size(at)
        except FileNotFoundError:
            found = "no such file"
        wanted: object = entry.size_bytes
        if found == wanted and full:
            found, wanted = storage.sha256_of(at), entry.sha256
        if found != wanted:
            raise CheckpointError(
                f"the model handed over by {result.stage} is damaged",
                where=at,
                expected=wanted,
                got=found,
                do=f"restore the file, or remove {result_uri(out, result.stage)} to write the model again",
            )
    if model_digest(result.model.files) != result.model.digest:
        raise CheckpointError("the result's model digest does not fit its files", where=result_uri(out, result.stage))


def _verify_checkpoint(out: str, result: StageResult, *, full: bool) -> None:
    if result.checkpoint is None:
        return
    uri = storage.join(out, result.checkpoint)
    try:
        found, told = storage.sha256_of(uri), "the last checkpoint's manifest is damaged"
    except FileNotFoundError:
        found, told = "no such object", f"the last checkpoint of {result.stage}, which is finished, is gone"
    if result.checkpoint_digest and found != result.checkpoint_digest:
        raise CheckpointError(
            told,
            where=uri,
            expected=result.checkpoint_digest,
            got=found,
            do=f"restore it, or remove {storage.join(out, result.stage)} to train the stage again",
        )
    if full:
        for entry in manifests.read(uri).objects:
            at = storage.join(uri.rsplit("/", 1)[0], entry.key)
            try:
                found = storage.sha256_of(at)
            except FileNotFoundError:
                found = "no such object"
            if found != entry.sha256:
                raise manifests.damaged(at, expected=entry.sha256, got=found)


# ---------------------------------------------------------------- lineage


def order_of(recipe: Recipe) -> list[str]:
    """init and the recipe's stages, in order."""
    return [INIT, *recipe.stages.named()]


def parent_of(recipe: Recipe, stage: str) -> str | None:
    """The stage (or init) whose model `stage` starts from; None for init."""
    order = order_of(recipe)
    if stage not in order:
        raise UsageError("the recipe has no such stage", where=stage, expected=" ".join(order[1:]))
    at = order.index(stage)
    return order[at - 1] if at else None


def newest_result(out: str, before: str | None = None, *, verify: Verify = "quick") -> StageResult | None:
    """The newest finished stage's result, by the order of stages; only stages before `before` when it is given."""
    names = [INIT, *STAGES]
    if before is not None:
        names = names[: names.index(before)]
    for name in reversed(names):
        if storage.exists(result_uri(out, name)):
            return read(out, name, verify=verify)
    return None


def lineage(recipe: Recipe, out: str, stage: str) -> list[StageResult]:
    """Results of all stages before `stage`, init first, each checked to have grown from the one before.

    Raises:
        UsageError: one of them is not finished.
        StageMismatch: one of them was made from a parent that has changed since.
    """
    order = order_of(recipe)
    chain: list[StageResult] = []
    for name in order[: order.index(stage)]:
        try:
            result = read(out, name, verify="none")
        except FileNotFoundError:
            raise UsageError(
                f"{stage} starts from {order[order.index(stage) - 1]}, and {name} is not finished",
                where=result_uri(out, name),
                do=f"run {name} first",
            ) from None
        _check_parent(chain, result, out)
        chain.append(result)
    return chain


def _check_parent(chain: list[StageResult], result: StageResult, out: str) -> None:
    if not chain or result.parent is None:
        return
    wanted = result_digest(chain[-1])
    if result.parent.digest == wanted or _grew_from(result, chain[-1].model):
        return
    names = " -> ".join([*(parent.stage for parent in chain), f"{result.stage} (stale)"])
    raise StageMismatch(
        f"{result.stage} was made from another {chain[-1].stage} than the one that is stored",
        where=names,
        expected=f"parent {result.parent.digest[:12]}",
        got=f"{chain[-1].stage} is {wanted[:12]}",
        do=f"remove {storage.join(out, result.stage)} and what follows it, or use another output",
    )


def _grew_from(result: StageResult, model: Model) -> bool:
    """Whether the stage started from exactly these weights. A parent's result that was written again, by another
    attempt, differs in its times and figures, and its children stay what they are. Form of `resolve.stage_digest`."""
    asked = {"fields": result.resolved_stage, "parent_model": model.digest, "data": result.data_digest}
    return result.stage_digest == digest(asked)


def finished(
    recipe: Recipe, stage: str, out: str, *, verify: Verify = "quick", accept: Iterable[str] = ()
) -> StageResult | None:
    """The stage's result when it is finished and still what is asked for; None when it is to be run.

    Raises:
        StageMismatch: it is finished, but a result field or its parent differs.
    """
    try:
        result = read(out, stage, verify=verify)
    except FileNotFoundError:
        return None
    chain = lineage(recipe, out, stage) if result.parent is not None else []
    _check_parent(chain, result, out)
    if stage in recipe.stages.named():
        asked = stage_fields(recipe, recipe.stages.named()[stage])
        accepted = {change.field for change in result.accepted_changes}
        compare(result.resolved_stage, asked, where=result_uri(out, stage), accept=accepted | set(accept))
    return result


def compare(
    stored: Mapping[str, Any], asked: Mapping[str, Any], *, where: str, accept: Iterable[str] = (), step: int = 0
) -> list[manifests.Change]:
    """Changes between a stored stage and the one asked for, all of them accepted.

    Args:
        accept: fields named by --accept-change; a name that covers a section (optim) accepts all of it.
        step: the step from which a change takes effect, for the record.

    Raises:
        StageMismatch: fields differ that were not accepted; every one is listed.
    """
    accepted = list(accept)
    found = changes(stored, asked)
    refused = [change for change in found if not _covered(change, accepted)]
    if refused:
        raise StageMismatch(
            "the stored stage differs from the one asked for in what it learns",
            where=where,
            expected="\n".join(f"    {change.field}: {change.stored!r} (stored)" for change in refused).lstrip(),
            got="\n".join(f"    {change.field}: {change.asked!r} (asked for)" for change in refused).lstrip(),
            do="undo the change, use another output, or repeat with "
            + " ".join(f"--accept-change {change.field}" for change in refused),
        )
    return [
        manifests.Change(field=change.field, stored=change.stored, asked=change.asked, step=step) for change in found
    ]


def _covered(change: Change, accepted: list[str]) -> bool:
    return any(change.field == name or change.field.startswith(f"{name}.") for name in accepted)
