"""Step init: the model that the first stage starts from. `python -m trainer.before.init --recipe ... --out ...`

    model.base                          a whole model: verified, referenced, not copied
    model.init with URIs or random      trainer/models/initial.py assembles a folder from its parts
    model.init with pretrain            the part is trained here first, briefly: OUT/init/llm, OUT/init/vision

A part is a folder in the layout of released weights, so what assembles the model cannot tell it from a downloaded one.
Parts that are finished (part.json names what they were made from) are not made again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer import handover, storage
from trainer.after.opening import asked, run_program
from trainer.before import language, vision
from trainer.data import kept
from trainer.data import media as images
from trainer.data.sample import Sample
from trainer.data.shards import ShardReader, Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, ModelError
from trainer.models import config as configs
from trainer.models import files, hub, initial
from trainer.models.family import Family, load_family, parts_of
from trainer.models.templates import chat_template_of, chat_template_warnings
from trainer.progress import Progress
from trainer.recipe import GROUPS, Init, Recipe
from trainer.resolve import digest, resolved

PRETRAIN = "pretrain"
PART = "part.json"
FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZER_FILES = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    )
)
MAX_PAIRS = 4096
"""Pictures held in memory for the vision tower; a brief training sees no more."""
MAX_TEXT_BYTES = 64 * 1024**2


def run_init(recipe: Recipe, out: str) -> handover.StageResult:
    """Make the model that the first stage starts from, with its result; a finished one is returned as it is.

    Raises:
        ModelError: weights that do not fit the config.
        DataError: a source named in model.pretrain has nothing to learn from.
    """
    if (done := handover.finished(recipe, handover.INIT, out)) is not None:
        return done
    began = time.monotonic()
    metrics: dict[str, Any] = {}
    for told in configs.assumed(recipe):
        print(f"init: warning: {told}", flush=True)
    if recipe.model.base is not None:
        model, origin = _whole(recipe, out, recipe.model.base)
    else:
        assert recipe.model.init is not None
        model, origin = _assembled(recipe, out, _with_pretrained(recipe, out, recipe.model.init, metrics))
    result = handover.StageResult(
        stage=handover.INIT,
        recipe_sha256=resolved(recipe)["sha256"],
        resolved_stage=_fields(recipe),
        model=model,
        init_origin=origin,
        metrics=metrics,
        wall_s=round(time.monotonic() - began, 3),
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    handover.write(out, result)
    return result


def _fields(recipe: Recipe) -> dict[str, Any]:
    """What the initial weights depend on."""
    return {"model": recipe.model.model_dump(mode="json"), "family": recipe.family, "seed": recipe.seed}


def _whole(recipe: Recipe, out: str, uri: str) -> tuple[handover.Model, dict[str, str]]:
    """A model that is used as it stands: its tensors are those of its config, and it is referenced by digest."""
    family = configs.family_of(recipe, out)
    with torch.device("meta"):
        wanted = {family.hub_name(n): tuple(p.shape) for n, p in family.build(dtype=torch.bfloat16).named_parameters()}
    stored = [t for info in files.read_headers(uri) for t in info.tensors if not family.unused(t.name)]
    named = {family.hub_name(family.model_name(entry.name)): entry for entry in stored}
    hub.check_names(named, wanted, tied=bool(family.config.get("tie_word_embeddings")), where=uri)
    for told in import_warnings(family, uri):
        print(f"init: warning: {told}", flush=True)
    print(f"init: {uri} has every tensor of its config; digesting its files", flush=True)
    return handover.describe_model(out, uri), dict.fromkeys(GROUPS, uri)


def import_warnings(family: Family, uri: str) -> list[str]:
    """What the processor and chat template of a released model do otherwise than training here; nothing where it has
    none."""
    told = chat_template_warnings(family, chat_template_of(uri))
    try:
        processor = storage.read_json(storage.join(uri, "preprocessor_config.json"))
    except FileNotFoundError:
        return told
    return [*family.import_warnings(processor), *told]


def _assembled(recipe: Recipe, out: str, init: Init) -> tuple[handover.Model, dict[str, str]]:
    """OUT/init/model from the parts, in the dtype that stages hand over, with the tokenizer beside the weights."""
    family = configs.family_of(recipe, out)
    parts = initial.assemble(family, llm=init.llm, vision=init.vision, merger=init.merger, seed=recipe.seed)
    uri = storage.join(out, handover.INIT, "model")
    storage.remove_tree(uri)
    saved = hub.save_tensors(
        parts.tensors,
        uri,
        family,
        dtype=DTYPES[recipe.export.dtype],
        file_bytes=recipe.export.file_bytes,
        extra=tokenizer_files(configs.tokenizer_uri(recipe, out)),
    )
    model = handover.Model(uri=f"{handover.INIT}/model", files=saved.files, digest=handover.model_digest(saved.files))
    wanted = recipe.model.init
    assert wanted is not None
    trained = {group: PRETRAIN for group in ("llm", "vision") if getattr(wanted, group) == PRETRAIN}
    return model, {**parts.origin, **trained}


def tokenizer_files(folder: str) -> dict[str, bytes]:
    """The tokenizer's files, by name; tokenizer.json is one of them."""
    names = [name for name in storage.list_dir(folder) if name in TOKENIZER_FILES]
    return {name: storage.read_bytes(storage.join(folder, name)) for name in names}


def _with_pretrained(recipe: Recipe, out: str, init: Init, metrics: dict[str, Any]) -> Init:
    """`init` with `pretrain` replaced by the folders that were trained here."""
    made: dict[str, str] = {}
    for part, make in (("llm", _language), ("vision", _vision)):
        if getattr(init, part) != PRETRAIN:
            continue
        assert recipe.model.pretrain is not None
        uri = storage.join(out, handover.INIT, part)
        metrics[part] = _once(uri, _key(recipe, out, part), lambda make=make, uri=uri: make(recipe, out, uri))
        made[part] = uri
    return init.model_copy(update=made)


def _key(recipe: Recipe, out: str, part: str) -> str:
    """Digest of what a part is made from: config, settings, seed, tokenizer and the sources' data."""
    pretrain = recipe.model.pretrain
    assert pretrain is not None
    names = pretrain.sources.get("text" if part == "llm" else "pairs", [])
    sources = [kept.data_digest(Source.open(_train_uri(out, name))) for name in names]
    settings = pretrain.model_dump(mode="json", include=_SETTINGS[part])
    tokenizer = Tokenizer.load(configs.tokenizer_uri(recipe, out)).digest
    config = configs.model_config(recipe, out)
    return digest([FORMAT, part, config, settings, recipe.seed, tokenizer, sources])


_SETTINGS = {
    "llm": {"llm_steps", "llm_lr", "llm_batch_tokens", "sources"},
    "vision": {"vision_steps", "vision_lr", "vision_batch", "sources"},
}


def _once(uri: str, key: str, make: Any) -> dict[str, Any]:
    """Metrics of a part: those stored with it when it is finished, else of making it now. part.json is written last."""
    marker = storage.join(uri, PART)
    if storage.exists(marker) and (stored := storage.read_json(marker)).get("key") == key:
        print(f"init: {uri} is already there", flush=True)
        return stored["metrics"]
    storage.remove_tree(uri)
    metrics = make()
    storage.write_json(marker, {"format": FORMAT, "key": key, "metrics": metrics})
    return metrics


# ---------------------------------------------------------------- language model


def _language(recipe: Recipe, out: str, uri: str) -> dict[str, float]:
    pretrain = recipe.model.pretrain
    assert pretrain is not None
    tokenizer = Tokenizer.load(configs.tokenizer_uri(recipe, out))
    family = configs.family_of(recipe, out)
    documents = [
        documents_of(out, name, tokenizer, end=tokenizer.id(family.markers.eos)) for name in pretrain.sources["text"]
    ]
    model, config = parts_of(family).language_model(family.export_config(), seed=recipe.seed)
    progress = Progress("init: language model", pretrain.llm_steps, "steps")
    metrics = language.train_llm(
        model,
        documents,
        steps=pretrain.llm_steps,
        lr=pretrain.llm_lr,
        batch_tokens=pretrain.llm_batch_tokens,
        seed=recipe.seed,
        report=lambda done, loss: progress.at(done, f"loss {loss:.3f}"),
    )
    tied = bool(config.get("tie_word_embeddings"))
    tensors = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    write_folder(uri, config, tensors)
    return metrics


def documents_of(out: str, name: str, tokenizer: Tokenizer, *, end: int) -> list[list[int]]:
    """Token ids of every sample's text, media left out, with end-of-text."""
    found: list[list[int]] = []
    size = 0
    for _, _, sample in samples_of(out, name):
        if text := text_of(sample):
            found.append([*tokenizer.encode(text), end])
            size += len(text)
        if size > MAX_TEXT_BYTES:
            break
    if not found:
        raise DataError("a source has no text to train the language model on", where=_train_uri(out, name))
    return found


def text_of(sample: Sample) -> str:
    """The sample's text without its media and geometry: what a language model can learn from it."""
    lines = ["".join(part.text for part in message.parts if part.part == "text") for message in sample.messages]
    return "\n".join(line for line in lines if line.strip()).strip()


# ---------------------------------------------------------------- vision tower


def _vision(recipe: Recipe, out: str, uri: str) -> dict[str, float]:
    pretrain = recipe.model.pretrain
    assert pretrain is not None
    tokenizer = Tokenizer.load(configs.tokenizer_uri(recipe, out))
    family = configs.family_of(recipe, out)
    pairs = [pair for name in pretrain.sources["pairs"] for pair in pairs_of(out, name, family, tokenizer)]
    torch.manual_seed(recipe.seed)
    # the language model is not run: one layer of it is enough
    shallow = load_family(recipe.family, family.with_one_layer())
    model = shallow.build(dtype=torch.float32, attn_implementation="segments")
    progress = Progress("init: vision tower", pretrain.vision_steps, "steps")
    metrics = vision.train_vision(
        model,
        shallow,
        pairs,
        vocab_size=tokenizer.vocab_size,
        steps=pretrain.vision_steps,
        lr=pretrain.vision_lr,
        batch=pretrain.vision_batch,
        seed=recipe.seed,
        report=lambda done, loss: progress.at(done, f"loss {loss:.3f}"),
    )
    write_folder(uri, family.export_config(), vision.tower_state(model, shallow))
    return metrics


def pairs_of(out: str, name: str, family: Family, tokenizer: Tokenizer) -> list[vision.Pair]:
    """Pictures with their captions, small, of the samples that have exactly one image."""
    found: list[vision.Pair] = []
    uri = _train_uri(out, name)
    reader = ShardReader(Source.open(uri))
    try:
        for shard, row, sample in samples_of(out, name):
            text = text_of(sample)
            if len(sample.media) != 1 or sample.media[0].kind != "image" or not text:
                continue
            file = sample.media[0]
            grid = family.image_grid(file.width, file.height, min_pixels=1, max_pixels=vision.MAX_PIXELS)
            data = reader.media(shard, row)[0]
            picture = images.upright(data, where=f"{name}/{sample.id}")
            tokens = tuple(sorted(set(tokenizer.encode(text))))
            found.append(vision.Pair(family.image_patches(picture, grid), family.grid_row(grid), tokens))
            if len(found) == MAX_PAIRS:
                break
    finally:
        reader.close()
    if not found:
        raise DataError("a source has no image with a caption", where=uri, expected="samples of one image and text")
    return found


# ---------------------------------------------------------------- folders


def _train_uri(out: str, name: str) -> str:
    return storage.join(out, "data", "sources", name, "train")


def samples_of(out: str, name: str) -> Iterator[tuple[int, int, Sample]]:
    """(shard, row, sample) of what is kept of a source's training part, in order; no media are read."""
    source = Source.open(_train_uri(out, name))
    for shard in range(source.num_shards):
        for row in kept.rows(source, shard).tolist():
            yield shard, row, source.sample(shard, row)


def write_folder(uri: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A model folder as transformers writes a small one: config.json and one safetensors file."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}
    bad = [name for name, tensor in contiguous.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ModelError(
            "weights that are not finite", where=f"{uri}: {bad[0]}", do="lower the learning rate of model.pretrain"
        )
    storage.write_bytes(storage.join(uri, "model.safetensors"), to_bytes(contiguous, metadata={"format": "pt"}))
    storage.write_bytes(
        storage.join(uri, "config.json"), (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    )


def main() -> None:
    recipe, arguments = asked(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    result = run_init(recipe, arguments.out)
    origins = ", ".join(f"{group} from {origin}" for group, origin in sorted(result.init_origin.items()))
    print(f"init: {origins}; {result.wall_s:.0f} s")


if __name__ == "__main__":
    run_program(main)
