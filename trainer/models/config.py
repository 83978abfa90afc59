"""The model's config.json and tokenizer folder, as a recipe names them. Without torch.

    model_config(recipe, out)  -> dict, complete: vocabulary size and token ids are those of the tokenizer
    tokenizer_uri(recipe, out) -> folder with tokenizer.json
    family_of(recipe, out)     -> the family of that config

Shapes are read, never assumed: the ViT's intermediate size is 3420 in the released 3B and 7B, 3456 in the 32B.
"""

from __future__ import annotations

import copy
from typing import Any

from trainer import storage
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ModelError, RecipeError
from trainer.models.family import Family, load_family
from trainer.recipe import Recipe

CORPUS = "corpus"
CONFIG = "config.json"


def tokenizer_uri(recipe: Recipe, out: str) -> str:
    """Folder of the tokenizer: trained on the corpus, named by the recipe, or that of the base model."""
    if recipe.model.tokenizer == CORPUS:
        return storage.join(out, "data", "tokenizer")
    folder = recipe.model.tokenizer or recipe.model.base
    if folder is None:
        raise RecipeError([("model.tokenizer", "needed where there is no model.base: a folder, or `corpus`")])
    return folder


def model_config(recipe: Recipe, out: str) -> dict[str, Any]:
    """config.json of the model that the run trains.

    Raises:
        ModelError: there is no config, it is of another family, or the embedding is too small for the tokenizer.
        DataError: the tokenizer lacks a token that the family needs.
    """
    tokenizer = Tokenizer.load(tokenizer_uri(recipe, out))
    family = _stated_family(recipe)
    config = family.with_tokens(tokenizer.id)
    nested = family.text_config(config)
    if "vocab_size" not in nested:  # a released config leaves out what is the class's default
        own = recipe.model.base is None
        nested["vocab_size"] = tokenizer.vocab_size if own else family.shape().vocab_size
    if nested["vocab_size"] < tokenizer.vocab_size:
        raise ModelError(
            "the tokenizer has more tokens than the model has rows",
            where=tokenizer_uri(recipe, out),
            expected=f"at most {nested['vocab_size']}",
            got=tokenizer.vocab_size,
        )
    return config


def family_of(recipe: Recipe, out: str) -> Family:
    return load_family(recipe.family, model_config(recipe, out), tokens_per_second=recipe.model.tokens_per_second)


def assumed(recipe: Recipe) -> tuple[str, ...]:
    """What was filled in for the stated config where released models have something else."""
    return _stated_family(recipe).assumed


def _stated_family(recipe: Recipe) -> Family:
    return load_family(recipe.family, _stated(recipe), tokens_per_second=recipe.model.tokens_per_second)


def _stated(recipe: Recipe) -> dict[str, Any]:
    """What the recipe names, as it stands: the content of `config`, or config.json of its URI or of the base model."""
    stated = recipe.model.config
    if isinstance(stated, dict):
        config = copy.deepcopy(stated)
    else:
        folder = recipe.model.base or stated
        assert folder is not None  # the recipe's validation
        uri = folder if folder.endswith(".json") else storage.join(folder, CONFIG)
        try:
            config = storage.read_json(uri)
        except FileNotFoundError:
            raise ModelError("no model config", where=uri, do="name a folder in Hugging Face layout") from None
    return config
