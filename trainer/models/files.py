"""Where tensors lie in the safetensors files of a Hugging Face folder. Pure, without torch.

Files split at module-group borders (vision, merger, llm): what a stage froze is then copied file by file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer import storage
from trainer.errors import ModelError
from trainer.recipe import GROUPS

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100 * 1024**2


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class FileInfo:
    name: str
    tensors: tuple[TensorInfo, ...]


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], group_of: Callable[[str], str], dtype: str, file_bytes: int
) -> list[FileInfo]:
    """Which tensor goes to which file: groups apart, in the given order, a new file where file_bytes would be exceeded.

    The same shapes always give the same files, whatever the world size.
    """
    files: list[FileInfo] = []
    for group in GROUPS:
        parts: list[list[TensorInfo]] = []
        room = 0
        for name, shape in shapes.items():
            if group_of(name) != group:
                continue
            entry = TensorInfo(name, dtype, tuple(shape))
            if not parts or entry.num_bytes > room:
                parts.append([])
                room = file_bytes
            parts[-1].append(entry)
            room -= entry.num_bytes
        files += [FileInfo(f"model-{group}-{i + 1:05d}.safetensors", tuple(part)) for i, part in enumerate(parts)]
    return files


def read_headers(uri: str) -> list[FileInfo]:
    """Headers of the folder's safetensors files, by name; a file is read from the start only.

    Raises:
        ModelError: there is none, or one is damaged.
    """
    names = sorted(name for name in storage.list_dir(uri) if name.endswith(".safetensors"))
    if not names:
        raise ModelError("no weights", where=uri, expected="*.safetensors in Hugging Face layout")
    return [FileInfo(name, _header(storage.join(uri, name))) for name in names]


def _header(uri: str) -> tuple[TensorInfo, ...]:
    try:
        length = int.from_bytes(storage.read_bytes(uri, 0, 8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(storage.read_bytes(uri, 8, 8 + length))
        header.pop("__metadata__", None)
        return tuple(TensorInfo(name, entry["dtype"], tuple(entry["shape"])) for name, entry in sorted(header.items()))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("not a safetensors file", where=uri, got=f"{type(error).__name__}: {error}") from None
