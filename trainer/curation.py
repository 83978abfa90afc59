"""What a recipe can say about curation: `prepare.sources.NAME.curate`. Every filter is one field, named as its funnel
counts it, and its value is the threshold; a filter that is not stated is not applied.

    curate:
      clean: {languages: [en, zh], min_words: 50, max_symbol_ratio: 0.1, min_image_side: 100}
      score: {scorer: statistics, min: {text_quality: 0.3}}
      instructions: {classify: rules, limits: {max_repetition: 0.3}, of_domain: {Coding: {max_repetition: 0.6}}}
      decontaminate: {against: [instructions], text: 0.8, image: 56}
      dedup: {exact: true, text: 0.8, image: 56}

Filters are applied in this order; a sample is counted under the first that drops it. What they compare with is computed
once and stored, so another threshold computes nothing again. `C` is the share 0..1 of a document's characters, `W` of
its words, `L` of its lines. Sources of the published values: Gopher (Rae et al. 2021, appendix A1), C4 (Raffel et al.
2020, section 2.2), OBELICS (Laurencon et al. 2023, appendix A).
"""

from __future__ import annotations

import difflib
import graphlib
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer import domains
from trainer.fields import Strict, execution, result

Share = Annotated[float, Field(ge=0, le=1)]
Criterion = Literal["text_quality", "image_text_relevance", "image_text_complementarity", "information_balance"]


LANGUAGES = frozenset(
    (
        "ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs", "ca",
        "crh", "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo", "fr", "fuv",
        "fy", "ga", "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he", "hi", "hr", "ht",
        "hu", "hy", "id", "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn", "ko", "ku", "ky", "la",
        "lb", "lg", "lij", "ln", "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr", "ms", "mt", "my", "ne", "nl",
        "nn", "no", "nso", "oc", "om", "or", "pa", "pcm", "pl", "ps", "pt", "qu", "ro", "ru", "rw", "sa", "sdh", "se",
        "si", "sk", "sl", "sn", "so", "sq", "sr", "st", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt",
        "ug", "uk", "ur", "uz", "uzs", "vec", "vi", "vo", "wa", "wuu", "xh", "yo", "yue", "zh", "zu", "zxx",
    )
)  # fmt: skip
"""What py3langid tells apart (a test compares): ISO 639-1, or 639-3 where a language has no code of two letters."""


class Clean(Strict):
    """Standard cleaning. Texts of a document are its text parts and what stands inside its objects."""

    languages: list[str] | None = result(None, min_length=1)
    """ISO 639-1 codes of py3langid; the most probable language must be one of them."""
    min_language_probability: Share | None = result(None)
    """Of the most probable language."""
    min_characters: int | None = result(None, ge=0)
    max_characters: int | None = result(None, ge=1)
    min_words: int | None = result(None, ge=0)
    """Gopher: 50. Where words are not separated (Chinese, Japanese) a character is a word."""
    max_words: int | None = result(None, ge=1)
    """Gopher: 100,000."""
    min_mean_word_length: float | None = result(None, ge=0)
    """Gopher: 3 characters."""
    max_mean_word_length: float | None = result(None, gt=0)
    """Gopher: 10 characters."""
    max_symbol_ratio: float | None = result(None, ge=0)
    """Hash signs and ellipses per word; Gopher: 0.1."""
    max_bullet_lines: Share | None = result(None)
    """L that start with a bullet; Gopher: 0.9."""
    max_ellipsis_lines: Share | None = result(None)
    """L that end with an ellipsis; Gopher: 0.3."""
    min_alphabetic_words: Share | None = result(None)
    """W with a letter; Gopher: 0.8."""
    min_stop_words: int | None = result(None, ge=0)
    """Different ones of the, be, to, of, and, that, have, with; Gopher: 2 (English only)."""
    min_sentences: int | None = result(None, ge=0)
    """Ends of sentences; C4: 3."""
    min_terminal_lines: Share | None = result(None)
    """L that end with a mark of punctuation. C4 takes out the other lines; a share is ours."""
    max_boilerplate_lines: Share | None = result(None)
    """L with a phrase of lists/boilerplate.txt (C4: javascript, cookie and policy notices)."""
    max_placeholder_text: int | None = result(None, ge=0)
    """Occurrences of lorem ipsum; C4: 0."""
    max_braces: int | None = result(None, ge=0)
    """Curly brackets, as code has them; C4: 0."""
    max_duplicate_lines: Share | None = result(None)
    """L said before; Gopher: 0.3."""
    max_duplicate_line_characters: Share | None = result(None)
    """C in lines said before; Gopher: 0.2."""
    max_duplicate_paragraphs: Share | None = result(None)
    """Share of the paragraphs; Gopher: 0.3."""
    max_duplicate_paragraph_characters: Share | None = result(None)
    """C in paragraphs said before; Gopher: 0.2."""
    max_top_ngram: dict[Annotated[int, Field(ge=2, le=4)], Share] | None = result(None)
    """C in the most frequent n-gram of words; Gopher: {2: 0.2, 3: 0.18, 4: 0.16}."""
    max_duplicate_ngram: dict[Annotated[int, Field(ge=5, le=10)], Share] | None = result(None)
    """C in n-grams of words said before; Gopher: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}."""
    max_blocked_words: int | None = result(None, ge=0)
    """Words and phrases of the list `blocked_words`, as whole words, letter case aside."""
    max_blocked_urls: int | None = result(None, ge=0)
    """Addresses in the text, in meta and of media whose host or its parent domain is on the list `blocked_urls`."""
    min_images: int | None = result(None, ge=0)
    max_images: int | None = result(None, ge=0)
    """OBELICS: 30 a document."""
    min_image_side: int | None = result(None, ge=1)
    """Pixels of the shortest side of any image; OBELICS: 150."""
    max_image_side: int | None = result(None, ge=1)
    """Pixels of the longest side of any image; OBELICS: 20,000."""
    max_image_aspect: float | None = result(None, ge=1)
    """Longer by shorter side of any image; OBELICS: 2."""
    max_repeated_images: Share | None = result(None)
    """Share of a document's images that it has shown before."""
    max_documents_of_image: int | None = result(None, ge=1)
    """Samples of this source that show one of the images: logos, buttons; OBELICS: 10."""
    blocked_words: str | None = result(None)
    """A file: one word or phrase a line, # begins a comment. Default: the short list shipped."""
    blocked_urls: str | None = result(None)
    """A file: one domain a line. Default: the short list shipped."""

    @model_validator(mode="after")
    def _possible(self) -> Clean:
        for high in (name for name in type(self).model_fields if name.startswith("max_")):
            low = high.replace("max_", "min_", 1)
            least, most = getattr(self, low, None), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}: nothing would be kept")
        if unknown := sorted(set(self.languages or ()) - LANGUAGES):
            raise ValueError(f"languages: {unknown} are no codes of py3langid (ISO 639-1: en, zh); it knows "
                             f"{', '.join(sorted(LANGUAGES))}")  # fmt: skip
        return self


class Judge(Strict):
    """A model behind an OpenAI-compatible endpoint. Its answers are recorded by request, seed and model, and asked for
    once; QWENVL_ENDPOINT_KEY holds the key."""

    url: str = execution()
    """Up to and with /v1."""
    model: str = result()
    revision: str = result("")
    """What tells two states of a model of one name apart: a part of what answers are recorded under."""
    answers: int = result(1, ge=1, le=16)
    """Requests a sample, each with its own seed; the score is the median."""
    temperature: float = result(0.0, ge=0)
    max_tokens: int = result(256, ge=16)
    image_max_pixels: int = result(512 * 512, ge=28 * 28)
    """Larger images are made smaller before they are sent."""
    max_images: int = result(8, ge=0)
    max_characters: int = result(12_000, ge=100)
    """Of the document's text; the rest is cut, and the judge is told."""
    concurrency: int = execution(8, ge=1, le=1024)
    timeout_s: float = execution(120.0, gt=0)
    max_failed: Share = execution(0.01)
    """Samples without a valid answer, as a share; more of them fail the step. They are kept, and counted."""


class Score(Strict):
    """The four criteria of the Qwen2.5-VL report, each 0..1."""

    scorer: Literal["statistics", "judge"] = result()
    """statistics: a baseline that needs no model; judge: a model behind an endpoint."""
    min: dict[Criterion, Share] = result(default_factory=dict)
    """Thresholds. Samples that a criterion does not apply to (no image) are kept by it."""
    judge: Judge | None = result(None)

    @model_validator(mode="after")
    def _judge_stated(self) -> Score:
        if (self.judge is not None) != (self.scorer == "judge"):
            raise ValueError("scorer: judge needs the section judge, and no other scorer has it")
        return self


Quality = Literal["complexity", "relevance", "correctness", "completeness", "clarity", "use_of_visual_information"]


class Limits(Strict):
    """Thresholds on conversations. What is counted is counted in the answers of a sample."""

    max_repetition: Share | None = result(None)
    """C of the worst answer that say again what it said: n-grams of five words, or a run of the same words."""
    max_incomplete: int | None = result(None, ge=0)
    """Answers that break off: in a sentence, in a block of code, after a comma or a conjunction."""
    max_malformed: int | None = result(None, ge=0)
    """Faults of form: marks of chat templates, broken JSON, tables of unequal rows, LaTeX or tags without their end,
    wrongly decoded characters."""
    max_harmful_words: int | None = result(None, ge=0)
    """Phrases of the list `harmful_words`."""
    min: dict[Quality, Share] = result(default_factory=dict)
    """Thresholds on the judge's scores. Samples that a criterion does not apply to (no image) are kept by it."""
    max: dict[Quality, Share] = result(default_factory=dict)


class Instructions(Strict):
    """Conversations for supervised fine-tuning, after the two stages of the Qwen2.5-VL report: a domain and sub-domain
    of each sample (trainer/domains.yaml), then rules and a judge's scores with thresholds of each domain."""

    classify: Literal["rules", "judge"] = result("rules")
    """rules: words of trainer/domains.yaml, a baseline that needs no model."""
    judge: Judge | None = result(None)
    """Scores the six qualities, and tells domains where classify says so."""
    limits: Limits = result(default_factory=Limits)
    of_domain: dict[str, Limits] = result(default_factory=dict)
    """By domain or sub-domain, what takes the place of `limits` there, field by field; a sub-domain's comes last."""
    harmful_words: str | None = result(None)
    """A file: one word or phrase a line, # begins a comment. Default: the short list shipped."""

    @model_validator(mode="after")
    def _possible(self) -> Instructions:
        asked = any(one.min or one.max for one in (self.limits, *self.of_domain.values()))
        if self.judge is None and (asked or self.classify == "judge"):
            raise ValueError("judge: needed for classify: judge and for thresholds in min and max")
        known = domains.names()
        for name in self.of_domain:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise ValueError(f"of_domain.{name}: no such domain or sub-domain; {hint}")
        return self


class Checks(Strict):
    """Filters of answers with reasoning that a model sampled (report: code-switching, excessive length, repetition;
    steps that neglect the picture). What is not stated is not checked."""

    max_words: int | None = result(None, ge=1)
    """Where words are not separated a character is a word."""
    max_repetition: Share | None = result(None)
    """Share of the answer's characters that say again what it said."""
    max_code_switching: Share | None = result(None)
    """Share of the answer's letters in scripts that neither the question nor the known answer uses."""
    min_steps_with_image: Share | None = result(None)
    """Share of the steps before the final answer that use what the picture shows. Answers without steps, and to
    questions without a picture, are kept."""
    steps: Literal["rules", "judge"] = result("rules")
    """rules: words for places, looks and parts of pictures, and what the sample says is in it: a baseline."""
    judge: Judge | None = result(None)

    @model_validator(mode="after")
    def _judge_stated(self) -> Checks:
        if (self.judge is not None) != (self.steps == "judge"):
            raise ValueError("steps: judge needs the section judge, and rules does not have it")
        if self.judge is not None and self.min_steps_with_image is None:
            raise ValueError("min_steps_with_image: state what the judge is asked for")
        return self


class Near(Strict):
    """What counts as the same."""

    exact: bool = result(False)
    """The same messages with the same files, whatever the id."""
    text: float | None = result(None, ge=0.7, le=1)
    """Jaccard similarity of the sets of 5-grams of words, from which on two texts are one."""
    image: int | None = result(None, ge=0, le=64)
    """Bits by which perceptual hashes of 256 may differ; pairs within it are compared pixel by pixel."""
    image_difference: float = result(0.4, ge=0, le=4)
    """Largest difference of any of 64 areas after alignment, over what varies in the area."""
    against: list[str] = result(default_factory=list)
    """Names of sources. dedup: their kept training samples go first. decontaminate: their held-out samples."""

    @model_validator(mode="after")
    def _something(self) -> Near:
        if not self.exact and self.text is None and self.image is None:
            raise ValueError("state at least one of exact, text, image")
        return self


class Curate(Strict):
    clean: Clean | None = result(None)
    score: Score | None = result(None)
    instructions: Instructions | None = result(None, later=True)
    decontaminate: Near | None = result(None)
    dedup: Near | None = result(None)

    @model_validator(mode="after")
    def _compared(self) -> Curate:
        if self.decontaminate is not None and not self.decontaminate.against:
            raise ValueError("decontaminate.against: name the sources whose held-out samples must not be trained on")
        return self


MADE = "is made from other sources after curation; name those that it is made from"


def problems_of(
    curated: Mapping[str, Curate | None], held_out: Mapping[str, bool], made: Collection[str] = ()
) -> list[str]:
    """What is wrong between sources: `against` names one that is not there, has nothing held out, is made only after
    curation (`made`: from other sources), or waits for this."""
    found: list[str] = []
    order = set(curated)
    for name, curate in curated.items():
        at = f"prepare.sources.{name}.curate"
        for other in curate.decontaminate.against if curate and curate.decontaminate else []:
            if other not in order:
                found.append(f"{at}.decontaminate.against: no such source {other!r}; there are {sorted(order)}")
            elif other in made:
                found.append(f"{at}.decontaminate.against: {other!r} {MADE}")
            elif not held_out[other]:
                found.append(f"{at}.decontaminate.against: {other!r} has nothing held out")
        for other in curate.dedup.against if curate and curate.dedup else []:
            if other not in order:
                found.append(f"{at}.dedup.against: no such source {other!r}; there are {sorted(order)}")
            elif other in made:
                found.append(f"{at}.dedup.against: {other!r} {MADE}")
    try:
        in_order(curated)
    except graphlib.CycleError as error:
        circle = " after ".join(map(repr, error.args[1]))
        found.append(f"prepare.sources: dedup.against goes in a circle: {circle}; the samples of one have to go first")
    return found


def in_order(curated: Mapping[str, Curate | None]) -> list[str]:
    """Names of the curated sources, each after those whose samples go first; by name where that leaves a choice: the
    order of a recipe's sections is not kept.

    Raises:
        graphlib.CycleError
    """
    asked = {name: curate for name, curate in sorted(curated.items()) if curate is not None}
    first = {name: curate.dedup.against if curate.dedup else [] for name, curate in asked.items()}
    graph = {name: sorted(set(others) & set(asked)) for name, others in first.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())
