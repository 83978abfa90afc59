"""Bytes in and out of a folder or S3, the same calls for both: atomic writes, create-once, bounded retries.

A URI is a path (`out/tiny`, `/data/out`, `file:///data/out`) or an object store's address (`s3://bucket/key`). Every
write is atomic: a reader sees the old bytes or the new ones, never a part. `create_once` is the only lock this
system uses on storage: of several writers exactly one creates the object (os.link in a folder, If-None-Match on S3).

Errors: FileNotFoundError and FileExistsError as Python's own calls raise them; everything that retrying could not
cure is StorageError (exit code 146). The endpoint and credentials of S3 come from the environment as botocore reads it
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, ...).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from trainer import tries
from trainer.errors import StorageError, UsageError, remedy

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

NUM_TRIES = 5
"""Of a call, whatever it failed of; a request of S3 has tries of its own (trainer/tries.py) and is then given up."""
PART_BYTES = 50 * 1024**2
HASH_BYTES = 8 * 1024**2
LOCAL_SCHEMES = ("file://", "local://")
RENEWED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "RequestTimeTooSkewed"}
"""Refusals of S3 that end by themselves: credentials are renewed, clocks are set."""


class Refused(StorageError):
    """Storage answered, and refused: no rights, no credentials, no such bucket. Nothing of that passes with time.

    The exit code is StorageError's: a rank that meets it is started again, a counted number of times.
    """


# ---------------------------------------------------------------- names


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`; parts are relative and never climb.

    Raises:
        UsageError: an empty address, which would be the root of this machine's files.
    """
    if not uri:
        raise UsageError("an empty address", expected="a folder, or one of an object store such as s3://bucket/folder")
    for part in parts:
        assert not part.startswith("/") and ".." not in part.split("/"), part
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)]) or "/"


def local_path(uri: str) -> str | None:
    """The path when the URI is a folder or file of this machine, else None."""
    for scheme in LOCAL_SCHEMES:
        if uri.startswith(scheme):
            return uri[len(scheme) :]
    return None if "://" in uri else uri


def _remote(uri: str) -> tuple[Any, str]:
    scheme, rest = uri.split("://", 1)
    try:
        on_s3 = scheme in ("s3", "s3a")
        filesystem = tries.s3_class()(**tries.S3_OPTIONS) if on_s3 else fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        expected = "a path, s3://, https:// or another address that fsspec and an installed package know"
        raise UsageError("no such kind of storage", where=uri, expected=expected, got=str(error)) from None
    return filesystem, uri if scheme in ("http", "https") else rest.rstrip("/")


def _retried(call: Callable[[], T], uri: str, doing: str) -> T:
    """Run `call`, trying again with growing waits on anything that may pass.

    Raises:
        StorageError: after NUM_TRIES, or when the caller's patience (trainer/tries.py) is over.
        Refused: at once, without rights, credentials or a bucket, or where a web server answers 401, 403, 410, ...
    """
    with tries.one_call():
        for turn in range(1, NUM_TRIES + 1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
                if _without_bucket(error):
                    do = "create the bucket, or check its name and AWS_ENDPOINT_URL"
                    raise Refused(f"no such bucket to {doing}", where=uri, got=_told(error), do=do) from error
                raise
            except PermissionError as error:
                kind = StorageError if tries.s3_code(error) in RENEWED else Refused
                do = "check the credentials and the bucket's policy"
                raise kind(f"storage refused to {doing}", where=uri, got=_told(error), do=do) from error
            except Exception as error:  # each client library has its own tree; all of them end up here
                if tries.s3_code(error) in ("PreconditionFailed", "412"):
                    raise FileExistsError(uri) from None
                if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
                    do = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
                    raise Refused(f"no credentials to {doing}", where=uri, got=_told(error), do=do) from error
                if (status := tries.http_refusal(error)) is not None:
                    do = "check the address, and whether it needs a login or has expired"
                    raise Refused(
                        f"the server refused to {doing}: {status}", where=uri, got=_told(error), do=do
                    ) from error
                pause = tries.pause_s(turn)
                last = isinstance(error, tries.GivenUp) or turn == NUM_TRIES or not tries.may_try_again(turn)
                if last or not tries.time_left(pause):
                    raise _gave_up(error, turn, uri, doing) from error
            time.sleep(pause)
    raise AssertionError("not reached")


def _without_bucket(error: BaseException) -> bool:
    """Whether S3 says that there is not even the bucket; answers to HEAD do not say so."""
    return tries.s3_code(error) == "NoSuchBucket"


def _gave_up(error: BaseException, turns: int, uri: str, doing: str) -> StorageError:
    if isinstance(error, tries.GivenUp):
        (turns,), error = error.args, error.__cause__ or error
    return StorageError(
        f"storage did not {doing} in {turns} {'try' if turns == 1 else 'tries'}",
        where=uri,
        got=_told(error),
        do="check the address, and AWS_ENDPOINT_URL where the storage is not Amazon's",
    )


def _told(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"


def _local(call: Callable[[], T], uri: str, doing: str) -> T:
    """A folder is not retried, except that a stale network handle is told as storage, not as a Python traceback."""
    try:
        return call()
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        raise StorageError(f"storage could not {doing}", where=uri, got=_told(error), do=remedy(error)) from error


# ---------------------------------------------------------------- reading


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The object's bytes, or the range [start, stop) of them.

    Raises:
        FileNotFoundError, StorageError
    """
    path = local_path(uri)
    if path is not None:
        return _local(lambda: _read_range(path, start, stop), uri, "read")
    fs, key = _remote(uri)
    if start is None and stop is None:
        return _retried(lambda: fs.cat_file(key, **tries.limit(fs)), uri, "read")
    return _retried(lambda: fs.cat_file(key, start=start, end=stop, **tries.limit(fs)), uri, "read")


def _read_range(path: str, start: int | None, stop: int | None) -> bytes:
    with open(path, "rb") as file:
        file.seek(start or 0)
        return file.read() if stop is None else file.read(stop - (start or 0))


def read_each(uris: Sequence[str]) -> list[bytes | None]:
    """The bytes of small objects of one storage, of an object store many at a time; None for what is not there. All
    together have the time of one call.

    Raises:
        StorageError: one of them cannot be read.
    """
    if not uris or local_path(uris[0]) is not None:
        return [_read_if_there(uri) for uri in uris]
    fs, keys = _remote(uris[0])[0], [_remote(uri)[1] for uri in uris]
    if not getattr(fs, "async_impl", False):
        return [_read_if_there(uri) for uri in uris]

    def call() -> list[bytes | None]:
        found = fs.cat_ranges(keys, None, None, on_error="return", **tries.limit(fs))
        for one in found:
            if isinstance(one, BaseException) and (not isinstance(one, FileNotFoundError) or _without_bucket(one)):
                raise one
        return [None if isinstance(one, FileNotFoundError) else one for one in found]

    return _retried(call, uris[0].rsplit("/", 1)[0], "read")


def _read_if_there(uri: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return read_bytes(uri)
    return None


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def exists(uri: str) -> bool:
    path = local_path(uri)
    if path is not None:
        return os.path.exists(path)
    fs, key = _remote(uri)
    return _retried(lambda: fs.exists(key, **tries.limit(fs)), uri, "look up")


def size(uri: str) -> int:
    """Bytes of an object.

    Raises:
        FileNotFoundError, StorageError
    """
    path = local_path(uri)
    if path is not None:
        return _local(lambda: os.stat(path).st_size, uri, "look up")
    fs, key = _remote(uri)
    return int(_retried(lambda: fs.info(key, **tries.limit(fs))["size"], uri, "look up"))


def list_dir(uri: str) -> list[str]:
    """Names directly inside, sorted; empty when there is no such folder. Temporary files of unfinished writes are
    left out."""
    path = local_path(uri)
    if path is not None:
        names = os.listdir(path) if os.path.isdir(path) else []
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def call() -> list[str]:
        fs, key = _remote(uri)
        try:
            found = fs.ls(key, detail=False, refresh=True, **tries.limit(fs))
        except FileNotFoundError as error:
            if _without_bucket(error):
                raise
            return []
        names = {name.rstrip("/").rsplit("/", 1)[1] for name in found if name.rstrip("/") != key} - {""}
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    return _retried(call, uri, "list")


def matching(pattern: str) -> list[str]:
    """URIs of what a pattern of an object store names (*, ?, [...], **), sorted.

    Raises:
        StorageError: it does not answer, or refuses.
    """
    scheme = pattern.split("://", 1)[0]

    def call() -> list[str]:
        fs, key = _remote(pattern)
        return sorted(name if "://" in name else f"{scheme}://{name}" for name in fs.glob(key, **tries.limit(fs)))

    return _retried(call, pattern, "list")


# ---------------------------------------------------------------- writing

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[str]:
    """A name beside `path` for bytes that are not yet whole; gone afterwards."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}"[:250])
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_synced(path: str, data: Buffer) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_bytes(uri: str, data: Buffer) -> None:
    """Write or replace an object atomically."""
    path = local_path(uri)
    if path is not None:

        def call() -> None:
            with _temporary(path) as temporary:
                _write_synced(temporary, data)
                os.replace(temporary, path)

        _local(call, uri, "write")
        return
    fs, key = _remote(uri)
    _retried(lambda: fs.pipe_file(key, _body(data), chunksize=PART_BYTES, **tries.limit(fs)), uri, "write")


def write_json(uri: str, value: Any) -> None:
    """Write canonical-looking JSON: sorted keys, indent 1, newline at the end."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def create_once(uri: str, data: Buffer) -> bool:
    """Create an object that must not exist yet.

    Returns:
        True when this call created it; False when it exists with the same bytes (also: this call's own first try got
        through although its answer was lost).

    Raises:
        FileExistsError: it exists with other bytes; they are left alone.
        StorageError
    """
    path = local_path(uri)
    if path is not None:

        def call() -> None:
            with _temporary(path) as temporary:
                _write_synced(temporary, data)
                os.link(temporary, path)

        attempt = lambda: _local(call, uri, "create")  # noqa: E731
    else:
        fs, key = _remote(uri)
        if not hasattr(fs, "call_s3"):
            raise StorageError(
                "this storage cannot create an object only once", where=uri, expected="a folder or s3://"
            )
        attempt = lambda: _retried(  # noqa: E731
            lambda: fs.pipe_file(key, _body(data), mode="create", chunksize=PART_BYTES, **tries.limit(fs)),
            uri,
            "create",
        )
    try:
        attempt()
        return True
    except FileExistsError:
        if size(uri) == len(data) and sha256_of(uri) == sha256_bytes(data):
            return False
        raise FileExistsError(f"{uri} exists already with other bytes") from None


class _Parts:
    """A large buffer that s3fs cuts into parts: each part becomes bytes only when it is sent."""

    def __init__(self, data: Buffer):
        self.view = memoryview(data).cast("B")

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, cut: slice) -> bytes:
        return bytes(self.view[cut])


def _body(data: Buffer) -> Any:
    if isinstance(data, bytes):
        return data
    return bytes(data) if len(data) < 2 * PART_BYTES else _Parts(data)


def upload_file(local: str, uri: str) -> None:
    """Copy a file of this machine to storage, atomically."""
    path = local_path(uri)
    if path is not None:

        def call() -> None:
            with _temporary(path) as temporary:
                shutil.copyfile(local, temporary)
                os.replace(temporary, path)

        _local(call, uri, "write")
        return
    fs, key = _remote(uri)
    _retried(lambda: fs.put_file(local, key, chunksize=PART_BYTES, **tries.limit(fs)), uri, "write")


def download_file(uri: str, local: str) -> None:
    """Copy an object to a file of this machine, atomically.

    Raises:
        FileNotFoundError, StorageError
    """
    path = local_path(uri)
    with _temporary(local) as temporary:
        if path is not None:
            _local(lambda: shutil.copyfile(path, temporary), uri, "read")
        else:
            fs, key = _remote(uri)
            _retried(lambda: fs.get_file(key, temporary, **tries.limit(fs)), uri, "read")
        os.replace(temporary, local)


def move(uri: str, to: str) -> None:
    """Give an object of this storage another name, replacing what has it. A folder does so atomically, an object store
    by a copy of its own and a removal.

    Raises:
        FileNotFoundError, StorageError
    """
    path, target = local_path(uri), local_path(to)
    assert (path is None) == (target is None), f"two storages: {uri}, {to}"
    if path is not None and target is not None:

        def call() -> None:
            os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
            os.replace(path, target)

        _local(call, uri, "move")
        return
    fs, key = _remote(uri)
    _retried(lambda: fs.cp_file(key, _remote(to)[1], **tries.limit(fs)), uri, "copy")
    remove(uri)


def remove(uri: str) -> None:
    """Remove one object; no error when it is gone already."""
    path = local_path(uri)
    with contextlib.suppress(FileNotFoundError):
        if path is not None:
            _local(lambda: os.unlink(path), uri, "remove")
            return
        fs, key = _remote(uri)
        _retried(lambda: fs.rm_file(key, **tries.limit(fs)), uri, "remove")


def remove_tree(uri: str) -> None:
    """Remove everything below; no error when there is nothing."""
    path = local_path(uri)
    if path is not None:
        if os.path.isdir(path):
            _local(lambda: shutil.rmtree(path), uri, "remove")
        return
    assert uri.split("://", 1)[1].strip("/").count("/") >= 1, f"refusing to empty a whole bucket: {uri}"
    fs, key = _remote(uri)
    with contextlib.suppress(FileNotFoundError):
        _retried(lambda: fs.rm(key, recursive=True, **tries.limit(fs)), uri, "remove")


# ---------------------------------------------------------------- digests


def sha256_bytes(data: Buffer) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(uri: str) -> str:
    """sha256 of an object, read in pieces.

    Raises:
        FileNotFoundError, StorageError
    """
    path = local_path(uri)
    if path is not None:
        return _local(lambda: sha256_file(path), uri, "read")
    total, found = size(uri), hashlib.sha256()
    for start in range(0, total, HASH_BYTES):
        found.update(read_bytes(uri, start, min(total, start + HASH_BYTES)))
    return found.hexdigest()
