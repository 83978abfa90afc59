"""The table of data systems in pipelines/prepare/README.md, written by `make generated`: each cell is a command.

A cell is only written for tests that are there (test_systems.py); `make test` and `make test-extended` run all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests import tables

README = "pipelines/prepare/README.md"
MARKS = ("<!-- data systems: make generated -->", "<!-- data systems: end -->")
HEAD = ("data system", "reader", "curation, making", "rendering", "in depth", "in the preview")


@dataclass(frozen=True)
class System:
    """Paths are below tests/prepare, or tests/ where they begin with a slash."""

    name: str
    rows: tuple[str, ...] = ()
    """Of test_whole_way.py: files of these readers go the whole way."""
    made: tuple[str, ...] = ()
    """Tests of test_made.py: what is made from other data goes it."""
    curation: tuple[str, ...] = ()
    """What filters, scores or makes it."""
    depth: tuple[str, ...] = ()


SYSTEMS = (
    System(
        "interleaved documents",
        rows=("interleaved", "mmc4"),
        curation=("curate/test_filters.py", "curate/test_scores.py", "curate/test_near.py"),
        depth=("test_text_formats.py",),
    ),
    System(
        "captions, knowledge, OCR",
        rows=("captions", "coco_captions", "llava", "webdataset"),
        curation=("curate/test_filters.py", "curate/test_near.py"),
        depth=("test_formats.py", "test_containers.py"),
    ),
    System("text", rows=("text",), curation=("curate/test_filters.py", "curate/test_near.py"),
           depth=("test_formats.py",)),
    System(
        "grounding: boxes",
        rows=("coco", "qwen_vl", "ms_swift"),
        made=("test_copy_paste_is_drawn_where_it_was_pasted",),
        curation=("grounding/test_paste.py", "grounding/test_made.py"),
        depth=("grounding/test_round_trip.py", "grounding/test_readers.py"),
    ),
    System("grounding: masks", rows=("coco",), curation=("grounding/test_masks.py",),
           depth=("grounding/test_readers.py",)),
    System("grounding: points", rows=("points", "parquet"), curation=("grounding/test_questions.py",),
           depth=("grounding/test_round_trip.py",)),
    System("grounding: referring expressions", rows=("refcoco",), curation=("grounding/test_questions.py",),
           depth=("grounding/test_readers.py",)),
    System(
        "grounding: counting, what is absent",
        made=("test_questions_are_counted_pointed_at_and_located",),
        curation=("grounding/test_questions.py",),
        depth=("grounding/test_made.py",),
    ),
    System("grounding: labels by existing models", curation=("grounding/test_labels.py",)),
    System("documents as QwenVL HTML", rows=("layout", "coco_layout", "hocr", "pdf"),
           curation=("curate/test_filters.py", "curate/test_near.py"),
           depth=("test_page_formats.py", "/data/test_page.py")),
    System("charts, formulas, molecules, scores", rows=("layout-drawings", "musicxml"), curation=("test_synthetic.py",),
           depth=("test_synthetic_corpus.py", "test_scores.py", "test_score_files.py")),
    System("handwriting (a font)", rows=("layout-handwriting",), curation=("test_synthetic.py",),
           depth=("test_synthetic_corpus.py",)),
    System("Chinese, Japanese, Arabic pages", rows=("layout-zh", "layout-ja", "layout-ar"),
           curation=("test_synthetic.py",), depth=("test_synthetic_corpus.py",)),
    System("video: dynamic frame rate, absolute time", rows=("llava", "activitynet"), curation=("test_whole.py",),
           depth=("/data/test_video_times.py", "/data/test_layout.py")),
    System("video: events in time, both formats", rows=("activitynet", "charades_sta"),
           depth=("test_video_formats.py",)),
    System("video: captions of long ones", made=("test_captions_of_long_videos_have_their_times",),
           curation=("captioning/test_made.py",), depth=("/data/test_video_times.py",)),
    System("agents: mobile", rows=("android_control", "aitw"), depth=("test_agent_formats.py",)),
    System("agents: web", rows=("mind2web", "mind2web-table", "web_dom"),
           depth=("test_agent_formats.py", "test_mind2web_table.py")),
    System("agents: desktop", rows=("agent", "accessibility"), depth=("test_agent_formats.py",)),
    System("agents: elements of screens", rows=("uiautomator", "accessibility", "web_dom"),
           depth=("test_agent_formats.py",)),
    System("agents: reasoning of steps", made=("test_reasoning_of_a_judge_or_of_people_stands_before_its_call",),
           curation=("reasoning/test_made.py", "reasoning/test_filters.py"), depth=("reasoning/test_steps.py",)),
    System("agents: reasoning that people write",
           made=("test_reasoning_of_a_judge_or_of_people_stands_before_its_call",),
           curation=("reasoning/test_annotate.py",), depth=("reasoning/test_page.py",)),
    System("SFT: conversations, classified and filtered", rows=("openai", "llava", "llama_factory", "ms_swift"),
           curation=("curate/test_instructions.py",), depth=("test_text_formats.py", "test_tools.py")),
    System("SFT: rejection sampling", made=("test_sampled_answers_are_kept_or_become_pairs",),
           curation=("test_sampling.py", "test_answer_checks.py"), depth=("/after/test_scores.py",)),
    System("preference", rows=("preference", "llama_factory-pairs", "ms_swift-pairs"),
           made=("test_sampled_answers_are_kept_or_become_pairs",), curation=("test_pairs.py",),
           depth=("grounding/test_readers.py",)),
    System("mixture", curation=("test_balance.py",), depth=("test_stage.py", "test_engines.py")),
)  # fmt: skip


def table() -> str:
    return tables.as_markdown([HEAD, *map(_cells, SYSTEMS)])


def _cells(system: System) -> tuple[str, ...]:
    made = [f"way/test_made.py -k {name.removeprefix('test_').partition('_')[0]}" for name in system.made]

    def read(step: str) -> list[str]:
        names = " or ".join(system.rows)
        return [f"way -k '{step} and {f'({names})' if len(system.rows) > 1 else names}'"] if names else []

    return (
        system.name,
        _works(read("reader")),
        _works([_below(path) for path in system.curation]),
        _works(read("rendering") + made),
        _works([_below(path) for path in system.depth]),
        _works(read("preview") + made),
    )


def _below(path: str) -> str:
    return f"..{path}" if path.startswith("/") else path


def _works(commands: list[str]) -> str:
    return f"works: {', '.join(f'`{command}`' for command in commands)}" if commands else "-"
