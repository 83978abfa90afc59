from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.prepare.ingest import prepare_data
from tests.prepare.builders import a_clip, a_picture, small_recipe


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An output with the small corpus, every source and the tokenizer. Tests add to it, none changes it."""
    out = str(tmp_path_factory.mktemp("prepared"))
    prepare_data(small_recipe(), out)
    return out


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a good picture, a good clip, and damaged ones."""
    good = a_picture()
    clip = a_clip()
    noise = a_picture(200, 200, kind="JPEG")
    (tmp_path / "red.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "cut.jpg").write_bytes(noise[: len(noise) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"not a picture")
    (tmp_path / "clip.mp4").write_bytes(clip)
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    return tmp_path
