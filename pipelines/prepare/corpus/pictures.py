"""Captions (LLaVA JSON), grounding (COCO), instructions with answer keys (OpenAI messages) and preference pairs
(LLaMA-Factory ranking), all on icons over photographs."""

from __future__ import annotations

import random

from pipelines.prepare.corpus.draw import (
    COLOURS,
    article,
    crop_photo,
    jpeg,
    moving_icon,
    one_icon,
    paste,
    several_icons,
)
from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.sources import Split

ICON_SHARE = (0.5, 0.65)
NUM_WORDS = ("zero", "one", "two", "three", "four")


def write_captions(folder: Folder, split: Split, found: Ingredients) -> None:
    """Mostly one large icon over a photograph; every tenth is a photograph alone."""
    rng = folder.rng("captions", split)
    rows = []
    for number in range(folder.count(5000 if split == "train" else 160, 24)):
        if number % 10 == 9:
            photo = rng.choice(found.photos)
            picture, text = crop_photo(rng, photo, 112, 84), f"a photo of {photo.caption}."
        else:
            picture, placed, place = one_icon(rng, found.photos, found.icons, side=84, share=ICON_SHARE)
            text = f"there is {article(placed.label)} {place}."
        rows.append(
            {
                "id": f"caption-{split}-{number:05d}",
                "image": folder.media(f"captions/{split}-{number:05d}.jpg", jpeg(picture)),
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}],
            }
        )
    folder.json("captions", split, rows)


def write_grounding(folder: Folder, split: Split, found: Ingredients) -> None:
    """COCO detection with masks; pictures of 112 to 168 pixels, a category is a colour and a name."""
    rng = folder.rng("grounding", split)
    images, annotations, categories = [], [], {}
    for number in range(folder.count(600 if split == "train" else 64, 12)):
        width, height = rng.choice(((112, 112), (140, 112), (168, 126), (126, 168)))
        picture, placed = several_icons(
            rng, found.photos, found.icons, width=width, height=height, count=rng.choice((1, 1, 2, 3)), same=False
        )
        name = folder.media(f"grounding/{split}-{number:05d}.jpg", jpeg(picture))
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height, "license": 1})
        for item in placed:
            left, top, right, bottom = item.box
            category = categories.setdefault(item.label, len(categories) + 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": category,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": sum(item.rle[1::2]),
                    "segmentation": {"size": [height, width], "counts": list(item.rle)},
                    "iscrowd": 0,
                }
            )
    folder.json(
        "grounding",
        split,
        {
            "info": {"description": "icons over photographs"},
            "licenses": [{"id": 1, "name": "see sources.json"}],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in categories.items()],
        },
    )


def write_instructions(folder: Folder, split: Split, found: Ingredients) -> None:
    """Questions with a known answer: colour, count, name choice, yes or no, box, point, time in a clip."""
    rng = folder.rng("instructions", split)
    tasks = (_colour, _colour, _count, _colour, _yes_no, _colour, _choice, _count, _colour, _place)
    rows = []
    for number in range(folder.count(1600 if split == "train" else 160, 24)):
        if number % 16 == 15:
            data, question, answer, key = _video(rng, found)
            name, medium = folder.media(f"instructions/{split}-{number:05d}.mp4", data), "video_url"
        else:
            picture, question, answer, key, _ = tasks[number % len(tasks)](rng, found)
            name, medium = folder.media(f"instructions/{split}-{number:05d}.jpg", jpeg(picture)), "image_url"
        content = [{"type": medium, medium: {"url": name}}, {"type": "text", "text": question}]
        rows.append(
            {
                "id": f"{key['task']}-{split}-{number:05d}",
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
                "key": key,
            }
        )
    folder.jsonl("instructions", split, rows)


def write_preferences(folder: Folder, split: Split, found: Ingredients) -> None:
    """Pairs of a true and a false answer, as LLaMA-Factory's ranking format writes them."""
    rng = folder.rng("preferences", split)
    tasks = (_colour, _colour, _yes_no, _count)
    rows = []
    for number in range(folder.count(320 if split == "train" else 48, 8)):
        picture, question, answer, _, wrong = tasks[number % len(tasks)](rng, found)
        rows.append(
            {
                "id": f"pair-{split}-{number:05d}",
                "conversations": [{"from": "human", "value": f"<image>{question}"}],
                "chosen": {"from": "gpt", "value": answer},
                "rejected": {"from": "gpt", "value": wrong},
                "images": [folder.media(f"preferences/{split}-{number:05d}.jpg", jpeg(picture))],
            }
        )
    folder.jsonl("preferences", split, rows)


# ---------------------------------------------------------------- tasks: picture, question, answer, key, a wrong answer


def _other(rng: random.Random, right: str, all_of: list[str]) -> str:
    return rng.choice([item for item in all_of if item != right])


def _colour(rng: random.Random, found: Ingredients):
    picture, placed, _ = one_icon(rng, found.photos, found.icons, side=84, share=ICON_SHARE)
    wrong = _other(rng, placed.colour, list(COLOURS))
    return picture, "What colour is the icon?", placed.colour, {"task": "colour", "value": placed.colour}, wrong


def _yes_no(rng: random.Random, found: Ingredients):
    picture, placed, _ = one_icon(rng, found.photos, found.icons, side=84, share=ICON_SHARE)
    asked = placed.colour if rng.random() < 0.5 else _other(rng, placed.colour, list(COLOURS))
    answer, wrong = ("yes", "no") if asked == placed.colour else ("no", "yes")
    return picture, f"Is the icon {asked}? Answer yes or no.", answer, {"task": "choice", "value": answer}, wrong


def _count(rng: random.Random, found: Ingredients):
    count = rng.randint(1, 4)
    picture, _ = several_icons(rng, found.photos, found.icons, width=112, height=112, count=count, same=True)
    wrong = _other(rng, str(count), ["1", "2", "3", "4"])
    return picture, "How many icons are there?", str(count), {"task": "count", "value": count}, wrong


def _choice(rng: random.Random, found: Ingredients):
    picture, placed, _ = one_icon(rng, found.photos, found.icons, side=84, share=ICON_SHARE)
    wrong_name = _other(rng, placed.name, [icon.name for icon in found.icons])
    first, second = (placed.name, wrong_name) if rng.random() < 0.5 else (wrong_name, placed.name)
    answer, wrong = ("A", "B") if first == placed.name else ("B", "A")
    question = f"What is the icon? A: {first} B: {second}"
    return picture, question, answer, {"task": "choice", "value": answer}, wrong


def _place(rng: random.Random, found: Ingredients):
    return (_box if rng.random() < 0.5 else _point)(rng, found)


def _box(rng: random.Random, found: Ingredients):
    picture, placed, box = _for_place(rng, found)
    answer = f'[{{"bbox_2d": {list(box)}, "label": "{placed}"}}]'
    return picture, f"Give the box of the {placed}.", answer, {"task": "box", "value": list(box)}, ""


def _point(rng: random.Random, found: Ingredients):
    picture, placed, box = _for_place(rng, found)
    point = [round((box[0] + box[2]) / 2, 1), round((box[1] + box[3]) / 2, 1)]
    answer = f'[{{"point_2d": {point}, "label": "{placed}"}}]'
    return picture, f"Point at the {placed}.", answer, {"task": "point", "value": point}, ""


def _video(rng: random.Random, found: Ingredients):
    """A clip, question, answer and key."""
    data, placed, _, (start, end) = moving_icon(
        rng, found.photos, found.icons, side=84, fps=8, num_frames=rng.choice((16, 24))
    )
    if rng.random() < 0.5:
        return data, "What colour is the moving icon?", placed.colour, {"task": "colour", "value": placed.colour}
    answer = f"from {start:.1f} to {end:.1f} seconds"
    return data, f"When does the {placed.label} move?", answer, {"task": "time", "value": [start, end]}


def _for_place(rng: random.Random, found: Ingredients):
    picture = crop_photo(rng, rng.choice(found.photos), 112, 112)
    at = (rng.random(), rng.random())
    placed = paste(picture, rng.choice(found.icons), rng.choice(list(COLOURS)), round(112 * rng.uniform(0.35, 0.6)), at)
    return picture, placed.label, placed.box
