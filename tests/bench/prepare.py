"""A whole preparation (sources to shards, curation, tokenizer, counts, plan) of pictures with texts, at two sizes: what
a sample costs, whether memory grows with their number, and the same on a local Ray, to the same bytes.

Samples differ in text and id; the pictures, crops of the corpus' photographs, are used again and again, and every shard
holds their bytes. The larger size has more bytes in its shards than LIMIT_MB, and a run that holds more memory than
that (PSS of all its processes) is an error. cpu_hours_per_1m is extrapolated: measured at the larger size, in
proportion.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pipelines.prepare.corpus.sources import texts
from tests.bench._processes import Taken, taken_by
from tests.bench.ingest import photographs
from trainer.data.shards import Source

SAMPLES, QUICK_SAMPLES = (20_000, 200_000), (4_000, 12_000)
LIMIT_MB = 1024
PICTURES = 500
WORDS = 25
SHARD_BYTES = 64 * 2**20
PROGRAM = """
import json, sys
from pipelines.prepare.ingest import prepare_data
from pipelines.prepare.stage import prepare_stage
from trainer.resolve import load_recipe
recipe = load_recipe("tiny", json.loads(sys.argv[1]))
if recipe.prepare.engine == "ray":
    import ray
    for turn in range(4):  # a node has 30 s to start, which is little on a busy machine
        try:
            ray.init(include_dashboard=False)
            break
        except Exception:
            ray.shutdown()
            if turn == 3:
                raise
prepare_data(recipe, sys.argv[2])
prepare_stage(recipe, "stage1", sys.argv[2])
"""


def figures(quick: bool) -> dict[str, float]:
    small, large = QUICK_SAMPLES if quick else SAMPLES
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        _pictures(folder)
        one, _, bytes_of = _taken(folder, small, "native")
        on_ray, _, same = _taken(folder, small, "ray")
        if bytes_of != same:
            differ = sorted(name for name in bytes_of.keys() | same if bytes_of.get(name) != same.get(name))
            raise RuntimeError(f"expected the same bytes on both engines, other ones in {', '.join(differ[:5])}")
        whole, mb, _ = _taken(folder, large, "native")
    finally:
        shutil.rmtree(folder)
    if not quick and not whole.most_mb < LIMIT_MB < mb:
        raise RuntimeError(f"expected memory below {LIMIT_MB} MB below shards, got {whole.most_mb:.0f} and {mb:.0f} MB")
    print(f"cpu_hours_per_1m is extrapolated in proportion from {large:,} samples")
    return {
        "samples": float(large),
        "shards_mb": mb,
        "limit_mb": float(LIMIT_MB),
        "samples_per_s": large / whole.wall_s,
        "samples_per_s_per_core": large / whole.cpu_s,
        "cpu_hours_per_1m": whole.cpu_s / 3600 * 1e6 / large,
        f"pss_{small // 1000}k_mb": one.most_mb,
        f"pss_{large // 1000}k_mb": whole.most_mb,
        "pss_growth": whole.most_mb / one.most_mb - 1,
        "ray_samples_per_s": small / on_ray.wall_s,
        "ray_over_native": one.wall_s / on_ray.wall_s,
        "same_files": float(len(same)),
    }


# ---------------------------------------------------------------- data


def _pictures(folder: Path) -> None:
    """Crops of photographs, 224 to 448 pixels wide, JPEG."""
    draw = random.Random(0)
    for number in range(PICTURES):
        photo = draw.choice(photographs())
        width = draw.randrange(224, 449)
        height = width * 3 // 4
        across = int(min(photo.width, photo.height * 4 / 3) * draw.uniform(0.3, 1))
        down = across * 3 // 4
        left, top = draw.randint(0, photo.width - across), draw.randint(0, photo.height - down)
        crop = photo.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
        crop.save(folder / f"{number}.jpg", quality=85)


def _rows(folder: Path, count: int) -> Path:
    """Questions and answers of words of this installation's documents, a picture each."""
    draw = random.Random(count)
    words = [word for text in texts(0)[:40] for word in text.text.split()]
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            said = " ".join(draw.choices(words, k=draw.randint(10, 2 * WORDS)))
            turns = [{"from": "human", "value": "<image>\nWhat is said?"}, {"from": "gpt", "value": said}]
            row = {"id": f"r{number}", "image": f"{number * 7 % PICTURES}.jpg", "conversations": turns}
            file.write(json.dumps(row) + "\n")
    return path


# ---------------------------------------------------------------- one preparation


def _taken(folder: Path, count: int, engine: str) -> tuple[Taken, float, dict[str, str]]:
    """(what the preparation took, MB of its shards, sha256 of every file of shards, columns, tokenizer and plan)."""
    out = folder / f"{engine}-{count}"
    overrides = _overrides(_rows(folder, count), engine)
    taken = taken_by([sys.executable, "-c", PROGRAM, json.dumps(overrides), str(out)])
    source = Source.open(str(out / "data" / "sources" / "mine" / "train"))
    if source.num_samples != count:
        raise RuntimeError(f"expected {count} samples in the shards, got {source.num_samples}")
    size = sum(shard["size_bytes"] for shard in source.manifest["shards"])
    found = {str(path.relative_to(out)): _sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}
    shutil.rmtree(out)
    print(
        f"{count:,} samples, {engine}: {taken.wall_s:.0f} s, {taken.cpu_s:.0f} s of processors, "
        f"{taken.most_mb:.0f} MB held, {size / 1e6:.0f} MB of shards",
        flush=True,
    )
    return taken, size / 1e6, found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _overrides(rows: Path, engine: str) -> list[str]:
    clean = "{clean: {min_words: 5, min_image_side: 100, max_top_ngram: {2: 0.9}}, dedup: {exact: true}}"
    mine = f"format: llava, path: {rows}, kind: instruction, rendering: chat, curate: {clean}"
    return [
        "prepare.verify_media=header",
        f"prepare.engine={engine}",
        f"prepare.shard_bytes={SHARD_BYTES}",
        f"prepare.sources={{mine: {{{mine}}}}}",
        "model.pretrain.sources={text: [mine], pairs: [mine]}",
        "stages.stage1.data={mine: 1}",
        "stages.stage1.packing={length: 4096, patch_budget: 8192}",
        "stages.stage1.schedule={packs_per_step: 8, steps: null}",  # one pass
        *(f"stages.{stage}=null" for stage in ("stage2", "stage3", "sft", "dpo")),
    ]
