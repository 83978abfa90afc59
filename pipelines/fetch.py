"""Models and data sets from a hub into storage: one commit, every byte verified, the licence shown.

    fetch_model("Qwen/Qwen2.5-VL-3B-Instruct@COMMIT", to="s3://bucket/base/qwen2_5_vl_3b")
    fetch_data("llava-instruct-150k", to="data/llava")

A revision must be given, or stands in data_sources.yaml. A branch or tag is resolved to its commit, which is printed
and recorded in fetch.json beside the files; the same call again downloads only what is missing or damaged, and another
commit into the same folder is refused, also when the branch has moved. Files are verified against what the hub says
they are: sha256 for large files, git's blob sha1 for small ones. Interrupted downloads go on where they stopped
(huggingface_hub keeps *.incomplete files). Weights in pickle formats are never fetched.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import storage
from trainer.errors import DataError, RecipeError, StorageError, UsageError
from trainer.resolve import parse_yaml

RECORD = "fetch.json"
SOURCES = Path(__file__).with_name("data_sources.yaml")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*")
TRIES = 5

Kind = Literal["model", "dataset"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it; `digest` is sha256 when `lfs`, else the sha1 of git's blob."""

    name: str
    size: int
    digest: str
    lfs: bool


@dataclass(frozen=True)
class Repo:
    """One commit of a repository on the hub."""

    kind: Kind
    name: str
    revision: str
    commit: str
    licence: str
    files: tuple[RemoteFile, ...]


def fetch_model(ref: str, *, to: str, say: Say = print, endpoint: str | None = None) -> dict[str, Any]:
    """Fetch REPO@REV; the record that is written as TO/fetch.json."""
    name, revision = split_ref(ref)
    repo = describe(name, revision, "model", endpoint=endpoint)
    files = [file for file in repo.files if not _matches(file.name, PICKLED)]
    return _fetch(repo, files, to=to, say=say, endpoint=endpoint)


def fetch_data(ref: str, *, to: str, say: Say = print, endpoint: str | None = None) -> dict[str, Any]:
    """Fetch NAME or NAME@REV, a data set that data_sources.yaml describes."""
    name, _, revision = ref.partition("@")
    source = data_source(name)
    revision = revision or source["revision"]
    repo = describe(source["repo"], revision, "dataset", endpoint=endpoint)
    files = [file for file in repo.files if _matches(file.name, source.get("files", ["*"]))]
    if not files:
        raise UsageError("no file of the data set matches", where=f"{name}: {source['files']}", got=f"{repo.commit}")
    say(f"{name}: {source['about']}")
    if revision != repo.commit:
        say(f"revision {revision} is commit {repo.commit}; it is recorded, and fetching another one here is refused")
        say(f"to have the same data elsewhere: {name}@{repo.commit}")
    record = _fetch(repo, files, to=to, say=say, endpoint=endpoint)
    path = storage.join(to, files[0].name)
    say(f"in a recipe: prepare.sources.NAME: {{format: {source['format']}, path: {path}, ...}}")
    return record


REQUIRED = ("repo", "revision", "format", "about")


def data_sources() -> dict[str, dict[str, Any]]:
    """What data_sources.yaml describes, by name.

    Raises:
        RecipeError: a description without one of REQUIRED.
    """
    found = parse_yaml(SOURCES.read_text(encoding="utf-8"), where=str(SOURCES), subject="the list of data sets")
    problems = [
        (f"{name}.{field}", "required, but missing")
        for name, source in found.items()
        for field in REQUIRED
        if not (isinstance(source, dict) and isinstance(source.get(field), str) and source[field].strip())
    ]
    if problems:
        raise RecipeError(problems, where=SOURCES, subject="the list of data sets")
    return found


def data_source(name: str) -> dict[str, Any]:
    known = data_sources()
    if name not in known:
        raise UsageError(
            "no such data set", where=name, expected=", ".join(sorted(known)), do=f"describe it in {SOURCES}"
        )
    return known[name]


def split_ref(ref: str) -> tuple[str, str]:
    """REPO@REV -> (REPO, REV)."""
    name, _, revision = ref.partition("@")
    if not name or name.count("/") > 1:
        raise UsageError("not a repository", where=ref, expected="OWNER/NAME@REVISION")
    if not revision:
        raise _unpinned(ref, f"{name}@REVISION")
    return name, revision


def _unpinned(ref: str, expected: str) -> UsageError:
    return UsageError(
        "a revision is needed: what a hub calls main changes",
        where=ref,
        expected=expected,
        do="name the commit that the hub's page shows under Files and versions",
    )


# ---------------------------------------------------------------- the hub


def describe(name: str, revision: str, kind: Kind, *, endpoint: str | None = None) -> Repo:
    """What a repository holds at a revision."""
    from huggingface_hub import HfApi

    with _hub_errors(f"{name}@{revision}"):
        info: Any = HfApi(endpoint=endpoint).repo_info(name, revision=revision, repo_type=kind, files_metadata=True)
    files = []
    for entry in info.siblings or []:
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if entry.size is None or digest is None:
            raise StorageError("the hub does not say size and digest of a file", where=f"{name}: {entry.rfilename}")
        files.append(RemoteFile(entry.rfilename, entry.size, digest, entry.lfs is not None))
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license_name") or card.get("license") or "not stated"
    assert info.sha is not None
    return Repo(kind, name, revision, info.sha, str(licence), tuple(files))


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    """The hub client's errors as ours; connection errors and 5xx become StorageError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            "the hub wants its terms accepted first", where=where, do="accept them on its page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError("no such revision on the hub", where=where) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError("no such repository on the hub, or it is private", where=where, do="set HF_TOKEN") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise StorageError("the hub did not answer", where=where, got=f"{type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise StorageError("the hub did not answer", where=where, got=f"{type(error).__name__}: {error}") from error
        raise


# ---------------------------------------------------------------- files


def _fetch(repo: Repo, files: list[RemoteFile], *, to: str, say: Say, endpoint: str | None) -> dict[str, Any]:
    stored = _record(to)
    if stored is not None and (stored["repo"], stored["commit"]) != (repo.name, repo.commit):
        raise UsageError(
            "the target holds another commit"
            + ("" if repo.revision == repo.commit else f"; {repo.revision} has moved"),
            where=storage.join(to, RECORD),
            expected=f"{stored['repo']}@{stored['commit']}",
            got=f"{repo.name}@{repo.commit}",
            do=f"go on with what is there as @{stored['commit']}, use another --to, or remove the old one",
        )
    total = sum(file.size for file in files)
    say(f"{repo.kind} {repo.name} at commit {repo.commit}: {len(files)} files, {told_bytes(total)}")
    say(f"licence: {repo.licence}; by fetching you accept it")
    began, done, found = time.monotonic(), 0, {}
    for number, file in enumerate(files, 1):
        sha256 = _kept(to, file, stored) or _bring(repo, file, to=to, endpoint=endpoint)
        found[file.name] = {"sha256": sha256, "size_bytes": file.size}
        done += file.size
        seconds = time.monotonic() - began
        left = f", about {seconds * (total - done) / done:.0f} s left" if 0 < done < total else ""
        size = f"{file.name} {told_bytes(file.size)}, verified"
        say(f"[{number}/{len(files)}] {size}; {told_bytes(done)} of {told_bytes(total)}{left}")
    record = {
        "format": 1,
        "kind": repo.kind,
        "repo": repo.name,
        "revision": repo.revision,
        "commit": repo.commit,
        "licence": repo.licence,
        "files": found,
    }
    storage.write_json(storage.join(to, RECORD), record)
    return record


def _record(to: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(storage.join(to, RECORD))
    except FileNotFoundError:
        return None


def _kept(to: str, file: RemoteFile, stored: dict[str, Any] | None) -> str | None:
    """sha256 of a file that is there already and whole; None when it is to be fetched.

    A folder is read and compared with what the hub says; an object store was written atomically, so a complete record
    and the size are enough there.
    """
    uri = storage.join(to, file.name)
    try:
        if storage.size(uri) != file.size:
            return None
    except FileNotFoundError:
        return None
    local = storage.local_path(uri)
    if local is None:
        return ((stored or {}).get("files", {}).get(file.name) or {}).get("sha256")
    return storage.sha256_file(local) if verifies(Path(local), file) else None


def _bring(repo: Repo, file: RemoteFile, *, to: str, endpoint: str | None) -> str:
    """Download, verify, put in place; its sha256."""
    local = storage.local_path(to)
    folder = Path(local if local is not None else _scratch(to)) / ".fetch"
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{repo.name}@{repo.commit[:12]}: {file.name}"
    for turn in range(2):
        path = Path(_download(repo, file, folder, endpoint=endpoint, force=turn > 0))
        if verifies(path, file):
            break
        path.unlink()
    else:
        raise DataError("a file differs from what the hub says it is, twice", where=where, expected=file.digest)
    sha256 = storage.sha256_file(path)
    target = storage.join(to, file.name)
    if local is not None:
        Path(local, file.name).parent.mkdir(parents=True, exist_ok=True)
        path.replace(Path(local, file.name))
    else:
        storage.upload_file(str(path), target)
        path.unlink()
    if not any(entry.is_file() for entry in folder.rglob("*.incomplete")):
        shutil.rmtree(folder, ignore_errors=True)
    return sha256


def _scratch(to: str) -> str:
    """The same folder of this machine for the same target, so that an interrupted download is found again."""
    return str(Path(tempfile.gettempdir()) / f"qwenvl-fetch-{hashlib.sha256(to.encode()).hexdigest()[:12]}")


def _download(repo: Repo, file: RemoteFile, folder: Path, *, endpoint: str | None, force: bool) -> str:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own lines say how far it is
    from huggingface_hub import hf_hub_download

    last: StorageError | None = None
    for turn in range(TRIES):
        if turn:
            time.sleep(min(10.0, 0.5 * 2**turn))
        try:
            with _hub_errors(f"{repo.name}: {file.name}"):
                return hf_hub_download(
                    repo.name,
                    file.name,
                    repo_type=repo.kind,
                    revision=repo.commit,
                    local_dir=folder,
                    endpoint=endpoint,
                    force_download=force,
                )
        except StorageError as error:
            last = error
    assert last is not None
    raise last


def verifies(path: Path, file: RemoteFile) -> bool:
    """Whether the bytes are those that the hub has: sha256, or sha1 over git's blob header and the bytes."""
    if path.stat().st_size != file.size:
        return False
    if file.lfs:
        return storage.sha256_file(path) == file.digest
    blob = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while part := opened.read(8 * 1024**2):
            blob.update(part)
    return blob.hexdigest() == file.digest


def _matches(name: str, patterns: Any) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def told_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
