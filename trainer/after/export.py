"""Step export: the final model as others load it. `python -m trainer.after.export --recipe ... --out ...`

    OUT/export/   the bytes of the newest StageResult's model, the tokenizer, the processor's files, the settings of
                  generation, and README.md: what it is, from what it grew (with digests), and whose licences apply

It loads with transformers' AutoModelForImageTextToText and AutoProcessor, of a family that transformers lacks (Qwen-VL)
where the class of this package is imported first: README.md has the lines. tokens_per_second is in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from trainer import handover, storage
from trainer.after.opening import asked, run_program
from trainer.data.tokenizer import Tokenizer
from trainer.errors import UsageError
from trainer.handover import StageResult
from trainer.models import config as configs
from trainer.models.family import Family
from trainer.recipe import Recipe

DONE = "export.json"
FORMAT = 1
COORDINATES = {
    "absolute": "pixels of the picture as it is resized for the model",
    "thousand": "thousandths of the picture's width and height",
    "unit": "shares of the picture's width and height, with two decimals",
    "square": "shares of the side of the picture padded to a square, with two decimals; the picture is in its middle",
}
"""By Convention.kind, for the card."""


def export(recipe: Recipe, out: str) -> dict[str, Any]:
    """Write OUT/export; returns export.json: {format, model, files: {name: {sha256, size_bytes}}, result}.

    A finished export of the same model is left alone.

    Raises:
        UsageError: no stage is finished.
    """
    result = handover.newest_result(out)
    if result is None or result.stage == handover.INIT:
        raise UsageError("there is no trained model to export", where=out, do="train at least one stage")
    uri = storage.join(out, "export")
    marker = storage.join(uri, DONE)
    if storage.exists(marker) and storage.read_json(marker).get("result") == handover.result_digest(result):
        print(f"export: {uri} is already there", flush=True)
        return storage.read_json(marker)
    storage.remove_tree(uri)
    for name, entry in sorted(result.model.files.items()):
        print(f"export: {name} ({entry.size_bytes / 1e6:.1f} MB)", flush=True)
        _copy(storage.join(handover.model_uri(out, result.model.uri), name), storage.join(uri, name))
    for name, content in small_files(recipe, out, result).items():
        storage.write_bytes(storage.join(uri, name), content.encode())
    described = handover.describe_model(out, "export")
    content = {
        "format": FORMAT,
        "stage": result.stage,
        "result": handover.result_digest(result),
        "model": result.model.digest,
        "files": {name: entry.model_dump(mode="json") for name, entry in described.files.items()},
    }
    storage.write_json(marker, content)
    return content


def _copy(source: str, target: str) -> None:
    if (path := storage.local_path(source)) is not None:
        storage.upload_file(path, target)
    else:
        storage.write_bytes(target, storage.read_bytes(source))


# ---------------------------------------------------------------- files beside the weights


def small_files(recipe: Recipe, out: str, result: StageResult) -> dict[str, str]:
    """name -> content of everything that is not weights; config.json is the model's own."""
    family = configs.family_of(recipe, out)
    folder = configs.tokenizer_uri(recipe, out)
    tokenizer = Tokenizer.load(folder)
    last = list(recipe.stages.named().values())[-1]
    files = family.processor_files(last.pixels)
    files |= _tokenizer_files(folder, tokenizer, family)
    files["generation_config.json"] = _json(
        {
            "bos_token_id": tokenizer.id(family.markers.bos or family.markers.eos),
            "do_sample": False,
            "eos_token_id": [tokenizer.id(family.markers.turn_end), tokenizer.id(family.markers.eos)],
            "pad_token_id": tokenizer.id(family.markers.eos),
        }
    )
    files["README.md"] = card(recipe, out, result)
    return files


def _tokenizer_files(folder: str, tokenizer: Tokenizer, family: Family) -> dict[str, str]:
    """tokenizer.json as it is; tokenizer_config.json completed with what the processor looks up by name."""
    names = storage.list_dir(folder)
    files = {"tokenizer.json": storage.read_bytes(storage.join(folder, "tokenizer.json")).decode()}
    known = "tokenizer_config.json"
    stored = storage.read_json(storage.join(folder, known)) if known in names else {}
    defaults = {**family.tokenizer_settings(), "model_max_length": 131072}
    files[known] = _json({**defaults, **stored})
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        if name in names:
            files[name] = storage.read_bytes(storage.join(folder, name)).decode()
    return files


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- card


def card(recipe: Recipe, out: str, result: StageResult) -> str:
    """README.md of the export: a model card in the hub's form."""
    named = recipe.stages.named()
    family = configs.family_of(recipe, out)
    chain = [*handover.lineage(recipe, out, result.stage), result]
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags:",
        f"- {recipe.family}",
        "---",
    ]
    lines = [
        *head,
        f"# {recipe.name}",
        "",
        recipe.description or "A vision-language model trained with qwenvl-train.",
        "",
        f"Family `{recipe.family}`, after `{result.stage}`. Model digest `{result.model.digest}`.",
        "",
        "## How it was made",
        "",
        *_table(("step", "trained", "steps", "tokens", "result digest"), (_row(one, named) for one in chain)),
        "",
        "Where the first weights came from: "
        + ", ".join(f"{group}: `{origin}`" for group, origin in sorted(result.init_origin.items()))
        + ".",
        "",
        "## Data and licences",
        "",
        "The licence of this model depends on the licences of its data and of the weights it started from.",
        "",
        *_table(
            ("source", "kind", "stages", "licence"),
            (
                (
                    name,
                    source.kind,
                    ", ".join(s for s, stage in named.items() if name in stage.data) or "-",
                    source.licence,
                )
                for name, source in recipe.prepare.sources.items()
            ),
        ),
        "",
        "## Use",
        "",
        *_use(family),
        "",
        f"Coordinates are {COORDINATES[family.coordinates.kind]}.",
        "",
    ]
    return "\n".join(lines)


def _use(family: Family) -> list[str]:
    """Python that loads the export; a family whose model transformers lacks registers its own when it is imported."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    own = (
        [] if family.model_type in KNOWN else [f"import {type(family).__module__}_model  # qwenvl-train has the model"]
    )
    return [
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        *own,
        "",
        'model = AutoModelForImageTextToText.from_pretrained("path/to/export")',
        'processor = AutoProcessor.from_pretrained("path/to/export")',
        "```",
    ]


def _row(result: StageResult, named: dict[str, Any]) -> tuple[str, ...]:
    stage = named.get(result.stage)
    trained = [group for group in ("vision", "merger", "llm") if stage is not None and getattr(stage.train, group)]
    metrics = result.metrics if stage is not None else {}
    figures = (str(metrics.get("steps", "-")), str(metrics.get("tokens", "-")))
    return result.stage, ", ".join(trained) or "-", *figures, f"`{handover.result_digest(result)[:16]}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def main() -> None:
    recipe, arguments = asked(__doc__)
    found = export(recipe, arguments.out)
    print(f"export: {len(found['files'])} files after {found['stage']}")


if __name__ == "__main__":
    run_program(main)
