"""Rule 5: the export has every file, transformers gives the trainer's logits from it, and weights come back bit for bit
under old and new names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.builders import Built
from trainer.after.decode import normalised
from trainer.errors import ModelError
from trainer.models import hub

TOLERANCE = 1e-5
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", hub.INDEX, "README.md")
Note = Callable[..., None]


def test_the_folder_has_what_others_load_it_with(built: Built) -> None:
    names = {path.name for path in Path(built.export_uri).iterdir()}
    assert names >= set(FILES)
    assert {"preprocessor_config.json", "processor_config.json"} & names
    shards = {name for name in names if name.endswith(".safetensors")}
    index = json.loads((Path(built.export_uri) / hub.INDEX).read_text())
    assert len(shards) > 3 and set(index["weight_map"].values()) == shards
    tokenizer = json.loads((Path(built.export_uri) / "tokenizer_config.json").read_text())
    assert "chat_template.jinja" in names or tokenizer.get("chat_template")
    config = json.loads((Path(built.export_uri) / "config.json").read_text())
    assert config["model_type"] == built.family.model_type and config["architectures"]


CARD_COORDINATES = {
    "qwen_vl": "thousandths", "qwen2_vl": "thousandths", "qwen2_5_vl": "pixels of the picture as it is resized",
    "qwen3_vl": "thousandths", "llava": "padded to a square", "llava_next": "shares of the picture's width",
}  # fmt: skip


def test_the_cards_lines_load_the_export(built: Built) -> None:
    """In a fresh process where the family's model is not transformers' own: here its class is registered already."""
    card = (Path(built.export_uri) / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("path/to/export", built.export_uri)
    assert ("import trainer" in lines) == (not built.hugging_face)
    if built.hugging_face:
        names: dict[str, Any] = {}
        exec(lines, names)
        found = type(names["model"]).__name__
    else:
        program = [sys.executable, "-c", f"{lines}\nprint(type(model).__name__)"]
        done = subprocess.run(program, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = done.stdout.strip()
    assert [found] == json.loads((Path(built.export_uri) / "config.json").read_text())["architectures"]
    coordinates = next(line for line in card.splitlines() if line.startswith("Coordinates are "))
    assert CARD_COORDINATES[built.name] in coordinates


def transformers_logits(built: Built, model: nn.Module, name: str) -> torch.Tensor:
    """fp32[L, V] with transformers' own attention, from what we encoded."""
    from transformers import DynamicCache

    found = built.encoded[name]
    with torch.no_grad():
        embeddings = built.parts.embed_tokens(model, torch.from_numpy(found.ids))
        deeper: tuple[torch.Tensor, ...] = ()
        index = None
        if len(found.grid_thw):
            pixels = normalised(torch.from_numpy(found.patches), built.family)
            pictures, *rest = built.parts.see(model, pixels, torch.from_numpy(found.grid_thw))
            index, deeper = torch.from_numpy(found.visual_index), tuple(rest)
            embeddings = embeddings.index_copy(0, index, pictures)
        hidden = built.parts.read(
            model, embeddings[None], torch.from_numpy(found.position_ids)[:, None], mask=None, cache=DynamicCache(),
            deeper=deeper, visual_index=index,
        )  # fmt: skip
        head: Any = built.parts.head_of(model)
        return head(hidden[0])


def export_errors(built: Built) -> dict[str, float]:
    """Largest difference of logits, by sample."""
    errors = {}
    for name, found in built.encoded.items():
        ours = built.logits(built.mine, built.batch(["short", name]))[-len(found.ids) :]
        errors[name] = float((ours - transformers_logits(built, built.theirs, name)).abs().max())
    return errors


def test_the_loaded_export_gives_the_trainers_logits(built: Built, note: Note) -> None:
    errors = export_errors(built)
    note(5, export_logits_err=max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors


def test_one_changed_weight_would_be_seen(built: Built, note: Note) -> None:
    """Negative control: one element of the smallest trained matrix of each group."""
    want = transformers_logits(built, built.theirs, "one")
    least = []
    for group in ("vision", "merger", "llm"):
        named = [
            parameter
            for name, parameter in built.theirs.named_parameters()
            if built.family.group_of(name) == group and not built.family.constant(name) and parameter.ndim > 1
        ]
        weight = min(named, key=torch.Tensor.numel).data
        kept = weight.clone()
        weight.view(-1)[: max(1, weight.numel() // 100)] += 0.5
        least.append(float((transformers_logits(built, built.theirs, "one") - want).abs().max()))
        weight.copy_(kept)
    note(5, control=min(least))
    assert min(least) > 10 * TOLERANCE


def same_bits(built: Built, uri: str) -> None:
    model = built.family.build(dtype=torch.float32, attn_implementation="segments", init=True)
    hub.load(model, uri, built.family, dtype=torch.float32)
    want = dict(built.mine.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name]), name


def test_weights_come_back_bit_for_bit_under_hub_names_and_model_names(built: Built, tmp_path: Path) -> None:
    same_bits(built, built.export_uri)
    tensors: dict[str, torch.Tensor] = {}
    for path in Path(built.export_uri).glob("*.safetensors"):
        tensors |= load_file(path)
    renamed = {built.family.model_name(name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    save_file(renamed, tmp_path / "model.safetensors")
    same_bits(built, str(tmp_path))


def test_what_transformers_saves_is_read(built: Built, tmp_path: Path) -> None:
    built.theirs.save_pretrained(tmp_path)
    same_bits(built, str(tmp_path))


def test_an_unknown_name_is_refused(built: Built, tmp_path: Path) -> None:
    save_file({"nobody.knows.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError):
        same_bits(built, str(tmp_path))
