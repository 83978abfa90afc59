"""Labels by existing models: the models' side with tiny random weights (plumbing alone: what they find means nothing),
and what is made of a record with planted boxes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pipelines.prepare.grounding.labelled import chosen
from pipelines.prepare.grounding.made import make
from pipelines.prepare.grounding.masks import mask_of
from tests.prepare.grounding.builders import a_picture_of, boxed, disc, noise, objects_in, read_back, stored
from tests.prepare.grounding.test_made import a_made_recipe, uri
from trainer.after import label
from trainer.after.label_record import Found, Record, opened
from trainer.data.masks import run_lengths
from trainer.data.sample import Mask
from trainer.errors import DataError, ModelError
from trainer.grounding import Labels

LABELS = ["cat", "traffic light", "Dr. Dog"]


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as the hub has it: Grounding DINO with random weights and a tokenizer of some words."""
    folder = tmp_path_factory.mktemp("detector")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "traffic", "light", "dr", "dog", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast.from_pretrained(str(folder))
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=2,
        out_features=["stage2", "stage3", "stage4"], out_indices=[2, 3, 4],
    )  # fmt: skip
    text = transformers.BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=10, max_text_len=64,
        num_feature_levels=4, use_timm_backbone=False, use_pretrained_backbone=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    processor = transformers.GroundingDinoImageProcessor(size=size)
    transformers.GroundingDinoProcessor(processor, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("segmenter")
    vision = transformers.SamVisionConfig(
        hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
        window_size=4, global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=8)
    mask = transformers.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    torch.manual_seed(0)
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    transformers.SamModel(config).save_pretrained(folder)
    image = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(image).save_pretrained(folder)
    return str(folder)


CPU = torch.device("cpu")


def test_random_models_fill_a_record_in_pixels_of_the_original(detector: str, segmenter: str):
    """Plumbing: shapes, units and labels are right, whatever such models see."""
    picture = Image.fromarray(noise(90, 50))
    by = label.Labeller(LABELS, label.GroundingDino(detector, CPU), label.Sam(segmenter, CPU), floor=0.0)
    found = label.label(picture, by)
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) == len(found["masks"]) == 10
    assert set(found["labels"]) <= set(LABELS) and found["scores"] == sorted(found["scores"], reverse=True)
    for box, runs in zip(found["boxes"], found["masks"], strict=True):
        assert 0 <= box[0] <= box[2] <= 90 and 0 <= box[1] <= box[3] <= 50
        assert sum(runs) == 90 * 50
    assert max(box[2] for box in found["boxes"]) > 50, "x runs over the width"
    none = label.label(picture, label.Labeller(LABELS, by.detector, by.segmenter, floor=1.0))
    assert none["boxes"] == none["masks"] == []


def test_a_score_is_the_largest_of_the_labels_own_tokens(detector: str):
    dino = label.GroundingDino(detector, CPU)
    [(prompt, spans, group)] = dino.prompts(LABELS)
    assert prompt == "cat. traffic light. dr dog." and group == LABELS
    tokens = dino.tokens_of(prompt, spans)
    ids = dino.processor.tokenizer(prompt).input_ids
    words = [dino.processor.tokenizer.convert_ids_to_tokens([ids[n] for n in places]) for places in tokens]
    assert words == [["cat"], ["traffic", "light"], ["dr", "dog"]]
    picture = Image.fromarray(noise(90, 50))
    found = dino.detect(picture, LABELS, 0.0)
    with torch.inference_mode():
        raw = dino.model(**dino.processor(images=picture, text=prompt, return_tensors="pt"))
    logits = raw.logits[0].sigmoid()
    want = max(logits[0, places].max() for places in tokens)
    assert found.scores[0] == pytest.approx(float(want), abs=1e-6)
    ids = dino.processor(images=picture, text=prompt, return_tensors="pt").input_ids
    after = dino.processor.post_process_grounded_object_detection
    theirs = after(raw, ids, threshold=-1.0, target_sizes=[(50, 90)])[0]["boxes"]
    assert np.allclose(found.boxes, np.clip(theirs.numpy(), 0, [90, 50, 90, 50]), atol=1e-3)


def test_more_labels_than_a_prompt_holds_are_asked_in_several(detector: str):
    dino = label.GroundingDino(detector, CPU)
    dino.max_tokens = 7
    prompts = list(dino.prompts(LABELS))
    assert [group for *_, group in prompts] == [["cat", "traffic light"], ["Dr. Dog"]]
    assert len(dino.detect(Image.fromarray(noise(90, 50)), LABELS, 0.0).labels) == 20
    dino.max_tokens = 3
    with pytest.raises(DataError, match="longer than the detector reads"):
        list(dino.prompts(LABELS))


def test_the_program_records_once_and_another_model_needs_another_folder(
    detector: str, segmenter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source = stored(
        str(tmp_path), "mine", [a_picture_of(f"p{n}", noise(90, 50, n), boxed("x", 1, 1, 9, 9)) for n in range(3)]
    )
    (tmp_path / "labels.txt").write_text("# of the street\ncat\ntraffic light\n\ncat\n")
    record = str(tmp_path / "record")

    def run(*more: str) -> None:
        words = ["label", "--shards", source.uri, "--labels", str(tmp_path / "labels.txt"), "--detector", detector]
        monkeypatch.setattr("sys.argv", [*words, "--out", record, "--floor", "0", *more])
        label.main()

    run("--segmenter", segmenter)
    assert "3 pictures asked about, 3 in the record" in capsys.readouterr().out
    first = Record(record)
    run("--segmenter", segmenter)
    assert "0 pictures asked about, 3 in the record" in capsys.readouterr().out
    assert Record(record).digest == first.digest
    assert first.facts["labels"] == ["cat", "traffic light"]
    assert set(first.facts["provenance"]) == {"floor", "transformers", "detector", "segmenter"}
    with pytest.raises(DataError, match="made in another way"):
        run()  # without the segmenter
    grounding = {
        "labels": {"record": record, "min_score": 0, "doubt_score": 0, "nms_iou": 1, "nms_iou_any": 1, "min_side": 1}
    }
    funnel = make(a_made_recipe(grounding), str(tmp_path), "made", [])["train"]
    assert funnel["kept"] == 3
    sample, _ = read_back(uri(str(tmp_path)))[0]
    assert sample.meta["labelled"]["detector"]["digest"] == first.facts["provenance"]["detector"]["digest"]


def test_other_models_are_refused(detector: str, segmenter: str):
    with pytest.raises(ModelError, match="not a detector"):
        label.GroundingDino(segmenter, CPU)
    with pytest.raises(ModelError, match="not a segmenter"):
        label.Sam(detector, CPU)


# ---------------------------------------------------------------- what is made of a record

DISC = disc(80, 60, 25, 25, 10)
FOUND = [  # box, score, label, mask, mask score
    ((15, 15, 36, 36), 0.9, "cat", run_lengths(DISC), 0.9),
    ((16, 15, 36, 36), 0.8, "cat", (), 0),  # overlaps the first by more than 0.7
    ((15, 15, 36, 36.5), 0.7, "dog", (), 0),  # the same box under another label
    ((50, 10, 70, 30), 0.6, "cat", run_lengths(DISC), 0.9),  # a mask elsewhere
    ((50, 35, 70, 55), 0.5, "cup", run_lengths(DISC), 0.1),  # a mask of little worth
    ((1, 1, 4, 30), 0.5, "pole", (), 0),  # 3 pixels wide
    ((70, 50, 80, 60), 0.3, "cup", (), 0),  # in doubt
    ((2, 40, 20, 58), 0.1, "bird", (), 0),
]  # fmt: skip


def a_found(rows: list = FOUND) -> Found:
    boxes, scores, labels, masks, worths = zip(*rows, strict=True)
    return Found(
        boxes,
        scores,
        labels,
        masks,
        worths,
        asked=("cat", "dog", "cup", "bird", "fish", "pole"),
        provenance={"detector": "d"},
    )


def test_thresholds_suppression_and_masks_are_applied_and_counted():
    counts: Counter[str] = Counter()
    things = chosen(a_found(), Labels(record="x"), 80, 60, counts)
    assert [(thing.label, thing.mask is not None) for thing in things] == [
        ("cat", True),
        ("cat", False),
        ("cup", False),
    ]
    assert things[0].box == (15, 15, 36, 36)
    assert counts == {
        "dropped overlapping": 2, "dropped too-small": 1, "dropped low-score": 2,
        "mask dropped not-of-its-box": 1, "mask dropped low-score": 1,
    }  # fmt: skip
    loose = {
        "nms_iou": 1,
        "nms_iou_any": 1,
        "min_score": 0,
        "doubt_score": 0,
        "min_side": 1,
        "min_mask_score": 0,
        "min_box_iou": 0,
    }
    assert len(chosen(a_found(), Labels(record="x", **loose), 80, 60, Counter())) == len(FOUND), "negative control"


def test_labelled_samples_say_who_found_them_what_is_absent_and_what_in_doubt(tmp_path: Path):
    out, record = str(tmp_path), str(tmp_path / "record")
    pictures = [a_picture_of(f"p{n}", noise(80, 60, n), boxed("x", 1, 1, 9, 9)) for n in range(3)]
    stored(out, "mine", [*pictures, (pictures[0][0].model_copy(update={"id": "twin"}), pictures[0][1])])
    found = a_found()
    rows = [{"picture": sample.media[0].digest, "width": 80, "height": 60, "boxes": found.boxes, "scores": found.scores,
             "labels": found.labels, "masks": found.masks, "mask_scores": found.mask_scores}
            for sample, _ in pictures[:2]]  # fmt: skip
    opened(record, found.asked, {"detector": "d"}).add(rows)
    funnel = make(a_made_recipe({"labels": {"record": record}}), out, "made", [])["train"]
    assert funnel["kept"] == 2 and funnel["bad"] == {"not-labelled": 1, "picture-again": 1}
    assert funnel["made"]["dropped overlapping"] == 4
    sample, _ = read_back(uri(out))[0]
    things = objects_in(sample)
    assert isinstance(things[0].at, Mask) and (mask_of(things[0].at, 80, 60) == DISC).all()
    assert sample.meta["absent"] == ["bird", "fish"] and sample.meta["incomplete"] == ["cup"]
    assert sample.meta["labelled"] == {"detector": "d", "scores": [0.9, 0.6, 0.5]}
    moved = str(tmp_path / "moved")
    Path(record).rename(moved)
    assert make(a_made_recipe({"labels": {"record": moved}}), out, "made", []) == {"train": funnel}
    json.dumps(funnel)


def test_a_record_that_is_not_there_or_damaged_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="no record of labels"):
        Record(str(tmp_path / "gone"))
    record = opened(str(tmp_path / "r"), ["cat"], {})
    (tmp_path / "r" / "00000.parquet").write_bytes(b"no")
    assert len(record) == 0
    with pytest.raises(DataError, match="cannot be read"):
        Record(str(tmp_path / "r"))
