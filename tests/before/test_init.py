"""Before stage1: what is trained briefly learns something, and the parts make a model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.after.builders import COLOURS, a_caption, a_config, a_family, a_tokenizer
from trainer import storage
from trainer.before import init, language, vision
from trainer.data import media as images
from trainer.data.shards import ShardWriter
from trainer.errors import DataError
from trainer.models.family import Grid, load_family, parts_of
from trainer.recipe import Recipe
from trainer.resolve import load_recipe


def a_recipe(*overrides: str) -> Recipe:
    config = copy.deepcopy(a_config())
    text = load_recipe("tiny", overrides).model_dump(mode="json")
    text["model"]["config"] = config
    text["model"]["vocab_size"] = 320
    text["model"]["pretrain"] = {
        "llm_steps": 30, "llm_batch_tokens": 512, "vision_steps": 40, "vision_lr": 2e-3, "vision_batch": 16,
        "sources": {"text": ["captions"], "pairs": ["captions"]},
    }  # fmt: skip
    return Recipe.model_validate(text)


def write_captions(out: str, count: int = 64) -> None:
    storage.write_bytes(
        storage.join(out, "data", "tokenizer", "tokenizer.json"), a_tokenizer()._inner.to_str().encode()
    )
    writer = ShardWriter(storage.join(out, "data", "sources", "captions", "train"), shard_bytes=2**20)
    for number in range(count):
        writer.add(*a_caption(f"c{number}", list(COLOURS)[number % len(COLOURS)], seed=number))
    writer.close()


def some_pairs(count: int, seed: int) -> tuple[list[vision.Pair], list[int]]:
    """Pictures, their colour words as tokens, and the colour's number."""
    pairs, wanted = [], []
    for number in range(count):
        colour = number % len(COLOURS)
        _, (data,) = a_caption("x", list(COLOURS)[colour], seed=seed * 1000 + number)
        patches = a_family().image_patches(images.upright(data), Grid(1, 6, 6, 84, 84))
        pairs.append(vision.Pair(patches, (1, 6, 6), (0, 1, 2 + colour)))
        wanted.append(colour)
    return pairs, wanted


def read_out(features: np.ndarray, wanted: list[int], train: int) -> float:
    """Accuracy of a linear read-out, fitted on the first `train` rows."""
    centred = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-6)
    rows = np.concatenate([centred, np.ones((len(centred), 1))], axis=1)
    targets = np.eye(len(COLOURS))[wanted]
    weights = np.linalg.solve(
        rows[:train].T @ rows[:train] + 10 * np.eye(rows.shape[1]), rows[:train].T @ targets[:train]
    )
    return float(((rows[train:] @ weights).argmax(1) == np.asarray(wanted[train:])).mean())


def test_the_vision_tower_learns_to_tell_colours_and_nothing_else_moves():
    family = a_family()
    torch.manual_seed(0)
    model = family.build(dtype=torch.float32, attn_implementation="segments")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pairs, wanted = some_pairs(160, seed=1)
    report = vision.train_vision(model, family, pairs[:96], vocab_size=8, steps=60, lr=2e-3, batch=16, seed=0)
    assert report["loss_last"] < report["loss_first"]
    moved = {family.group_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"vision"}
    classifier = vision.Classifier(model, family, torch.ones(8))
    with torch.no_grad():
        features = classifier.pooled(*vision.inputs_of(pairs, family, 8)[:2]).numpy()
    assert read_out(features, wanted, 96) > 0.85


def test_without_pictures_the_same_read_out_knows_nothing():
    """Negative control of the read-out."""
    _, wanted = some_pairs(160, seed=1)
    assert read_out(np.random.default_rng(0).normal(size=(160, 32)), wanted, 96) < 0.5


def test_pictures_of_unequal_size_are_pooled_apart():
    family = a_family()
    model = family.build(dtype=torch.float32, attn_implementation="segments")
    classifier = vision.Classifier(model, family, torch.ones(8))
    pairs, _ = some_pairs(3, seed=2)
    wide = vision.Pair(np.concatenate([pairs[1].patches] * 2), (1, 6, 12), pairs[1].tokens)
    chosen = [pairs[0], wide, pairs[2]]
    with torch.no_grad():
        together = classifier.pooled(*vision.inputs_of(chosen, family, 8)[:2])
        alone = torch.cat([classifier.pooled(*vision.inputs_of([pair], family, 8)[:2]) for pair in chosen])
    assert torch.allclose(together, alone, atol=1e-5)


def test_too_few_pairs_are_told():
    pairs, _ = some_pairs(3, seed=1)
    with pytest.raises(DataError, match="too few image-text pairs"):
        vision.train_vision(torch.nn.Identity(), a_family(), pairs, vocab_size=8, steps=1, lr=1, batch=4, seed=0)


def test_sources_give_the_same_number_of_tokens():
    long, short = [[1] * 900], [[2] * 7, [2] * 5]
    rows = language.rows_of([long, short], seed=0, length=65)
    tokens = np.concatenate([next(rows)[:-1] for _ in range(200)])
    assert 0.4 < (tokens == 1).mean() < 0.6


def test_rows_continue_each_other():
    rows = language.rows_of([[list(range(40))]], seed=0, length=9)
    first, second = next(rows), next(rows)
    assert first[-1] == second[0]


def test_the_language_model_equals_the_text_part_of_the_whole_model():
    """What is trained as a plain Qwen2 is what the vision-language model runs: the same logits for text."""
    family = a_family()
    model = parts_of(family).language_model(family.export_config(), seed=5)[0].eval()
    whole = family.build(dtype=torch.float32).eval()
    own = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if family.group_of(name) == "llm":
            parameter.data.copy_(own[family.hub_name(name)])
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    out = str(tmp_path_factory.mktemp("out"))
    write_captions(out)
    recipe = a_recipe()
    init.run_init(recipe, out)
    return recipe, out


def test_parts_trained_here_make_a_model_and_their_origin_is_told(finished: tuple[Recipe, str]):
    recipe, out = finished
    result = init.run_init(recipe, out)
    assert result.init_origin == {"vision": "pretrain", "llm": "pretrain", "merger": "random"}
    assert result.metrics["llm"]["loss_last"] < result.metrics["llm"]["loss_first"]
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder = storage.join(out, "init", "model")
    whole, llm = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(storage.join(out, "init", "llm")),
    )
    assert torch.equal(whole.model.language_model.embed_tokens.weight, llm.model.embed_tokens.weight)
    assert "tokenizer.json" in result.model.files


def test_the_same_seed_gives_the_same_bytes(finished: tuple[Recipe, str], tmp_path):
    recipe, out = finished
    again = str(tmp_path)
    write_captions(again)
    assert init.run_init(recipe, again).model.digest == init.run_init(recipe, out).model.digest


def test_parts_named_by_uri_are_read_and_nothing_is_trained(finished: tuple[Recipe, str], tmp_path):
    _, out = finished
    other = str(tmp_path)
    write_captions(other, count=1)
    uris = f"model.init={{llm: '{out}/init/llm', vision: '{out}/init/vision', merger: '{out}/init/model'}}"
    result = init.run_init(a_recipe(uris, "seed=99"), other)
    stored = init.run_init(finished[0], out)
    weights = {name for name in stored.model.files if name.endswith(".safetensors")}
    assert {result.model.files[name].sha256 for name in weights} == {
        stored.model.files[name].sha256 for name in weights
    }
    assert result.metrics == {}


def test_a_whole_model_is_verified_and_referenced(finished: tuple[Recipe, str], tmp_path):
    _, out = finished
    base = storage.join(out, "init", "model")
    text = a_recipe().model_dump(mode="json")
    text["model"] = {"base": base}
    result = init.run_init(Recipe.model_validate(text), str(tmp_path))
    assert result.model.uri == base
    assert not storage.exists(storage.join(str(tmp_path), "init", "model"))


def test_a_recipe_that_names_no_text_is_refused():
    text = a_recipe().model_dump(mode="json")
    text["model"]["pretrain"]["sources"] = {}
    with pytest.raises(ValidationError, match=r"model\.pretrain\.sources\.text: needed"):
        Recipe.model_validate(text)


def test_the_family_has_a_torch_module_beside_it():
    assert hasattr(parts_of(load_family("qwen2_5_vl", a_config())), "plan_vision")
