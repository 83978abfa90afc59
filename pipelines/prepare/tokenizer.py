"""A tokenizer trained on a run's own text: byte-level BPE with Qwen's splitting rule and special tokens, Hugging Face
layout. Trained on the training part only; the same text gives the same bytes.

    prepare_tokenizer(recipe, out)     OUT/data/tokenizer/{tokenizer,tokenizer_config,special_tokens_map}.json

What it learns from is what the model will read: the samples as they are rendered (captions, HTML with boxes, tool
calls), not the bare text of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipelines.prepare.ingest import source_uri
from trainer import storage
from trainer.data import kept
from trainer.data.render import render
from trainer.data.sample import from_json
from trainer.data.shards import Source
from trainer.errors import RecipeError
from trainer.models.config import CORPUS, tokenizer_uri
from trainer.models.family import Family, load_family
from trainer.recipe import Recipe
from trainer.resolve import digest

VERSION = 1
INPUT = "input.json"
# Qwen2's rule (tokenizer.json of the released models): contractions, words with a leading space, single digits,
# punctuation with line breaks, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS_OF_A_SOURCE = 4000
"""More of one source would only move the vocabulary towards it."""


def prepare_tokenizer(recipe: Recipe, out: str) -> None:
    """Train and write the tokenizer where the recipe asks for one; skipped when it is there for the same text."""
    if recipe.model.tokenizer != CORPUS:
        return
    if recipe.model.vocab_size is None:
        raise RecipeError([("model.vocab_size", "needed to train a tokenizer on the corpus")])
    # The family as stated: its config is only complete (token ids) once there is a tokenizer.
    family, folder = load_family(recipe.family, stated_config(recipe)), tokenizer_uri(recipe, out)
    sources = {name: Source.open(source_uri(out, name, "train"), keep_indexes=1) for name in recipe.prepare.sources}
    key = digest(
        {
            "version": VERSION,
            "vocab_size": recipe.model.vocab_size,
            "special": [*family.special_tokens, *getattr(family, "plain_tokens", ())],
            "sources": {
                name: [kept.data_digest(source), recipe.prepare.sources[name].rendering]
                for name, source in sources.items()
            },
        }
    )
    marker = storage.join(folder, INPUT)
    if storage.exists(marker) and storage.read_json(marker) == {"key": key}:
        print("tokenizer: is already there", flush=True)
        return
    texts = [text for name, source in sources.items() for text in texts_of(source, recipe, name, family)]
    trained = train(texts, recipe.model.vocab_size, family)
    storage.remove(marker)  # what is half-written is nobody's
    storage.write_bytes(storage.join(folder, "tokenizer.json"), trained.to_str(pretty=True).encode())
    for name, content in config_files(family, recipe).items():
        storage.write_bytes(storage.join(folder, name), content.encode())
    storage.write_json(marker, {"key": key})
    print(f"tokenizer: {trained.get_vocab_size()} tokens from {sum(map(len, texts))} characters", flush=True)


def stated_config(recipe: Recipe) -> dict[str, Any]:
    """config.json as the recipe names it: in the recipe itself, a file, or a folder."""
    stated = recipe.model.config
    if isinstance(stated, dict):
        return dict(stated)
    folder = recipe.model.base or stated
    assert folder is not None  # the recipe's validation
    return storage.read_json(folder if folder.endswith(".json") else storage.join(folder, "config.json"))


def texts_of(source: Source, recipe: Recipe, name: str, family: Family) -> Iterator[str]:
    """Rendered text of a source's first samples, special tokens left out."""
    rendering, left = recipe.prepare.sources[name].rendering, TEXTS_OF_A_SOURCE
    for shard in range(source.num_shards):
        texts = source.index(shard)["sample_json"]
        for row in kept.rows(source, shard).tolist():
            if left == 0:
                return
            left -= 1
            sample = from_json(texts[row].as_py())
            sizes = [(media.width, media.height) for media in sample.media]
            try:
                segments = render(sample, left, family, rendering, sizes.__getitem__)
            except ValueError:
                continue  # a message without a place in this rendering: counted as a drop when it is planned
            for segment in segments:
                yield from (piece.text for piece in segment.pieces if piece.kind == "text")


def train(texts: Iterable[str], vocab_size: int, family: Family) -> tokenizers.Tokenizer:
    """Byte-level BPE of exactly `vocab_size` tokens, special tokens last as Qwen has them.

    Raises RecipeError when the text has too few pairs for so many tokens.
    """
    special = [AddedToken(token, special=True, normalized=False) for token in family.special_tokens]
    plain = [AddedToken(token, special=False, normalized=False) for token in getattr(family, "plain_tokens", ())]
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    wanted = vocab_size - len(special) - len(plain)
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens(special)
    inner.add_tokens(plain)
    if (bos := family.markers.bos) is not None:  # transformers takes this from tokenizer.json alone
        begins = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, inner.token_to_id(bos))]
        )
        inner.post_processor = processors.Sequence([inner.post_processor, begins])
    if inner.get_vocab_size() != vocab_size:
        found = inner.get_vocab_size()
        raise RecipeError(
            [("model.vocab_size", f"{vocab_size} asked, the corpus gives {found}: set that or fewer, or add text")]
        )
    return inner


def config_files(family: Family, recipe: Recipe) -> dict[str, str]:
    """tokenizer_config.json with the chat template, and special_tokens_map.json."""
    stages = recipe.stages.named()
    template = family.processor_files(next(iter(stages.values())).pixels).get("chat_template.jinja")
    settings = family.tokenizer_settings()
    named = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token") if settings.get(key)}
    config = {
        "errors": "replace",
        "model_max_length": max(stage.packing.length for stage in stages.values()),
        "split_special_tokens": False,
        "unk_token": None,
        "additional_special_tokens": list(family.special_tokens),
        **settings,
        **({"chat_template": template} if template else {}),
    }
    map_ = {**named, "additional_special_tokens": list(family.special_tokens)}
    return {
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(map_, indent=1) + "\n",
    }
