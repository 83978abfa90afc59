"""Video captions with absolute times (LLaVA JSON with <video>): moving icons over photographs, and parts of four real
clips. The clips with icons are made here (four clips are too few to learn from or to measure on)."""

from __future__ import annotations

from collections.abc import Iterator

import av
from PIL import Image

from pipelines.prepare.corpus.draw import article, encode_video, moving_icon
from pipelines.prepare.corpus.folder import Folder, Ingredients
from pipelines.prepare.corpus.sources import Clip, Split

FPS = 8


def write_videos(folder: Folder, split: Split, found: Ingredients) -> None:
    rng = folder.rng("videos", split)
    rows = []
    for number in range(folder.count(600 if split == "train" else 80, 8)):
        num_frames = rng.choice((16, 24, 32))
        data, placed, direction, (start, end) = moving_icon(
            rng, found.photos, found.icons, side=84, fps=FPS, num_frames=num_frames
        )
        text = f"{article(placed.label)} moves {direction} between {start:.1f} and {end:.1f} seconds."
        rows.append(_row(f"moving-{split}-{number:05d}", folder.media(f"videos/{split}-{number:05d}.mp4", data), text))
    for clip in found.clips:
        for number, (start, end, seen) in enumerate(clip.events):
            frames = list(_frames(clip, start, end))
            name = f"videos/{clip.local.stem}-{number}.mp4"
            text = f"{seen} between 0.0 and {len(frames) / FPS:.1f} seconds."
            rows.append(_row(f"{clip.local.stem}-{number}", folder.media(name, encode_video(frames, FPS)), text))
    folder.json("videos", split, rows)


def _row(identity: str, video: str, text: str) -> dict:
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": text}]
    return {"id": identity, "video": video, "conversations": turns}


def _frames(clip: Clip, start: float, end: float) -> Iterator[Image.Image]:
    """The clip's frames from start to end at FPS frames a second, at most 168 pixels wide, sides even."""
    wanted = start
    with av.open(str(clip.local)) as container:
        for frame in container.decode(video=0):
            if frame.time is None or frame.time + 1e-6 < wanted:
                continue
            if frame.time >= end:
                return
            width = min(168, frame.width)
            height = round(frame.height * width / frame.width / 2) * 2
            yield frame.to_image(width=width, height=height)
            wanted += 1 / FPS
