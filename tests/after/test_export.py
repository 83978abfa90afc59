"""Export: transformers loads it, gives the trainer's logits, and generates what the trainer's generation gives."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image as Pil

from tests.after.builders import a_family, a_question, a_tokenizer
from tests.before.test_init import a_recipe, write_captions
from trainer import handover, storage
from trainer.after import decode, export, losses
from trainer.after.decode import Ask
from trainer.after.prompts import Prompt, as_prompt
from trainer.data.encode import encode
from trainer.data.layout import Fit, layout, rules_of
from trainer.errors import UsageError
from trainer.models import config as configs
from trainer.models import hub
from trainer.models.family import parts_of
from trainer.recipe import Recipe
from trainer.step.packed import place


def a_finished_run(out: str) -> Recipe:
    """OUT with a tokenizer, an init and a stage1 whose weights are random but known."""
    recipe = a_recipe("model.tokens_per_second=25")
    write_captions(out, count=1)
    family = configs.family_of(recipe, out)
    parent = None
    for number, stage in enumerate((handover.INIT, "stage1")):
        torch.manual_seed(number)
        model = family.build(dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.mul_(3)
        saved = hub.save(model, storage.join(out, stage, "model"), family, dtype=torch.float32, file_bytes=10**9)
        described = handover.Model(uri=f"{stage}/model", files=saved.files, digest=handover.model_digest(saved.files))
        result = handover.StageResult(stage=stage, recipe_sha256="0", resolved_stage={}, parent=parent, model=described)
        handover.write(out, result)
        parent = handover.Parent(stage=stage, digest=handover.result_digest(result))
    return recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str, Any, Any]:
    out = str(tmp_path_factory.mktemp("out"))
    recipe = a_finished_run(out)
    export.export(recipe, out)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = storage.join(out, "export")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return recipe, out, model, AutoProcessor.from_pretrained(folder)


def test_the_bytes_are_those_of_the_last_stage(exported: tuple[Recipe, str, Any, Any]):
    _, out, _, _ = exported
    result = handover.read(out, "stage1")
    listed = storage.read_json(storage.join(out, "export", "export.json"))["files"]
    weights = [name for name in result.model.files if name.endswith(".safetensors")]
    assert weights and all(listed[name]["sha256"] == result.model.files[name].sha256 for name in weights)


def test_logits_equal_the_trainers(exported: tuple[Recipe, str, Any, Any]):
    recipe, out, model, _ = exported
    family = configs.family_of(recipe, out)
    rules = rules_of(recipe.stages.named()["sft"], "chat", family, a_tokenizer())
    sample, media = a_question()
    found = encode(sample, layout(sample, 0, Fit(), rules), media, rules)
    own = family.build(dtype=torch.float32, attn_implementation="segments")
    hub.load(own, storage.join(out, "stage1", "model"), family, dtype=torch.float32)
    packed = losses.PackedModel(own, parts_of(family), mean=family.image_mean, std=family.image_std)
    batch = losses.pack_batch([found], ["x"], length=len(found.ids), pad_id=0, patch_width=1176, pack=0)
    with torch.inference_mode():
        ours = own.lm_head(packed.hidden(place(batch, packed, "cpu")))
        theirs = model(
            input_ids=torch.from_numpy(found.ids)[None],
            pixel_values=decode.normalised(torch.from_numpy(found.patches), family),
            image_grid_thw=torch.from_numpy(found.grid_thw),
            mm_token_type_ids=torch.from_numpy((found.ids == family.config["image_token_id"]).astype(int))[None],
        ).logits[0]
    assert float((ours - theirs).abs().max()) < 1e-5


def test_processor_and_generate_give_what_our_generation_gives(exported: tuple[Recipe, str, Any, Any]):
    recipe, out, model, processor = exported
    sample, media = a_question()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Pil.open(io.BytesIO(media[0]))], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    rules = rules_of(recipe.stages.named()["sft"], "chat", configs.family_of(recipe, out), a_tokenizer())
    prompt = as_prompt(sample, media, 0, rules)
    assert isinstance(prompt, Prompt)
    assert inputs["input_ids"][0].tolist() == prompt.ids.tolist()
    ours = decode.complete(model, [Ask(prompt, (0,))], decode.Sampling(0, 1, 5, ()), a_family())
    assert generated[0, len(prompt.ids) :].tolist() == list(ours[0][0].ids)


def test_tokens_per_second_is_in_the_config(exported: tuple[Recipe, str, Any, Any]):
    assert exported[2].config.vision_config.tokens_per_second == 25


def test_the_card_tells_the_lineage_and_the_licences(exported: tuple[Recipe, str, Any, Any]):
    recipe, out, _, _ = exported
    text = storage.read_bytes(storage.join(out, "export", "README.md")).decode()
    assert handover.result_digest(handover.read(out, "stage1"))[:16] in text
    assert all(name in text for name in recipe.prepare.sources)


def test_an_export_of_the_same_model_is_left_alone(exported: tuple[Recipe, str, Any, Any], capsys):
    recipe, out, _, _ = exported
    export.export(recipe, out)
    assert "already there" in capsys.readouterr().out


def test_nothing_to_export_is_told(tmp_path):
    with pytest.raises(UsageError, match="no trained model to export"):
        export.export(a_recipe(), str(tmp_path))
