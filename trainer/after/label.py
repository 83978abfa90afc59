"""Existing models label pictures: an open-vocabulary detector, then a promptable segmenter on its boxes.

    python -m trainer.after.label --shards URI --labels FILE --detector URI [--segmenter URI] --out URI

Pictures are those of a source's shards, labels one a line. What is found is recorded (label_record.py) with the models'
digests; a picture that the record has is not asked about again. Thresholds come later, where samples are made of it
(`prepare.sources.NAME.grounding.labels`).

Detector: a folder of transformers' Grounding DINO (arXiv 2303.05499). A box's score for a label is the largest
probability of the label's own tokens, so every box has one of the labels that were asked for, whole. Segmenter: a
folder of transformers' SAM (arXiv 2304.02643), one mask a box.

Shapes: Q queries of the detector, L tokens of the prompt, N boxes that pass the floor.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from trainer import storage
from trainer.after.label_record import Record, opened
from trainer.after.opening import device_of_program, local_folder, run_program
from trainer.data import media
from trainer.data.masks import run_lengths
from trainer.data.sample import from_json
from trainer.data.shards import ShardReader, Source
from trainer.errors import DataError, ModelError
from trainer.resolve import digest

MAX_TOKENS = 256
"""Of one prompt of Grounding DINO; more labels are asked in several prompts."""
BLOCK_PICTURES = 32
MAX_BOXES = 300
"""Of one picture that are segmented, best first."""


@dataclass(frozen=True)
class Detected:
    boxes: np.ndarray
    """float64[N, 4]: left, top, right, bottom in pixels of the picture."""
    scores: np.ndarray
    """float64[N]"""
    labels: list[str]


class Detector(Protocol):
    def detect(self, picture: Image.Image, labels: Sequence[str], floor: float) -> Detected: ...


class Segmenter(Protocol):
    def segment(self, picture: Image.Image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64[N, 4] -> masks bool[N, H, W] and scores float64[N]."""
        ...


# ---------------------------------------------------------------- transformers' models


class GroundingDino:
    """Raises ModelError: the folder holds no Grounding DINO. DataError: a label that no prompt can hold."""

    def __init__(self, folder: str, device: torch.device):
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type not in ("grounding-dino", "mm-grounding-dino"):
            got = config.model_type
            raise ModelError("not a detector of this kind", where=folder, expected="grounding-dino", got=got)
        self.device = device
        self.processor: Any = transformers.AutoProcessor.from_pretrained(folder)
        model: Any = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
        self.model = model.to(device).eval()
        self.max_tokens = min(MAX_TOKENS, config.max_text_len)

    @torch.inference_mode()
    def detect(self, picture: Image.Image, labels: Sequence[str], floor: float) -> Detected:
        boxes, scores, names = [np.zeros((0, 4))], [np.zeros(0)], []
        for prompt, spans, group in self.prompts(labels):
            inputs = self.processor(images=picture, text=prompt, return_tensors="pt").to(self.device)
            found = self.model(**inputs)
            tokens = self.tokens_of(prompt, spans)
            probabilities = found.logits[0].float().sigmoid()  # [Q, L]
            of_label = torch.stack([probabilities[:, places].amax(1) for places in tokens], dim=1)
            best, which = of_label.max(1)
            rows = torch.nonzero(best >= floor)[:, 0]
            boxes.append(_corners(found.pred_boxes[0, rows].double(), picture.size).cpu().numpy())
            scores.append(best[rows].double().cpu().numpy())
            names += [group[index] for index in which[rows].tolist()]
        return Detected(np.concatenate(boxes), np.concatenate(scores), names)

    def prompts(self, labels: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, int]], list[str]]]:
        """(prompt, character span of each label in it, labels): "a cat. a dog." as many as the model reads at once."""
        group: list[str] = []
        for label in labels:
            if group and self._length([*group, label]) > self.max_tokens:
                yield _prompt(group)
                group = []
            group.append(label)
            if self._length(group) > self.max_tokens:
                raise DataError("a label is longer than the detector reads", where="--labels", got=label[:80])
        if group:
            yield _prompt(group)

    def _length(self, group: list[str]) -> int:
        return len(self.processor.tokenizer(_prompt(group)[0]).input_ids)

    def tokens_of(self, prompt: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Numbers of the tokens that each span of the prompt consists of."""
        offsets = self.processor.tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        found = [[n for n, (a, b) in enumerate(offsets) if a < stop and b > start and b > a] for start, stop in spans]
        if empty := [prompt[slice(*span)] for span, tokens in zip(spans, found, strict=True) if not tokens]:
            raise DataError("a label without a token", where="--labels", got=", ".join(empty[:5]))
        return found


def _prompt(group: Sequence[str]) -> tuple[str, list[tuple[int, int]], list[str]]:
    """Labels in lower case, each ended by a full stop, as the model was trained to read them."""
    text, spans = "", []
    for label in group:
        words = re.sub(r"[.\s]+", " ", label.lower()).strip()
        spans.append((len(text), len(text) + len(words)))
        text += f"{words}. "
    return text.rstrip(), spans, list(group)


def _corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre and size in shares [N, 4] -> corners in pixels."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    whole = torch.tensor([*size, *size], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([centre - half, centre + half], dim=1).clamp(0, 1) * whole


class Sam:
    """Raises ModelError: the folder holds no SAM."""

    def __init__(self, folder: str, device: torch.device):
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type != "sam":
            raise ModelError("not a segmenter of this kind", where=folder, expected="sam", got=config.model_type)
        self.device = device
        self.processor: Any = transformers.SamProcessor.from_pretrained(folder)
        model: Any = transformers.SamModel.from_pretrained(folder)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def segment(self, picture: Image.Image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(boxes):
            return np.zeros((0, picture.height, picture.width), bool), np.zeros(0)
        inputs = self.processor(images=picture, input_boxes=[boxes.tolist()], return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        inputs = {name: value.to(self.device) for name, value in inputs.items() if not name.endswith("sizes")}
        found = self.model(**inputs, multimask_output=False)
        masks = self.processor.post_process_masks(found.pred_masks.cpu(), *sizes)[0]  # [N, 1, H, W]
        return masks[:, 0].numpy().astype(bool), found.iou_scores[0, :, 0].double().cpu().numpy()


# ---------------------------------------------------------------- labelling


@dataclass(frozen=True)
class Labeller:
    """What labels are looked for, by which models, down to which score."""

    labels: Sequence[str]
    detector: Detector
    segmenter: Segmenter | None = None
    floor: float = 0.1


def label(picture: Image.Image, by: Labeller) -> dict[str, Any]:
    """The columns of a record for one upright RGB picture."""
    found = by.detector.detect(picture, by.labels, by.floor)
    order = np.argsort(-found.scores, kind="stable")[:MAX_BOXES]
    boxes, scores = found.boxes[order], found.scores[order]
    masks: list[list[int]] = [[] for _ in order]
    mask_scores = np.zeros(len(order))
    if by.segmenter is not None:
        drawn, mask_scores = by.segmenter.segment(picture, boxes)
        masks = [list(run_lengths(mask)) for mask in drawn]
    return {
        "width": picture.width,
        "height": picture.height,
        "boxes": boxes.tolist(),
        "scores": scores.tolist(),
        "labels": [found.labels[at] for at in order],
        "masks": masks,
        "mask_scores": np.asarray(mask_scores, float).tolist(),
    }


def label_source(source: Source, by: Labeller, record: Record) -> int:
    """Labels every picture of a source that the record does not have; returns how many were asked about."""
    reader = ShardReader(source)
    rows: list[dict[str, Any]] = []
    asked: set[str] = set()
    try:
        for shard in range(source.num_shards):
            for row, text in enumerate(source.index(shard)["sample_json"].to_pylist()):
                sample = from_json(text)
                for number, item in enumerate(sample.media):
                    if item.kind != "image" or item.digest in asked or record.get(item.digest) is not None:
                        continue
                    asked.add(item.digest)
                    picture = media.upright(reader.media(shard, row)[number], where=f"{sample.source}/{sample.id}")
                    found = label(picture, by)
                    rows.append({"picture": item.digest, **found})
                    if len(rows) == BLOCK_PICTURES:
                        record.add(rows)
                        rows = []
                        print(f"label: {len(asked)} pictures", flush=True)
    finally:
        reader.close()
    if rows:
        record.add(rows)
    return len(asked)


def model_facts(uri: str, folder: str) -> dict[str, str]:
    """Where a model came from, and the digest of all its files."""
    names = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    return {"uri": uri, "digest": digest({name: storage.sha256_file(os.path.join(folder, name)) for name in names})}


def read_labels(uri: str) -> list[str]:
    """One label a line, each once, in order.

    Raises:
        DataError: none.
    """
    lines = [line.strip() for line in io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"))]
    labels = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not labels:
        raise DataError("no labels to look for", where=uri, expected="one a line", got="none")
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("--shards", "--labels", "--detector", "--out"):
        parser.add_argument(name, required=True, metavar="URI")
    parser.add_argument("--segmenter", metavar="URI", help="without one there are boxes and no masks")
    parser.add_argument("--floor", type=float, default=0.1, help="lowest score that is recorded (default 0.1)")
    asked = parser.parse_args()
    labels, device = read_labels(asked.labels), device_of_program()
    with ExitStack() as folders:
        provenance: dict[str, Any] = {"floor": asked.floor, "transformers": transformers.__version__}
        local = {}
        for role in ("detector", "segmenter"):
            if (uri := getattr(asked, role)) is not None:
                local[role] = folders.enter_context(local_folder(uri))
                provenance[role] = model_facts(uri, local[role])
        record = opened(asked.out, labels, provenance)
        detector = GroundingDino(local["detector"], device)
        segmenter = Sam(local["segmenter"], device) if "segmenter" in local else None
        by = Labeller(labels, detector, segmenter, asked.floor)
        count = label_source(Source.open(asked.shards), by, record)
        print(f"label: {count} pictures asked about, {len(record)} in the record at {asked.out}")


if __name__ == "__main__":
    run_program(main)
