"""Layout, rendering and encoding: what is a target, what fits, and that counting agrees with encoding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.prepare.count import natural
from tests.data import builders
from tests.data.builders import a_sample, a_tokenizer, a_video, an_image, says, some_rules
from trainer.data import objects, order, render
from trainer.data.coordinates import Convention
from trainer.data.encode import encode
from trainer.data.layout import REASONS, Drop, Fit, Fitted, Rules, fit_sample, layout, variant_of, varies
from trainer.data.sample import Action, Box, Image, Mask, Object, Objects, Point, Sample, Span, Tools, Video, to_json
from trainer.errors import MediaError, RecipeError
from trainer.models.family import load_family

PICTURE = an_image(120, 90)
CLIP = a_video()
CLICK = Action(media=0, tool="computer_use", action="left_click", coordinates={"coordinate": (60, 45)})


def encoded(sample: Sample, files=(), rules: Rules | None = None, variant: int = 0):
    rules = rules or some_rules()
    return encode(sample, layout(sample, variant, Fit(), rules), list(files), rules)


def targets(found) -> str:
    return a_tokenizer().decode(found.label_ids.tolist())


def boxes(media: int = 0, form: str = "any") -> Objects:
    things = (
        Object(label="a <b>", at=Box(xyxy=(10, 20, 60, 70)), role="h1", content="T & t"),
        Object(label="m", at=Mask(xyxy=(0, 0, 30, 30), rle=(0, 5))),
    )
    return Objects(media=media, objects=things, form=form)  # type: ignore[arg-type]


EVERY_KIND = {
    "caption": (a_sample(says("document", Image(media=0), "A cross."), files=(PICTURE,), kind="caption"), "document"),
    "interleaved": (
        a_sample(says("document", "1", Image(media=0), "2", Image(media=0), "3"), files=(PICTURE,), kind="interleaved"),
        "document",
    ),
    "grounding": (
        a_sample(says("user", Image(media=0), "Find"), says("assistant", boxes()), files=(PICTURE,), kind="grounding"),
        "chat",
    ),
    "document": (
        a_sample(says("document", Image(media=0), boxes(form="html")), files=(PICTURE,), kind="document"),
        "document",
    ),
    "video": (
        a_sample(says("document", Video(media=0), "Grey."), files=(CLIP,), kinds=("video",), kind="video"),
        "document",
    ),
    "agent": (
        a_sample(
            says("system", Tools(media=0, tool="computer_use")),
            says("user", Image(media=0), "Click"),
            says("assistant", CLICK),
            files=(PICTURE,),
            kind="agent",
        ),
        "chat",
    ),
    "text": (a_sample(says("document", "Plain text."), kind="text"), "document"),
    "instruction": (a_sample(says("user", "Why?"), says("assistant", "So.")), "chat"),
    "preference": (builders.a_pair()[0], "chat"),
}
FILES = {"video": [CLIP], "preference": builders.a_pair()[1], "text": [], "instruction": []}


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("variant", [0, 1, 2, 3])
def test_counts_from_headers_equal_those_of_encoding_for_every_kind(kind, variant):
    sample, rendering = EVERY_KIND[kind]
    rules = some_rules(rendering, length=1024)
    found = fit_sample(sample, variant, rules)
    assert isinstance(found, Fitted)
    arrays = encode(sample, found.layout, FILES.get(kind, [PICTURE]), rules)
    counts = found.layout
    assert counts.num_tokens == len(arrays.ids) == arrays.position_ids.shape[1]
    assert counts.num_patches == len(arrays.patches) == int(arrays.grid_thw.prod(axis=1).sum())
    assert counts.num_targets == len(arrays.label_ids) > 0
    assert counts.num_visual_tokens == len(arrays.visual_index)
    pads = {a_tokenizer().id("<|image_pad|>"), a_tokenizer().id("<|video_pad|>")}
    assert set(arrays.ids[arrays.visual_index].tolist()) <= pads
    assert not pads & set(np.delete(arrays.ids, arrays.visual_index).tolist())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_label_is_a_vision_marker_or_placeholder(kind):
    sample, rendering = EVERY_KIND[kind]
    arrays = encoded(sample, FILES.get(kind, [PICTURE]), some_rules(rendering, length=1024))
    marks = {a_tokenizer().id(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    assert not marks & set(arrays.label_ids.tolist())


def test_a_document_is_text_after_text_and_end_of_text_all_targets_but_the_first():
    sample = a_sample(says("document", "One", Image(media=0), "two"), files=(PICTURE,), kind="interleaved")
    found = encoded(sample, [PICTURE], some_rules("document"))
    ids = a_tokenizer().encode("One")
    assert found.ids[: len(ids)].tolist() == ids
    assert targets(found) == a_tokenizer().decode(ids[1:]) + "two<|endoftext|>"
    assert found.label_ids.tolist() == found.ids[found.label_rows + 1].tolist()
    starts_with_picture = a_sample(says("document", Image(media=0), "two"), files=(PICTURE,), kind="caption")
    assert targets(encoded(starts_with_picture, [PICTURE], some_rules("document"))) == "two<|endoftext|>"


def test_a_chat_has_targets_in_what_the_assistant_says_and_its_end_token_only():
    sample = a_sample(
        says("user", "the assistant"), says("assistant", "One"), says("user", "assistant\n"), says("assistant", "Two")
    )
    assert targets(encoded(sample)) == "One<|im_end|>Two<|im_end|>"


def test_an_answer_pair_shares_its_prompt_and_only_answers_have_targets():
    sample, files = builders.a_pair()
    found = encoded(sample, files)
    assert found.segments[:, 3].tolist() == [-1, 0, 0]
    prompt, chosen, rejected = found.segments[:, :2].tolist()
    assert targets(found) == "A red cross.<|im_end|>Nothing at all, or a chart.<|im_end|>"
    first_of = {segment: int(found.label_rows[found.label_segment == segment][0]) for segment in (1, 2)}
    assert first_of == {1: prompt[1] - 1, 2: prompt[1] - 1}  # both first tokens are predicted by the prompt's last row
    assert 0 not in found.label_segment
    next_id = found.position_ids[1:, : prompt[1]].max() + 1
    for start, _ in (chosen, rejected):
        assert found.position_ids[:, start].tolist() == [prompt[1], next_id, next_id, next_id]
    assert a_tokenizer().decode(found.ids[: prompt[1]].tolist()).endswith("<|im_start|>assistant\n")


def test_a_sample_whose_file_is_missing_is_named():
    sample = a_sample(says("document", Image(media=0), "x"), files=(PICTURE,), kind="caption", id="p-7")
    with pytest.raises(MediaError, match="medium is missing") as told:
        encoded(sample, [], some_rules("document"))
    assert "some/p-7, media 0 (memory.png)" in str(told.value)
    assert len(encoded(sample, [PICTURE], some_rules("document")).patches)  # negative control


def test_a_boundary_token_that_begins_before_the_answer_is_no_target():
    """'assistant\\n' + '\\n\\nA' share a token of newlines; counting it as answer would train on the prompt."""
    found = encoded(a_sample(says("user", "x"), says("assistant", "\n\nA")))
    text = targets(found)
    assert text in ("A<|im_end|>", "\n\nA<|im_end|>")
    assert found.label_ids.tolist() == found.ids[found.label_rows + 1].tolist()


# ---------------------------------------------------------------- rendering


def rendered(part, variant: int = 0, media=(120, 90)) -> str:
    sample = a_sample(says("user", Image(media=0), "?"), says("assistant", part), files=(PICTURE,))
    segments = render.render(sample, variant, builders.a_family(), "chat", lambda _: (240, 180))
    return "".join(piece.text for piece in segments[0].pieces if piece.target).removesuffix("<|im_end|>")


def test_coordinates_are_pixels_of_the_resized_image():
    box = Objects(media=0, objects=(Object(label="x", at=Box(xyxy=(10, 20, 60, 200))),), form="json")
    assert rendered(box) == '[{"bbox_2d":[20,40,120,180],"label":"x"}]'  # scaled by 2, cut at the border


@pytest.mark.parametrize("kind, want", [("absolute", (20, 40)), ("thousand", (83, 222)), ("unit", (0.08, 0.22))])
def test_conventions_go_there_and_back(kind, want):
    convention = Convention(kind)
    assert convention.to_model(10, 20, (120, 90), (240, 180)) == want
    x, y = convention.to_original(*want, (120, 90), (240, 180))
    assert (x, y) == pytest.approx((10, 20), abs=0.7)


def test_the_variant_picks_the_form_of_points_and_times():
    two = (Object(label="x", at=Point(xy=(60, 45))), Object(label="x", at=Point(xy=(1, 2))))
    points = Objects(media=0, objects=two)
    assert rendered(points, 0) == '[{"point_2d":[120,90],"label":"x"},{"point_2d":[2,4],"label":"x"}]'
    assert rendered(points, 1) == '<points x1="120" y1="90" x2="2" y2="4" alt="x">x</points>'
    event = Objects(media=0, objects=(Object(label="e", at=Span(start_s=62.5, end_s=132)),))
    assert rendered(event, 0) == '[{"start":"62.5 seconds","end":"132.0 seconds","label":"e"}]'
    assert json.loads(rendered(event, 1))[0]["end"] == "00:02:12:00"
    assert objects.hmsf(132.5, 30) == "00:02:12:15"


def test_a_page_is_qwenvl_html_with_escaped_content():
    want = '<html><body>\n<h1 data-bbox="20 40 120 140">T &amp; t</h1>\n<p data-bbox="0 0 60 60"></p>\n</body></html>'
    assert rendered(boxes(form="html")) == want


def test_an_action_is_a_tool_call_in_the_screen_that_the_model_sees():
    text = rendered(CLICK)
    call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert call == {"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [120, 90]}}
    assert "240x180" in rendered(Tools(media=0, tool="mobile_use"))
    marker = a_tokenizer().id("<tool_call>")
    assert marker in a_tokenizer().encode(text)


# ---------------------------------------------------------------- fitting


def a_chat(turns: int, *, kind: str = "instruction", words: int = 12) -> Sample:
    messages = [says("system", "Short.")]
    for number in range(turns):
        messages += [says("user", f"q{number} " + "word " * words), says("assistant", f"a{number}")]
    return a_sample(*messages, kind=kind)


def test_images_shrink_before_frames_before_turns():
    picture = an_image(400, 400)
    sample = a_sample(says("document", Image(media=0), "A cross."), files=(picture,), kind="caption")
    rules = some_rules("document", length=40)
    found = fit_sample(sample, 0, rules)
    assert isinstance(found, Fitted) and found.layout.num_tokens <= 40
    assert found.fit.image_max and not found.fit.turns
    # the mildest that fits: one step milder does not
    milder = layout(sample, 0, Fit(image_max=int(found.fit.image_max / 0.8) + 1), rules)
    assert milder.num_tokens > 40


def test_a_video_loses_frames_and_keeps_an_even_number():
    sample, _ = builders.a_clip(num_frames=80)
    whole = layout(sample, 0, Fit(), some_rules("document"))
    rules = some_rules("document", length=whole.num_tokens - 1)
    found = fit_sample(sample, 0, rules)
    assert isinstance(found, Fitted) and found.fit.max_frames >= 4
    frames = next(span.frames for span in found.layout.spans if span.kind == "video")
    assert len(frames) % 2 == 0 and len(frames) < 8


def test_a_long_chat_loses_trailing_turns_and_an_agent_its_earliest():
    rules = some_rules(length=140)
    text = {}
    for kind in ("instruction", "agent"):
        sample = a_chat(6, kind=kind)
        found = fit_sample(sample, 0, rules)
        assert isinstance(found, Fitted) and 0 < found.fit.turns < 6
        text[kind] = a_tokenizer().decode(encode(sample, found.layout, [], rules).ids.tolist())
        assert "Short." in text[kind]
    assert "q0" in text["instruction"] and "q5" not in text["instruction"]
    assert "q0" not in text["agent"] and "q5" in text["agent"]


def test_a_document_loses_trailing_parts_with_their_pictures():
    parts = [part for number in range(8) for part in (f"part {number} of it", Image(media=0))]
    sample = a_sample(says("document", *parts), files=(PICTURE,), kind="interleaved")
    rules = some_rules("document", length=60)
    found = fit_sample(sample, 0, rules)
    assert isinstance(found, Fitted) and found.fit.turns
    assert len(encode(sample, found.layout, [PICTURE], rules).ids) <= 60


AT_TIMES = Span(start_s=0, end_s=1)
DROPS = {
    "over_long": (a_chat(1, words=400), {}),
    "no_target": (a_sample(says("user", "only a question")), {}),
    "aspect": (a_sample(says("user", Image(media=0)), says("assistant", "x"), files=(an_image(500, 2),)), {}),
    "rendering": (a_sample(says("document", "text"), kind="text"), {}),
    "rendering, of the word aspect": (
        a_sample(
            says("user", Image(media=0)),
            says("assistant", Objects(media=0, objects=(Object(label="aspect", at=AT_TIMES),), form="html")),
            files=(PICTURE,),
        ),
        {},
    ),
}


@pytest.mark.parametrize("reason", DROPS)
def test_what_cannot_be_used_is_dropped_with_its_reason(reason):
    (sample, more), reason = DROPS[reason], reason.split(",")[0]
    found = fit_sample(sample, 0, some_rules(**more))
    assert isinstance(found, Drop) and found.reason == reason
    if reason in ("aspect", "rendering"):
        assert natural(to_json(sample), 1, some_rules(**more))["drop"] == [REASONS.index(reason)]


@pytest.mark.parametrize(("length", "want"), [(60, Fitted), (12, Drop)])
def test_a_document_loses_trailing_parts_but_never_all_that_could_be_learned(length: int, want: type):
    parts = (Image(media=0), "a first line", "and a second " * 30)
    sample = a_sample(says("document", *parts), files=(an_image(28, 28),), kind="document")
    found = fit_sample(sample, 0, some_rules("document", length=length))
    assert isinstance(found, want)
    if isinstance(found, Fitted):
        assert found.fit.turns == 1
        assert found.layout.num_targets > 1


def test_over_long_drop_drops_where_shrink_would_have_shrunk():
    sample = a_sample(says("document", Image(media=0), "A cross."), files=(an_image(400, 400),), kind="caption")
    assert isinstance(fit_sample(sample, 0, some_rules("document", length=40, over_long="drop")), Drop)
    assert isinstance(fit_sample(sample, 0, some_rules("document", length=40)), Fitted)


def test_a_document_too_rich_in_patches_fits_by_the_patch_budget_too():
    sample = a_sample(says("document", Image(media=0), "A cross."), files=(an_image(400, 400),), kind="caption")
    found = fit_sample(sample, 0, some_rules("document", patch_budget=64))
    assert isinstance(found, Fitted) and found.layout.num_patches <= 64


def test_the_variant_picks_the_frame_rate_and_samples_without_choices_do_not_vary():
    clip, _ = builders.a_clip(num_frames=40)
    counts = [layout(clip, variant, Fit(), some_rules("document")).num_tokens for variant in range(4)]
    assert counts[0] == counts[2] < counts[1] == counts[3]
    for sample, rendering in EVERY_KIND.values():
        rules = some_rules(rendering, length=1024)
        laid = {layout(sample, variant, Fit(), rules) for variant in range(4)}
        assert varies(sample) or len(laid) == 1


# ---------------------------------------------------------------- digests, order


def test_the_rules_digest_changes_with_everything_that_changes_a_layout():
    base = some_rules().digest
    assert some_rules().digest == base
    changed = [
        some_rules("document"),
        some_rules(length=513),
        some_rules(patch_budget=1023),
        some_rules(over_long="drop"),
        some_rules(family=builders.a_family(25)),
        some_rules(pixels=builders.PIXELS.model_copy(update={"image_max": 200_000})),
    ]
    assert len({rules.digest for rules in changed} | {base}) == len(changed) + 1


def test_variants_are_a_pure_function_and_spread_evenly():
    found = [variant_of(1, 0, "s", str(number), 4) for number in range(2000)]
    assert found == [variant_of(1, 0, "s", str(number), 4) for number in range(2000)]
    assert min(np.bincount(found, minlength=4)) > 400
    assert found != [variant_of(1, 1, "s", str(number), 4) for number in range(2000)]
    assert int(order.mix(7, 8)) == int(order.mix(7, np.array([8]))[0])


def test_an_unknown_family_and_a_fractional_rate_are_recipe_errors():
    with pytest.raises(RecipeError, match="qwen2_5_vl"):
        load_family("qwen2_5vl", builders.a_config())
    with pytest.raises(RecipeError, match="not whole"):
        builders.a_family(1.5)


def test_every_parameter_name_goes_to_the_hub_layout_and_back():
    family = builders.a_family()
    table = {
        "model.visual.blocks.0.attn.qkv.weight": ("visual.blocks.0.attn.qkv.weight", "vision"),
        "model.visual.merger.mlp.0.weight": ("visual.merger.mlp.0.weight", "merger"),
        "model.language_model.layers.0.mlp.up_proj.weight": ("model.layers.0.mlp.up_proj.weight", "llm"),
        "model.language_model.embed_tokens.weight": ("model.embed_tokens.weight", "llm"),
        "lm_head.weight": ("lm_head.weight", "llm"),
    }
    for name, (hub, group) in table.items():
        assert family.hub_name(name) == hub == family.hub_name(hub)
        assert family.model_name(hub) == name == family.model_name(name)
        assert family.group_of(name) == family.group_of(hub) == group
