"""The recipe: one file that describes a whole training run.

Every field says by `role` what a change of it means once a stage has begun:
  result     changes what is learned: a finished or interrupted stage no longer matches
  execution  changes how it runs (machines, intervals, tracking): may change between attempts
  note       is for people
Reading, overriding and resolving live in trainer/resolve.py; this file is what a recipe can say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from trainer import captioning, curation, grounding, reasoning
from trainer.captioning import Captioning
from trainer.curation import Checks, Curate
from trainer.fields import Strict, execution, note, result
from trainer.grounding import Grounding
from trainer.reasoning import Reasoning

STAGES = ("stage1", "stage2", "stage3", "sft", "dpo")
GROUPS = ("vision", "merger", "llm")
SAMPLED = "sampled"  # the mixture name of what prepare-sft and prepare-dpo selected from this run's own answers

Kind = Literal["caption", "interleaved", "grounding", "document", "video", "agent", "text", "instruction", "preference"]
Rendering = Literal["document", "chat"]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9_]{0,38}[a-z0-9])?$")]


def _without_nulls(value: Any) -> Any:
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


# ---------------------------------------------------------------- model


class Init(Strict):
    """Where each module group's first weights come from: a URI, `random`, or `pretrain` (the step init trains it)."""

    llm: str = result()
    """Folder in Hugging Face layout of a language model, `random` or `pretrain`."""
    vision: str = result()
    """Folder with a vision tower, `random` or `pretrain`."""
    merger: str = result("random")
    """Folder with a merger, or `random`."""


class Pretrain(Strict):
    """The brief training of step init, for runs without released weights: a language model on text, a vision tower on
    image-text pairs, as the papers start from a trained language model and a CLIP-trained vision tower."""

    llm_steps: int = result(300, ge=0)
    llm_lr: float = result(2e-3, gt=0)
    llm_batch_tokens: int = result(2048, ge=16)
    """Tokens of one step."""
    vision_steps: int = result(300, ge=0)
    vision_lr: float = result(1e-3, gt=0)
    vision_batch: int = result(32, ge=2)
    """Image-text pairs of one step."""
    sources: dict[Literal["text", "pairs"], list[str]] = result(default_factory=dict)
    """Source names: `text` for the language model, `pairs` for the vision tower."""


class Model(Strict):
    base: str | None = result(None)
    """A whole vision-language model in Hugging Face layout; then `config` and `init` are not used."""
    config: str | dict[str, Any] | None = result(None)
    """The model's config.json: a URI, or its content. Shapes are read from it, never assumed."""
    tokenizer: str | None = result(None)
    """Folder with tokenizer.json, or `corpus` to train one on this run's text; default: the folder of `base`."""
    init: Init | None = result(None)
    pretrain: Pretrain | None = result(None)
    vocab_size: int | None = result(None, ge=300)
    """Size of a tokenizer trained on the corpus, special tokens included."""
    tokens_per_second: float | None = result(None, gt=0)
    """Temporal M-RoPE ids per second of video: 2 as released, 25 is the report's 40 ms; default: the config's."""

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.base is None) == (self.init is None):
            raise ValueError("give either base (a whole model) or config and init (assembled from parts)")
        if self.init is not None and self.config is None:
            raise ValueError("init needs config: the shapes of the model to assemble")
        if self.init is not None and "pretrain" in (self.init.llm, self.init.vision) and self.pretrain is None:
            raise ValueError("init says pretrain, but model.pretrain is missing")
        if self.base is None and self.tokenizer is None:
            raise ValueError("tokenizer: needed where there is no base: a folder, or corpus to train one")
        if self.tokenizer == "corpus" and self.vocab_size is None:
            raise ValueError("vocab_size: needed to train a tokenizer on the corpus")
        return self


# ---------------------------------------------------------------- data


class Source(Strict):
    format: str = result()
    """Reader in pipelines/prepare/formats."""
    path: str = result()
    """Annotation file, folder or glob; corpus://NAME is the built-in corpus."""
    media: str | None = result(None)
    """Folder that relative media paths start from; default: beside `path`."""
    confined: bool = result(False)
    """Rows that name media outside of that folder (absolute paths, ../, URLs) are bad rows: for data of strangers."""
    held_out: str | None = result(None)
    """Like `path`: what is never trained on, read by evaluation."""
    kind: Kind = result()
    rendering: Rendering = result()
    """document: no chat template, loss on every text token; chat: loss on assistant content and its end token."""
    licence: str = note("not stated")
    curate: Curate | None = result(None)
    """Cleaning, scoring, deduplication and decontamination of the training part (trainer/curation.py)."""
    grounding: Grounding | None = result(None)
    """With the format grounding: what is made from the samples of another source (trainer/grounding.py)."""
    reasoning: Reasoning | None = result(None, later=True)
    """With the format reasoning: what a judge writes for the steps of another source (trainer/reasoning.py)."""
    captioning: Captioning | None = result(None, later=True)
    """With the format video_captions: what a model writes about long videos of another (trainer/captioning.py)."""


class Prepare(Strict):
    engine: Literal["native", "ray"] = execution("native")
    sources: Annotated[
        dict[Slug, Source], BeforeValidator(_without_nulls, json_schema_input_type=dict[Slug, Source | None])
    ] = result()
    """By name; null takes out one that the recipe below `extends` has."""
    max_bad_fraction: float = result(0.0, ge=0, lt=1)
    """Rows that cannot be read, as a share of a source; more than this fails the step."""
    verify_media: Literal["decode", "header"] = result("decode")
    """How an image is checked when it is ingested: every pixel decoded once, or header and structure (truncation is
    found either way; pipelines/prepare/README.md says what is not)."""
    shard_bytes: int = result(256 * 1024**2, ge=4096)
    variants: int = result(4, ge=1, le=64)
    """Renderings of one sample (frame rate, prompt wording, coordinate and time format)."""
    lanes: int = result(1, ge=1)
    """Streams that plans are made for: at least the number of rank groups of the largest stage."""
    window_shards: int = result(8, ge=1)
    """Shards per source that one lane packs from at a time."""


class Pixels(Strict):
    """Budgets in pixels after resizing; frame rates in frames per second of the original video."""

    image_min: int = result(4 * 28 * 28, ge=1)
    image_max: int = result(1280 * 28 * 28, ge=1)
    video_min: int = result(128 * 28 * 28, ge=1)
    """Of one frame."""
    video_max: int = result(768 * 28 * 28, ge=1)
    """Of one frame."""
    video_total: int = result(24576 * 28 * 28, ge=1)
    """Of all frames together, where the two frames that one temporal patch covers count once."""
    fps: list[float] = result(default_factory=lambda: [2.0], min_length=1)
    """The variant of a sample picks one: dynamic frame rate."""
    min_frames: int = result(4, ge=2)
    max_frames: int = result(768, ge=2)

    @model_validator(mode="after")
    def _ordered(self) -> Pixels:
        for low, high in (
            ("image_min", "image_max"),
            ("video_min", "video_max"),
            ("video_max", "video_total"),
            ("min_frames", "max_frames"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}")
        if any(fps <= 0 for fps in self.fps):
            raise ValueError(f"fps must be above 0, got {self.fps}")
        return self


class Packing(Strict):
    length: int = result(ge=16, le=2**24)
    """LLM tokens of one pack."""
    patch_budget: int = result(ge=4, le=2**26)
    """Vision patches (before merging) of one pack."""
    over_long: Literal["shrink", "drop"] = result("shrink")
    """What happens to a sample that does not fit: fewer pixels, frames, messages, counted; or dropped, counted."""


class Sampling(Strict):
    """Answers of the newest model of this run (or of an endpoint) to tasks with a known answer: rejection sampling
    for sft keeps correct ones, dpo pairs a correct with an incorrect one."""

    tasks: list[str] = result(min_length=1)
    """Source names whose samples carry an answer key."""
    requests: int = result(ge=1)
    answers: int = result(4, ge=1)
    temperature: float = result(1.0, gt=0)
    top_p: float = result(1.0, gt=0, le=1)
    max_new_tokens: int = result(64, ge=1)
    keep: int = result(1, ge=1)
    """Correct answers (sft) or pairs (dpo) kept per request."""
    endpoint: str | None = result(None)
    """OpenAI-compatible URL; default: this run's newest model."""
    endpoint_model: str | None = result(None)
    checks: Checks | None = result(None, later=True)
    """What an answer must be besides correct, and in a pair the chosen one (trainer/curation.py)."""


# ---------------------------------------------------------------- stage


class Train(Strict):
    """The freeze configuration: which module groups are trained."""

    vision: bool = result()
    merger: bool = result()
    llm: bool = result()

    @model_validator(mode="after")
    def _something(self) -> Train:
        if not (self.vision or self.merger or self.llm):
            raise ValueError("the stage trains nothing: set at least one of vision, merger, llm to true")
        return self


class Optim(Strict):
    lr: float = result(gt=0)
    lr_of: dict[Literal["vision", "merger", "llm"], Annotated[float, Field(gt=0)]] = result(default_factory=dict)
    """Learning rates of single module groups; the others have `lr`."""
    betas: tuple[float, float] = result((0.9, 0.95))
    eps: float = result(1e-8, gt=0)
    weight_decay: float = result(0.1, ge=0)
    """Not applied to norms and biases."""
    clip: float = result(1.0, gt=0)
    """Global gradient norm."""


class Schedule(Strict):
    steps: int | None = result(None, ge=1)
    tokens: int | None = result(None, ge=1)
    """LLM tokens; with neither steps nor tokens the stage is one pass over the mixture."""
    packs_per_step: int = result(ge=1)
    """The global batch, whatever the number of GPUs."""
    warmup: float = result(0.03, ge=0, lt=1)
    """Share of the steps."""
    kind: Literal["cosine", "constant"] = result("cosine")
    min_lr_ratio: float = result(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> Schedule:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give steps or tokens, not both")
        return self


class Compute(Strict):
    node_pool: str = execution("gpu")
    """Name of a node pool in the cluster file."""
    nodes: int = execution(1, ge=1)
    gpus_per_node: int = execution(8, ge=1)
    """Ranks per node; CPU processes where the cluster is `local`."""
    sequence_parallel: Literal[1, 2, 4] = execution(1)
    """Ranks that share one pack."""
    threads: int = execution(1, ge=1, le=1024)
    """OMP and torch threads of a rank."""
    precision: Literal["bf16", "fp32"] = result("bf16")
    activation_checkpointing: bool = execution(True)


class Zero(Strict):
    """DeepSpeed ZeRO-3, sizes in elements."""

    param_persistence_threshold: int = execution(100_000, ge=0)
    sub_group_size: int = execution(1_000_000_000, ge=1)
    reduce_bucket_size: int = execution(500_000_000, ge=1)
    prefetch_bucket_size: int = execution(50_000_000, ge=1)
    max_live_parameters: int = execution(1_000_000_000, ge=0)


class Checkpointing(Strict):
    every_steps: int = execution(500, ge=1)
    keep: int = execution(2, ge=1)


class Dpo(Strict):
    beta: float = result(0.1, gt=0)
    label_smoothing: float = result(0.0, ge=0, lt=0.5)
    sft_weight: float = result(0.0, ge=0)
    """Weight of the chosen answers' mean token loss, added to the preference loss."""


class Balance(Strict):
    """Report, section 2.3.1: the SFT entries are half text, half multimodal. Checked on the plan, in uses of samples:
    weights in `data` are what changes it, nothing is dropped or repeated for it."""

    text: float = execution(ge=0, le=1)
    """Share of the samples that have no image and no video."""
    tolerance: float = execution(0.05, ge=0, le=1)


Weight = Annotated[float, Field(gt=0, le=1000)]
"""A plan holds every use of a pass at once: the bound is ours."""


class Stage(Strict):
    train: Train = result()
    packing: Packing = result()
    data: Annotated[
        dict[str, Weight],
        BeforeValidator(_without_nulls, json_schema_input_type=dict[str, Weight | None]),
    ] = result(min_length=1)
    """Source name -> how often one pass uses each of its samples (0.5: half of them, 2: twice, other variants); null
    takes out one that the recipe below `extends` has."""
    balance: Balance | None = execution(None, later=True)
    """Text against multimodal samples, asserted; without it they are counted only."""
    pixels: Pixels = result(default_factory=Pixels)
    optim: Optim = result()
    schedule: Schedule = result()
    compute: Compute = execution(default_factory=Compute)
    zero: Zero = execution(default_factory=Zero)
    checkpoint: Checkpointing = execution(default_factory=Checkpointing)
    sampling: Sampling | None = result(None)
    dpo: Dpo | None = result(None)
    skip_samples: list[Annotated[str, Field(pattern=r"^[^/]+/.+$")]] = result(default_factory=list)
    """SOURCE/ID of samples that are left out: they keep their place in the packs as tokens without target."""
    held_out_packs: int = execution(8, ge=0)
    """Packs of held-out data whose loss is measured before and after the stage."""
    log_every_steps: int = execution(1, ge=1)

    @model_validator(mode="after")
    def _patches_fit(self) -> Stage:
        for group in self.optim.lr_of:
            if not getattr(self.train, group):
                raise ValueError(f"optim.lr_of.{group} is set, but train.{group} is false")
        return self


class Stages(Strict):
    stage1: Stage | None = result(None)
    stage2: Stage | None = result(None)
    stage3: Stage | None = result(None)
    sft: Stage | None = result(None)
    dpo: Stage | None = result(None)

    def named(self) -> dict[str, Stage]:
        """The stages that this recipe has, in order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}


class Export(Strict):
    dtype: Literal["bf16", "fp32"] = result("bf16")
    file_bytes: int = execution(5 * 1000**3, ge=1024)
    """Largest safetensors file."""


class Evaluate(Strict):
    sources: list[str] = result(default_factory=list)
    """Sources with held-out data; empty: all that have some."""
    samples: int = result(64, ge=1)
    """Per source, at most."""
    max_new_tokens: int = result(64, ge=1)


class Tracking(Strict):
    uri: str | None = execution(None)
    """MLflow server; default: SQLite in the output (local), the chart's server (cluster)."""
    experiment: str | None = execution(None)
    """Default: the recipe's name."""


class Recipe(Strict):
    format: Literal[1] = note(1)
    name: Slug = note()
    description: str = note("")
    family: str = result()
    """A model family: a name in trainer/models/family.py."""
    seed: int = result(1234, ge=0, lt=2**63)
    model: Model = result()
    prepare: Prepare = result()
    stages: Stages = result()
    export: Export = result(default_factory=Export)
    evaluate: Evaluate = result(default_factory=Evaluate)
    tracking: Tracking = execution(default_factory=Tracking)

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        problems = []
        stages = self.stages.named()
        if not stages:
            problems.append("stages: the recipe has no stage")
        sources = self.prepare.sources
        for name, stage in stages.items():
            at = f"stages.{name}"
            for source in stage.data:
                if source == SAMPLED:
                    if stage.sampling is None:
                        problems.append(f"{at}.data.{SAMPLED}: the stage has no sampling")
                elif source not in sources:
                    problems.append(f"{at}.data.{source}: no such source; prepare.sources has {sorted(sources)}")
                elif (sources[source].kind == "preference") != (name == "dpo"):
                    problems.append(f"{at}.data.{source}: preference pairs go into dpo, and dpo takes nothing else")
                if name == "dpo" and stage.data[source] > 1:
                    problems.append(f"{at}.data.{source}: {stage.data[source]:g}, but a pair is used once: 1 or less")
            for sample in stage.skip_samples:
                if sample.partition("/")[0] not in stage.data:
                    problems.append(f"{at}.skip_samples: {sample!r} is of no source of {at}.data")
            for task in stage.sampling.tasks if stage.sampling else []:
                if task not in sources:
                    problems.append(f"{at}.sampling.tasks: no such source {task!r}")
            if stage.sampling is not None and name not in ("sft", "dpo"):
                problems.append(f"{at}.sampling: only sft and dpo sample answers")
            if (stage.dpo is not None) != (name == "dpo"):
                problems.append(f"{at}.dpo: the stage dpo states it and no other")
            groups = stage.compute.nodes * stage.compute.gpus_per_node // stage.compute.sequence_parallel
            if stage.schedule.packs_per_step % self.prepare.lanes:
                problems.append(
                    f"{at}.schedule.packs_per_step: {stage.schedule.packs_per_step} is not a multiple of "
                    f"prepare.lanes {self.prepare.lanes}; a step takes the same number of packs from every lane"
                )
            if groups < 1:
                problems.append(f"{at}.compute.sequence_parallel: more than the stage's ranks")
            if self.prepare.lanes < groups:
                problems.append(f"prepare.lanes: {self.prepare.lanes} lanes leave some of {at}'s {groups} groups idle")
        for name in self.evaluate.sources:
            if name not in sources:
                problems.append(f"evaluate.sources: no such source {name!r}")
        problems += self._pretrain_problems()
        problems += curation.problems_of(
            {name: source.curate for name, source in sources.items()},
            {name: source.held_out is not None for name, source in sources.items()},
            [name for name, source in sources.items() if grounding.is_made(source)],
        )
        problems += grounding.problems_of(sources) + reasoning.problems_of(sources)
        problems += captioning.problems_of(sources)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _pretrain_problems(self) -> list[str]:
        if self.model.init is None or self.model.pretrain is None:
            return []
        named: dict[Any, list[str]] = dict(self.model.pretrain.sources)
        problems: list[str] = []
        for use, part in (("text", "llm"), ("pairs", "vision")):
            if getattr(self.model.init, part) == "pretrain" and not named.get(use):
                problems.append(f"model.pretrain.sources.{use}: needed, since model.init.{part} is pretrain")
            for name in named.get(use, []):
                if name not in self.prepare.sources:
                    problems.append(f"model.pretrain.sources.{use}: no such source {name!r}")
        return problems
