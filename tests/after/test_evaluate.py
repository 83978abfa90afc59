"""Evaluation: losses per sample, other media in the same layout, and a check that can fail."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.after.builders import COLOURS, a_caption, a_family, a_question, a_tokenizer, some_rules
from tests.data.builders import a_clip, a_sample, says
from trainer.after import held_out, losses, pictures, tasks
from trainer.after.held_out import Item
from trainer.data import video
from trainer.data.encode import encode
from trainer.data.layout import Fitted, fit_sample
from trainer.data.sample import Box, Image, Key, Message, Object, Objects, Sample, Text, Video

NAMES = list(COLOURS)


def an_item(sample: Sample, media: list[bytes], rendering: str = "document") -> Item:
    rules = some_rules(rendering)
    fitted = fit_sample(sample, 0, rules)
    assert isinstance(fitted, Fitted)
    return Item(sample, media, rules, fitted.fit, fitted.layout, encode(sample, fitted.layout, media, rules))


def captions(count: int) -> list[Item]:
    return [an_item(*a_caption(f"c{n}", NAMES[n % len(NAMES)], seed=n)) for n in range(count)]


@functools.cache
def a_model(steps: int = 0) -> torch.nn.Module:
    """Trained on captions for some steps, enough to look at the picture."""
    torch.manual_seed(0)
    family = a_family()
    model = family.build(dtype=torch.float32)
    if steps:
        packed = losses.packed_model(model, family)
        packed.train()
        items = [an_item(*a_caption(f"t{n}", NAMES[n % len(NAMES)], seed=500 + n)) for n in range(64)]
        optimizer = torch.optim.AdamW(packed.parameters(), lr=3e-3)  # they share the memory of the model's
        rng = np.random.default_rng(0)
        for _ in range(steps):
            chosen = [items[i].encoded for i in rng.choice(len(items), 8, replace=False)]
            loss, _ = packed(a_pack(packed, chosen))
            packed.zero_grad()
            (loss / 100).backward()
            torch.nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def a_pack(packed: losses.PackedModel, chosen: list) -> object:
    used = sum(len(sample.ids) for sample in chosen)
    batch = losses.pack_batch(chosen, ["x"] * len(chosen), length=used, pad_id=0, patch_width=1176, pack=-1)
    return losses.place(batch, packed, "cpu")


def run(model: torch.nn.Module, samples: list, *, blind: bool = False, length: int = 400) -> list[losses.Loss]:
    packed = losses.packed_model(model, a_family(), blind=blind)
    return losses.sample_losses(packed, samples, length=length, patch_budget=400, pad_id=0)


def test_the_loss_of_a_sample_is_transformers_own_and_does_not_hang_on_its_pack():
    items = [*captions(5), an_item(*a_question(seed=9), "chat")]
    together = run(a_model(), [item.encoded for item in items])
    alone = [run(a_model(), [item.encoded])[0] for item in items]
    assert [loss.nats for loss in together] == pytest.approx([loss.nats for loss in alone], abs=1e-5)
    for item, loss in zip(items, together, strict=True):
        assert loss.nats == pytest.approx(reference_loss(item), abs=1e-5)


@torch.inference_mode()
def reference_loss(item: Item) -> float:
    from trainer.after.decode import normalised

    found = item.encoded
    logits = a_model()(
        input_ids=torch.from_numpy(found.ids)[None],
        position_ids=torch.from_numpy(found.position_ids[1:, None]),
        pixel_values=normalised(torch.from_numpy(found.patches), a_family()),
        image_grid_thw=torch.from_numpy(found.grid_thw),
        use_cache=False,
    ).logits[0]
    rows, ids = torch.from_numpy(found.label_rows), torch.from_numpy(found.label_ids)
    return float(torch.nn.functional.cross_entropy(logits[rows], ids))


def test_a_pair_is_judged_by_its_chosen_answer():
    sample, media = a_question()
    answers = {name: (Message(role="assistant", parts=(Text(text=name),)),) for name in ("red", "blue")}
    pair = sample.model_copy(
        update={
            "kind": "preference",
            "messages": sample.messages[:1],
            "chosen": answers["red"],
            "rejected": answers["blue"],
        }
    )
    loss = run(a_model(), [an_item(pair, media, "chat").encoded])[0]
    alone = run(a_model(), [an_item(sample, media, "chat").encoded])[0]
    assert loss.nats == pytest.approx(alone.nats, abs=1e-5)
    assert loss.preferred is not None


def test_media_are_exchanged_within_a_kind_and_never_with_oneself():
    items = [*captions(6), an_item(*a_question(seed=1), "chat"), an_item(*a_question(seed=2, colour="blue"), "chat")]
    donors = held_out.donors(items, seed=3)
    assert sorted(donors) == list(range(8))
    for index, donor in donors.items():
        assert items[index].sample.kind == items[donor].sample.kind
        assert items[index].sample.media[0].digest != items[donor].sample.media[0].digest


def test_a_sample_whose_picture_nobody_else_has_another_for_is_left_out():
    one, other = captions(1)[0], captions(1)[0]
    assert held_out.donors([one, other], seed=0) == {}


def test_other_media_leave_the_layout_alone_also_for_another_size():
    item, donor = captions(1)[0], an_item(*a_question(width=140, colour="blue"), "chat")
    found = held_out.with_media_of(item, donor)
    assert (found.ids == item.encoded.ids).all() and (found.grid_thw == item.encoded.grid_thw).all()
    assert found.patches.shape == item.encoded.patches.shape
    assert (found.patches != item.encoded.patches).any()


def test_a_video_shown_with_its_own_pixels_is_what_it_was(monkeypatch):
    """Also where it is shown twice; and each time is one decoding."""
    sample, media = a_clip()
    twice = a_sample(
        says("document", Video(media=0), Video(media=1), "Again."), files=(*media, *media), kinds=("video",) * 2
    )
    decoded = []
    for one, files in ((sample, media), (twice, media * 2)):
        item = an_item(one, files)
        with monkeypatch.context() as patch:
            patch.setattr(video, "decode_video", lambda *a, **k: decoded.append(len(a[1])) or decode(*a, **k))
            found = held_out.with_media_of(item, item)
        assert (found.patches == item.encoded.patches).all()
    assert len(decoded) == 3


decode = video.decode_video


def matter(model: torch.nn.Module, *, blind: bool) -> dict:
    items = captions(32)
    donors = held_out.donors(items, seed=1)
    right = [loss.nats for loss in run(model, [items[i].encoded for i in donors], blind=blind)]
    other = [held_out.with_media_of(items[i], items[donor]) for i, donor in donors.items()]
    return losses.compare(right, [loss.nats for loss in run(model, other, blind=blind)], seed=0)


def test_pictures_matter_to_a_model_that_learnt_to_look():
    assert losses.pictures_matter(matter(a_model(120), blind=False))


def test_with_the_visual_features_zeroed_the_check_fails():
    found = matter(a_model(120), blind=True)
    assert found["right"] == pytest.approx(found["shuffled"])
    assert not losses.pictures_matter(found)


def test_pictures_do_not_matter_before_training():
    assert not losses.pictures_matter(matter(a_model(), blind=False))


def test_the_interval_covers_the_mean_and_knows_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=64)
    found = losses.compare([0.0] * 64, (noise + 1).tolist(), seed=0)
    assert found["ci95"][0] < found["shuffled"] - found["right"] < found["ci95"][1]
    assert losses.pictures_matter(found)
    assert not losses.pictures_matter(losses.compare([0.0] * 64, noise.tolist(), seed=0))


def a_page() -> Item:
    sample, media = a_caption("page", "white")
    thing = Object(label="p", at=Box(xyxy=(0, 0, 40, 40)), role="p", content="hi")
    parts = (Image(media=0), Text(text="QwenVL HTML\n"), Objects(media=0, objects=(thing,), form="html"))
    return an_item(
        sample.model_copy(update={"kind": "document", "messages": (Message(role="document", parts=parts),)}), media
    )


def test_tasks_follow_from_the_key_or_from_what_a_sample_is():
    video_text = "a cat moves left between 0.5 and 1.5 seconds."
    sample, media = a_caption("v", "red")
    film = sample.model_copy(
        update={"kind": "video", "messages": (Message(role="document", parts=(Image(media=0), Text(text=video_text))),)}
    )
    found = tasks.tasks_of(
        [*captions(1), an_item(*a_question(), "chat"), a_page(), an_item(film, media)], max_new_tokens=5
    )
    assert [task.key.task for task in found] == ["colour", "html", "time"]
    assert found[2].key.value == [0.5, 1.5]
    assert tasks.score(found[1], found[1].key.value)["correct"] == 1.0
    assert tasks.score(found[2], video_text)["iou"] == 1.0
    assert [task.key.task for task in tasks.blindfolded(found)] == ["colour"]


def test_a_document_is_asked_up_to_what_is_read_off_its_pictures():
    item = a_page()
    task = tasks.tasks_of([item], max_new_tokens=5)[0]
    length = len(task.prompt.ids)
    assert task.prompt.ids.tolist() == item.encoded.ids[:length].tolist()
    assert a_tokenizer().decode(task.prompt.ids.tolist()).endswith("QwenVL HTML\n")
    assert a_tokenizer().decode(item.encoded.ids[length:].tolist(), skip_special=True) == task.key.value


def test_answers_are_greedy_and_in_order():
    items = [an_item(*a_question(f"q{n}", seed=n, width=84 + 28 * (n % 2)), "chat") for n in range(3)]
    asked = tasks.tasks_of(items, max_new_tokens=4)
    together = tasks.answer(a_model(120), asked, a_family())
    assert together == [tasks.answer(a_model(120), [task], a_family())[0] for task in asked]


def test_boxes_are_drawn_where_they_are():
    sample, media = a_question(seed=4)
    boxed = sample.model_copy(update={"key": Key(task="box", value=[10, 10, 50, 50])})
    task = tasks.tasks_of([an_item(boxed, media, "chat")], max_new_tokens=4)[0]
    from io import BytesIO

    from PIL import Image as Pil

    drawn = pictures.draw(task, "[20, 20, 60, 60]")
    assert drawn is not None
    pixels = np.asarray(Pil.open(BytesIO(drawn)))
    scale = pixels.shape[0] / 84
    assert tuple(pixels[round(30 * scale), round(10 * scale)]) == pictures.TRUE
    assert tuple(pixels[round(30 * scale), round(60 * scale)]) == pictures.PREDICTED
