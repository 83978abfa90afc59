"""Sample pictures of the report: the true box or point, and the model's, drawn over the picture.

An object with a mask is drawn as its box too: Qwen2.5-VL has no text form of masks, so what is asked of the model, what
it answers and what is scored is the box (trainer/data/sample.py, Key; trainer/data/render.py).
"""

from __future__ import annotations

import io

from PIL import Image, ImageDraw

from trainer.after.scores import Box, original_boxes, parse_points
from trainer.after.tasks import Task
from trainer.data import media as images

TRUE, PREDICTED = (20, 140, 70), (205, 40, 60)
LONGEST_PX = 336


def draw(task: Task, text: str, media: int = 0) -> bytes | None:
    """PNG; None for a task that is not about a place in an image."""
    if task.key.task not in ("box", "point") or task.frame is None or task.item.sample.media[media].kind != "image":
        return None
    picture = images.upright(task.item.media[media], where=task.item.name)
    scale = LONGEST_PX / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(picture)
    for box in _true(task):
        _mark(canvas, box, scale, TRUE)
    for box in _predicted(task, text):
        _mark(canvas, box, scale, PREDICTED)
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _true(task: Task) -> list[Box]:
    value = [float(number) for number in task.key.value]
    return [(value[0], value[1], value[-2], value[-1])]


def _predicted(task: Task, text: str) -> list[Box]:
    assert task.frame is not None
    if task.key.task == "box":
        return original_boxes(text, task.frame)[:4]
    points = [task.frame.to_original(x, y) for x, y in parse_points(text)[:4]]
    return [(x, y, x, y) for x, y in points if max(abs(x), abs(y)) < 1e6]  # farther out nothing is drawn


def _mark(canvas: ImageDraw.ImageDraw, box: Box, scale: float, colour: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = (round(value * scale) for value in box)
    if (x1, y1) == (x2, y2):
        canvas.ellipse((x1 - 7, y1 - 7, x1 + 7, y1 + 7), outline="white", width=5)
        canvas.ellipse((x1 - 6, y1 - 6, x1 + 6, y1 + 6), outline=colour, width=3)
        return
    canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=5)
    canvas.rectangle((x1, y1, x2, y2), outline=colour, width=3)
