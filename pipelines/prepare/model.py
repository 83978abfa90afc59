"""The family and the tokenizer that a recipe's plans are made for: arithmetic only, no weights."""

from __future__ import annotations

from typing import Any

from trainer import storage
from trainer.data.tokenizer import Tokenizer
from trainer.errors import RecipeError
from trainer.models.family import Family, load_family
from trainer.recipe import Recipe

CORPUS_TOKENIZER = "corpus"


def model_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of the recipe's model: written in the recipe, at a URI, or in the folder of the base model."""
    model = recipe.model
    if isinstance(model.config, dict):
        return dict(model.config)
    uri = storage.join(model.base, "config.json") if model.base else model.config
    if uri is None:
        raise RecipeError([("model", "neither base nor config says what the model is")])
    return storage.read_json(uri if uri.endswith(".json") else storage.join(uri, "config.json"))


def family_of(recipe: Recipe) -> Family:
    return load_family(recipe.family, model_config(recipe), tokens_per_second=recipe.model.tokens_per_second)


def tokenizer_folder(recipe: Recipe, out: str) -> str:
    """Where the recipe's tokenizer lies: trained on the corpus, a folder of its own, or the base model's."""
    named = recipe.model.tokenizer or recipe.model.base
    if named is None:
        raise RecipeError([("model.tokenizer", "give a folder with tokenizer.json, or `corpus`")])
    return storage.join(out, "data", "tokenizer") if named == CORPUS_TOKENIZER else named


def tokenizer_of(recipe: Recipe, out: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder(recipe, out))
