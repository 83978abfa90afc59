"""A small model of a family with everything around it: prepared data, plan, weights, export, and the samples encoded.

The data are real photographs and a clip of real frames, ingested once for all families: shards are family-neutral.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn

from pipelines.prepare.corpus.draw import encode_video
from pipelines.prepare.ingest import ingest
from pipelines.prepare.stage import prepare_stage
from pipelines.prepare.tokenizer import prepare_tokenizer
from trainer import handover, storage
from trainer.after import export
from trainer.data.batch import PackedBatch, pack_batch
from trainer.data.encode import Encoded, encode
from trainer.data.layout import Fit, Rules, layout, rules_of
from trainer.data.sample import Sample
from trainer.data.shards import ShardReader, Source
from trainer.data.tokenizer import Tokenizer
from trainer.models import config as configs
from trainer.models import hub
from trainer.models.family import FAMILIES, Family, Parts, parts_of
from trainer.recipe import Recipe
from trainer.resolve import load_recipe
from trainer.step.packed import PackedModel, place

LENGTH, PATCHES = 1024, 4096
VOCABULARY = 420
SIDE = 224
"""Of the clip: a multiple of every family's factor (28, 32), so that neither side resizes its frames."""
QUESTIONS = {
    "one": [("user", ["cat.png", "What does the picture show?"]), ("assistant", ["A cat that looks at you."])],
    "two": [
        ("user", ["cat.png", "and", "rocket.png", "What do they show?"]),
        ("assistant", ["A cat, and a rocket before its start."]),
    ],
    "turns": [
        ("user", ["wide.png", "What is in the cup?"]),
        ("assistant", ["Coffee."]),
        ("user", ["And who is this?", "person.png"]),
        ("assistant", ["A person in a space suit."]),
    ],
    "tall": [("user", ["tall.png", "Which colours?"]), ("assistant", ["Orange and white."])],
    "text": [
        ("user", ["Say something about the weather."]),
        ("assistant", ["It rains in the morning, and the sun shines later."]),
        ("user", ["And tomorrow?"]),
        ("assistant", ["The same again."]),
    ],
    "short": [("user", ["Hello"]), ("assistant", ["Hello to you."])],
}
CLIPS = {"clip": [("user", ["clip.mp4", "What happens?"]), ("assistant", ["The picture moves to the left."])]}


def names() -> list[str]:
    """Families of the table that have a config here."""
    folder = Path(__file__).parent / "configs"
    return [name for name in FAMILIES if (folder / f"{name}.py").exists()]


def module_of(name: str) -> Any:
    return importlib.import_module(f"tests.models.configs.{name}")


# ---------------------------------------------------------------- data, once for all families


def write_media(folder: Path) -> None:
    """Photographs with sides that no family takes as they are, and eight frames cut out of one."""
    photo = {name: Image.fromarray(getattr(skimage.data, name)()) for name in ("chelsea", "coffee", "rocket")}
    photo["astronaut"] = Image.fromarray(skimage.data.astronaut())
    cuts = {
        "cat.png": photo["chelsea"].resize((225, 150)),
        "rocket.png": photo["rocket"].resize((160, 107)),
        "wide.png": photo["coffee"].crop((0, 100, 600, 300)).resize((301, 100)),
        "tall.png": photo["chelsea"].crop((150, 0, 250, 300)).resize((70, 210)),
        "person.png": photo["astronaut"].resize((131, 131)),
    }
    for name, picture in cuts.items():
        picture.save(folder / name)
    big = photo["coffee"]
    frames = [big.crop((20 * at, 80, 20 * at + SIDE, 80 + SIDE)) for at in range(8)]
    (folder / "clip.mp4").write_bytes(encode_video(frames, 4))


def write_rows(path: Path, conversations: dict[str, Any]) -> None:
    rows = [
        {"id": name, "messages": [{"role": role, "content": [_content(part) for part in said]} for role, said in turns]}
        for name, turns in conversations.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _content(part: str) -> dict[str, Any]:
    if part.endswith(".png"):
        return {"type": "image", "image": part}
    if part.endswith(".mp4"):
        return {"type": "video", "video": part}
    return {"type": "text", "text": part}


def prepare_sources(folder: Path) -> None:
    """FOLDER/raw: files; FOLDER/data: shards."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    write_media(raw)
    write_rows(raw / "questions.jsonl", QUESTIONS)
    write_rows(raw / "clips.jsonl", CLIPS)
    (raw / "words.jsonl").write_text(json.dumps({"id": "words", "text": WORDS}) + "\n")
    recipe, engine = a_recipe(names()[0], folder, videos=True), []
    for name, source in recipe.prepare.sources.items():
        ingest(recipe, str(folder), name, source, "train", source.path, engine)


def a_recipe(name: str, folder: Path, *, videos: bool) -> Recipe:
    """One stage over the harness's data; `folder` has raw/."""
    module, raw = module_of(name), folder / "raw"
    sources = {
        "questions": ("openai", "instruction", "chat"),
        "clips": ("openai", "instruction", "chat"),
        "words": ("text", "text", "document"),
    }
    if not videos:
        del sources["clips"]
    tiny = load_recipe("tiny")
    stage = tiny.stages.named()["stage1"].model_dump(mode="json")
    stage |= {
        "train": {"vision": True, "merger": True, "llm": True},
        "packing": {"length": LENGTH, "patch_budget": PATCHES},
        "data": {source: 1 for source in sources if source != "words"},
        "pixels": {
            "image_min": 3136, "image_max": 12544, "video_min": 3136, "video_max": SIDE**2,
            "video_total": 4 * SIDE**2, "fps": [2], "min_frames": 4, "max_frames": 4,
        },
        "schedule": {"steps": 6, "packs_per_step": 2},
        "optim": {"lr": 1e-3},
        "held_out_packs": 0,
    }  # fmt: skip
    content: dict[str, Any] = {
        "name": f"family_{name}",
        "family": name,
        "model": {
            "tokenizer": "corpus", "vocab_size": VOCABULARY, "config": module.config(),
            "init": {"llm": "random", "vision": "random", "merger": "random"},
        },
        "prepare": {
            "lanes": 2,
            "sources": {
                source: {
                    "format": form, "path": str(raw / f"{source}.jsonl"), "kind": kind, "rendering": rendering,
                    "licence": "tests",
                }
                for source, (form, kind, rendering) in sources.items()
            },
        },
        "stages": {"stage1": stage},
        "export": {"dtype": "fp32", "file_bytes": 60_000},
    }  # fmt: skip
    return Recipe.model_validate(_merged(content, getattr(module, "RECIPE", {})))


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merged(below.get(key), value) for key, value in above.items()}
    return above


WORDS = " ".join(
    f"The {colour} {thing} {does} the {place} in the morning and again in the evening."
    for colour in ("red", "green", "blue", "orange", "white")
    for thing in ("cat", "rocket", "cup", "picture", "person")
    for does in ("stands beside", "looks at", "moves to", "shows")
    for place in ("window", "garden", "street", "weather")
)
"""For the tokenizer: enough pairs to learn VOCABULARY tokens from."""


# ---------------------------------------------------------------- one family


@dataclass
class Built:
    name: str
    recipe: Recipe
    out: str
    family: Family
    parts: Parts
    tokenizer: Tokenizer
    rules: Rules
    raw: Path

    @property
    def model_uri(self) -> str:
        return storage.join(self.out, "stage1", "model")

    @property
    def export_uri(self) -> str:
        return storage.join(self.out, "export")

    @property
    def hugging_face(self) -> bool:
        return getattr(module_of(self.name), "HUGGING_FACE", True)

    @cached_property
    def videos(self) -> bool:
        return "clips" in self.recipe.prepare.sources

    @cached_property
    def samples(self) -> dict[str, tuple[Sample, list[bytes]]]:
        """By id: every conversation as the shards have it, with its files."""
        found = {}
        for name in self.recipe.stages.named()["stage1"].data:
            source = Source.open(storage.join(self.out, "data", "sources", name, "train"))
            reader = ShardReader(source)
            for shard in range(source.num_shards):
                for row in range(source.index(shard).num_rows):
                    sample = source.sample(shard, row)
                    found[sample.id] = (sample, reader.media(shard, row))
            reader.close()
        return found

    @cached_property
    def encoded(self) -> dict[str, Encoded]:
        return {
            name: encode(sample, layout(sample, 0, Fit(), self.rules), files, self.rules)
            for name, (sample, files) in self.samples.items()
        }

    def picture_names(self) -> list[str]:
        return [name for name, found in self.encoded.items() if len(found.grid_thw)]

    def batch(self, which: Iterable[str | Encoded], *, length: int = 0) -> PackedBatch:
        """A pack of these samples; without `length` it has no padding."""
        found = [self.encoded[item] if isinstance(item, str) else item for item in which]
        used = sum(len(item.ids) for item in found)
        ids = [item if isinstance(item, str) else "made" for item in which]
        return pack_batch(
            found, ids, length=max(length, used), pad_id=self.tokenizer.id(self.family.markers.eos), pack=0,
            patch_width=self.family.patch_width, grid_columns=self.family.grid_columns,
        )  # fmt: skip

    def packed(self, model: nn.Module) -> PackedModel:
        return PackedModel(model, self.parts, mean=self.family.image_mean, std=self.family.image_std)

    def a_model(self) -> PackedModel:
        """The trainer's, with the weights of the folder."""
        model = self.family.build(dtype=torch.float32, attn_implementation="segments", init=False)
        hub.load(model, self.model_uri, self.family, dtype=torch.float32)
        return self.packed(model)

    @cached_property
    def mine(self) -> PackedModel:
        """a_model(), shared: for tests that do not change weights."""
        return self.a_model()

    @cached_property
    def theirs(self) -> Any:
        """What transformers makes of the export."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.export_uri, dtype=torch.float32).eval()

    @cached_property
    def processor(self) -> Any:
        """Of the export, with PIL's resizing: torchvision's differs by levels of 255 at hard edges."""
        from transformers import AutoImageProcessor, AutoProcessor

        processor = AutoProcessor.from_pretrained(self.export_uri)
        processor.image_processor = AutoImageProcessor.from_pretrained(self.export_uri, backend="pil")
        return processor

    def logits(self, packed: PackedModel, batch: PackedBatch) -> torch.Tensor:
        """fp32[L, V] of a pack."""
        with torch.no_grad():
            return self.parts.head_of(packed.model)(packed.hidden(place(batch, packed, "cpu")))


def reads_videos(family: Family) -> bool:
    try:
        family.video_grid(4, SIDE, SIDE, min_pixels=3136, max_pixels=SIDE**2, total_pixels=4 * SIDE**2)
    except ValueError:
        return False
    return True


def build(name: str, folder: Path, sources: Path) -> Built:
    """Data copied from `sources`, tokenizer, plan, random weights whose logits have a standard deviation of 1, and the
    export, all by the production code."""
    from trainer.models.family import load_family

    module = module_of(name)
    videos = reads_videos(load_family(name, module.config()))
    recipe, out = a_recipe(name, sources, videos=videos), str(folder)
    shutil.copytree(sources / "data", folder / "data", dirs_exist_ok=True)
    prepare_tokenizer(recipe, out)
    family = configs.family_of(recipe, out)
    tokenizer = Tokenizer.load(configs.tokenizer_uri(recipe, out))
    prepare_stage(recipe, "stage1", out)
    rules = rules_of(recipe.stages.named()["stage1"], "chat", family, tokenizer)
    built = Built(name, recipe, out, family, parts_of(family), tokenizer, rules, sources / "raw")
    _write_weights(built)
    export.export(recipe, out)
    return built


def _write_weights(built: Built) -> None:
    """As an init and a finished stage leave them."""
    model = random_model(built)
    parent = None
    for stage in (handover.INIT, "stage1"):
        uri = storage.join(built.out, stage, "model")
        saved = hub.save(model, uri, built.family, dtype=torch.float32, file_bytes=60_000)
        described = handover.Model(uri=f"{stage}/model", files=saved.files, digest=handover.model_digest(saved.files))
        result = handover.StageResult(stage=stage, recipe_sha256="0", resolved_stage={}, parent=parent, model=described)
        handover.write(built.out, result)
        parent = handover.Parent(stage=stage, digest=handover.result_digest(result))


@torch.no_grad()
def random_model(built: Built) -> nn.Module:
    """Weights with which every part matters: at the usual 0.02 so small a model passes its input through."""
    torch.manual_seed(11)
    model = built.family.build(dtype=torch.float32, attn_implementation="segments")
    for name, parameter in model.named_parameters():
        if built.family.constant(name):
            continue
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) / (parameter.numel() / parameter.shape[0]) ** 0.5)
        elif "norm" in name or "ln_" in name or name.endswith("ln_q.weight"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    last = [
        parameter
        for name, parameter in model.named_parameters()
        if built.family.group_of(name) == "llm" and re.search(r"(^|\.)(norm|ln_f)\.weight$", name)
    ]
    assert len(last) == 1, "the language model's last norm"
    packed = built.packed(model)
    logits = built.logits(packed, built.batch(["one", "text"]))
    last[0].div_(logits.std())
    return model


# ---------------------------------------------------------------- what a Sample is as Hugging Face takes it


def messages_of(built: Built, sample: Sample) -> list[dict[str, Any]]:
    """Raw: pictures as PIL images; of a video its place alone."""
    return [
        {"role": message.role, "content": [_raw(built, sample, part) for part in message.parts]}
        for message in sample.messages
    ]


def _raw(built: Built, sample: Sample, part: Any) -> dict[str, Any]:
    if part.part == "image":
        return {"type": "image", "image": Image.open(built.raw / sample.media[part.media].origin).convert("RGB")}
    if part.part == "video":
        return {"type": "video"}
    return {"type": "text", "text": part.text}


def inputs_of(built: Built, sample: Sample) -> Any:
    """What transformers' processor makes of the raw files: tensors for the model."""
    messages, processor = messages_of(built, sample), built.processor
    clips = [media for media in sample.media if media.kind == "video"]
    if not clips:
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    # apply_chat_template reads a path with torchcodec only; frames that are decoded here it samples all the same
    from transformers.video_utils import VideoMetadata

    frames, facts = [], []
    for media in clips:
        with av.open(str(built.raw / media.origin)) as container:
            frames.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
        facts.append(VideoMetadata(total_num_frames=media.num_frames, fps=media.fps, duration=media.duration_s))
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(text=[text], videos=frames, video_metadata=facts, return_tensors="pt")


def far(got: Any, want: Any) -> float:
    """Relative L2 distance."""
    got, want = (
        torch.as_tensor(np.asarray(value)) if isinstance(value, np.ndarray) else value for value in (got, want)
    )
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
