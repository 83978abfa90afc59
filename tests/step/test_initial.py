"""A model from parts: what is taken from where, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.step.builders import a_config, a_family
from trainer.errors import ModelError
from trainer.models import files, hub, initial


def a_folder(path: Path, *, seed: int, groups: tuple[str, ...], strip: str = "", extra: str | None = None) -> str:
    """A folder with the tensors of some groups, names without a prefix that lone parts leave out."""
    from safetensors.torch import save_file

    family = a_family()
    tensors = initial.random_tensors(family, seed=seed, dtype=torch.float32)
    kept = {n.removeprefix(strip): t.clone() for n, t in tensors.items() if family.group_of(n) in groups}
    if extra:
        kept[extra] = torch.zeros(2)
    path.mkdir()
    save_file(kept, path / "model.safetensors")
    return str(path)


def test_each_group_comes_from_its_own_folder(tmp_path: Path) -> None:
    family = a_family()
    llm = a_folder(tmp_path / "llm", seed=1, groups=("llm",))
    vision = a_folder(tmp_path / "vision", seed=2, groups=("vision",), strip="visual.")
    parts = initial.assemble(family, llm=llm, vision=vision, merger="random", seed=3)
    assert parts.origin == {"llm": llm, "vision": vision, "merger": "random"}
    for seed, group in ((1, "llm"), (2, "vision"), (3, "merger")):
        want = initial.random_tensors(family, seed=seed, dtype=torch.float32)
        for name in want:
            if family.group_of(name) == group:
                assert torch.equal(parts.tensors[name](), want[name]), name


def test_a_whole_model_gives_only_the_group_that_is_asked_for(tmp_path: Path) -> None:
    whole = a_folder(tmp_path / "whole", seed=1, groups=("llm", "vision", "merger"))
    parts = initial.assemble(a_family(), llm=whole, vision="random", merger="random", seed=3)
    want = initial.random_tensors(a_family(), seed=3, dtype=torch.float32)
    assert torch.equal(parts.tensors["visual.patch_embed.proj.weight"](), want["visual.patch_embed.proj.weight"])


def test_missing_extra_and_wrong_shaped_tensors_are_errors(tmp_path: Path) -> None:
    family = a_family()
    with pytest.raises(ModelError, match="missing visual"):
        empty = a_folder(tmp_path / "a", seed=1, groups=("llm",))
        initial.assemble(family, llm="random", vision=empty, merger="random", seed=0)
    with pytest.raises(ModelError, match="does not know"):
        odd = a_folder(tmp_path / "b", seed=1, groups=("llm",), extra="something.else")
        initial.assemble(family, llm=odd, vision="random", merger="random", seed=0)
    wider = a_family(intermediate_size=128)
    with pytest.raises(ModelError, match="the config says"):
        narrow = a_folder(tmp_path / "c", seed=1, groups=("llm",))
        initial.assemble(wider, llm=narrow, vision="random", merger="random", seed=0)
    with pytest.raises(ModelError, match="no weights"):
        (tmp_path / "d").mkdir()
        initial.assemble(family, llm=str(tmp_path / "d"), vision="random", merger="random", seed=0)


def test_files_split_at_group_borders_and_by_size() -> None:
    shapes = {"visual.a": (10,), "visual.merger.b": (4,), "model.c": (6,), "model.d": (6,), "model.e": (100,)}
    got = files.plan_files(shapes, a_family().group_of, "F32", 60)
    assert [(f.name, [t.name for t in f.tensors]) for f in got] == [
        ("model-vision-00001.safetensors", ["visual.a"]),
        ("model-merger-00001.safetensors", ["visual.merger.b"]),
        ("model-llm-00001.safetensors", ["model.c", "model.d"]),
        ("model-llm-00002.safetensors", ["model.e"]),
    ]


def test_a_damaged_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    family = a_family()
    tensors = {
        name: (lambda tensor=tensor: tensor)
        for name, tensor in initial.random_tensors(family, seed=1, dtype=torch.float32).items()
    }
    saved = hub.save_tensors(tensors, str(tmp_path / "m"), family, dtype=torch.float32, file_bytes=10**9)
    path = tmp_path / "m" / "model-llm-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    model = family.build(dtype=torch.float32)
    with pytest.raises(ModelError, match="damaged"):
        hub.load(model, str(tmp_path / "m"), family, files=saved.files, dtype=torch.float32)
    hub.load(model, str(tmp_path / "m"), family, dtype=torch.float32)  # negative control: digests are what finds it


def test_an_unknown_dtype_or_no_header_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="not a safetensors file"):
        files.read_headers(str(tmp_path))
    assert a_config()["model_type"] == "qwen2_5_vl"
