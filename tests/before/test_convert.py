"""Published folders become ones that the trainer reads: the same bytes under the same names, resumed, or one error."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from pipelines.cli.main import main
from tests.models.configs.qwen_vl import config
from trainer import storage
from trainer.before import convert as module
from trainer.before.convert import convert
from trainer.before.tiktoken import WORDS, ranks_of, tokenizer_of
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, ModelError, QwenVLError, UsageError
from trainer.models import hub, initial
from trainer.models.family import load_family
from trainer.models.qwen_vl import QwenVL

TEXT = "the cat sat on the mat; the other cats' hats were 12 and aaaaaaa bbb!  \n\n é 你好 ok "


def a_vocabulary(merges: int = 40) -> dict[bytes, int]:
    """256 bytes, then the most frequent neighbours of TEXT: made as such vocabularies are."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(WORDS, TEXT * 3)]
    while len(ranks) < 256 + merges:
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = [_joined(word, best[0] + best[1]) for word in words]
    return ranks


def _joined(word: list[bytes], token: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] + part == token:
            out[-1] = token
        else:
            out.append(part)
    return out


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """The reference algorithm: join the neighbours whose token has the lowest rank, the leftmost of equal ones."""
    ids = []
    for word in regex.findall(WORDS, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            found = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not found:
                break
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def lines_of(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in ranks.items())


# ---------------------------------------------------------------- tokenizer


def test_the_made_tokenizer_gives_tiktokens_ids() -> None:
    ranks = a_vocabulary()
    made = Tokenizer(tokenizer_of(ranks_of(lines_of(ranks)), QwenVL.tiktoken_tokens).to_str().encode())
    rng = np.random.default_rng(4)
    letters = [*"the cats hao12'!\n ab", "é", "你", "  ", "aaaa"]
    texts = [TEXT, "", *("".join(rng.choice(letters, 60)) for _ in range(300))]
    for text in texts:
        assert made.encode(text) == tiktoken_ids(text, ranks), repr(text)
        assert made.decode(made.encode(text)) == text
    assert sum(len(made.encode(text)) for text in texts) < 0.8 * sum(len(text.encode()) for text in texts)


def test_special_tokens_follow_the_ranks_in_the_published_order() -> None:
    """151643 ranks in the published file, so <img> is 151857 there: image_start_id of its config."""
    made = Tokenizer(tokenizer_of(a_vocabulary(), QwenVL.tiktoken_tokens).to_str().encode())
    first = made.id("<|endoftext|>")
    assert first == 296
    places = {"<|im_end|>": 151645, "<|extra_0|>": 151646, "<ref>": 151851, "<img>": 151857, "<imgpad>": 151859}
    assert {name: made.id(name) - first + 151643 for name in places} == places
    assert len(made.encode("<img>")) > 1, "text that spells one stays text"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda lines: [*lines[:5], b"!!! 5", *lines[6:]], "line 6"),
        (lambda lines: lines[:-2] + lines[-1:], "holes"),
        (lambda lines: [base64.b64encode(b"zz") + b" 0", *lines[1:]], "no byte 0"),
    ],
)
def test_a_damaged_vocabulary_is_one_error(spoil: Callable[[list[bytes]], list[bytes]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        ranks_of(b"\n".join(spoil(lines_of(a_vocabulary(20)).splitlines())), "qwen.tiktoken")


# ---------------------------------------------------------------- weights


def a_published(folder: Path, *, safe: bool = False, **changes: Any) -> dict[str, Tensor]:
    """A folder as released: two weight files with an index, buffers among them, code named in the config, tiktoken."""
    folder.mkdir(exist_ok=True)
    content = config() | {"vocab_size": 600, "auto_map": {"AutoConfig": "code.X"}, "fp16": True} | changes
    content["visual"] = content["visual"] | {"image_start_id": 7}
    torch.manual_seed(2)
    tensors = {
        name: torch.randn_like(tensor).half()
        for name, tensor in QwenVL(content).build(dtype=torch.float32).state_dict().items()
    }
    buffers = {
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(6),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    stored = tensors if safe else tensors | buffers
    names = sorted(stored)
    halves = {"1-of-2": names[: len(names) // 2], "2-of-2": names[len(names) // 2 :]}
    form = "model-{}.safetensors" if safe else "pytorch_model-{}.bin"
    for part, chosen in halves.items():
        values = {name: stored[name] for name in chosen}
        save_file(values, folder / form.format(part)) if safe else torch.save(values, folder / form.format(part))
    where = {name: form.format(part) for part, chosen in halves.items() for name in chosen}
    (folder / f"{form.split('-')[0]}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "qwen.tiktoken").write_bytes(lines_of(a_vocabulary()))
    return tensors


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
def test_a_published_folder_comes_out_bit_for_bit(tmp_path: Path, safe: bool) -> None:
    tensors = a_published(tmp_path / "from", safe=safe)
    to = str(tmp_path / "to")
    assert main(["convert", str(tmp_path / "from"), "--to", to]) == 0
    found = {name: read() for name, read in hub.load_tensors(to).items()}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == torch.float16 for name in tensors)
    written = storage.read_json(storage.join(to, "config.json"))
    tokenizer = Tokenizer.load(to)
    assert "auto_map" not in written
    assert written["visual"]["image_start_id"] == tokenizer.id("<img>"), "of the tokenizer beside it"
    from trainer.after.opening import load_pretrained

    model = load_pretrained(to, dtype=torch.float32)
    assert all(torch.equal(value.half(), tensors[name]) for name, value in model.state_dict().items())


def test_an_interrupted_conversion_goes_on_after_the_last_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, to = tmp_path / "from", tmp_path / "to"
    a_published(source)
    written: list[str] = []
    put = module._put

    def failing(folder: str, name: str, data: bytes) -> dict[str, Any]:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return put(folder, name, data)

    monkeypatch.setattr(module, "_put", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), str(to), file_bytes=60_000)
    times = {name: (to / name).stat().st_mtime_ns for name in written}
    damaged = written[1]
    (to / damaged).write_bytes(b"half")
    monkeypatch.setattr(module, "_put", put)
    record = convert(str(source), str(to), file_bytes=60_000)
    kept = {name for name, at in times.items() if (to / name).stat().st_mtime_ns == at}
    assert kept == set(written) - {damaged}, "a damaged file is written again, whole ones are not"
    assert set(record["files"]) <= set(storage.list_dir(str(to)))
    with pytest.raises(UsageError, match="another conversion"):
        convert(str(source), str(to), file_bytes=50_000)


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _resave(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


FIRST, SECOND, HEAD = "pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin", "lm_head.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda at: (at / SECOND).unlink(), ModelError, rf"missing\n.*\n?.*{re.escape(SECOND)}"),
        (lambda at: (at / SECOND).write_bytes((at / SECOND).read_bytes()[:5000]), ModelError, "damaged weights file"),
        (lambda at: _resave(at / FIRST, lambda c: c | {"x": print}), ModelError, "more than tensors"),
        (lambda at: _resave(at / FIRST, lambda c: [*c.values()]), ModelError, "not a state_dict"),
        (
            lambda at: _resave(at / FIRST, lambda c: c | {"lm_head.weight": c["lm_head.weight"][1:]}),
            ModelError,
            "599, 48",
        ),
        (
            lambda at: _resave(at / FIRST, lambda c: c | {"other.weight": torch.ones(2).half()}),
            ModelError,
            "extra other",
        ),
        (lambda at: _resave(at / SECOND, lambda c: c | {HEAD: torch.ones(2)}), ModelError, "in two files"),
        (lambda at: _resave(at / FIRST, lambda c: {n: t.float() for n, t in c.items()}), ModelError, "--dtype"),
        (lambda at: _resave(at / FIRST, lambda c: {n: t * torch.nan for n, t in c.items()}), ModelError, "not finite"),
        (lambda at: _edit(at / "config.json", lambda c: c | {"model_type": "gpt2"}), ModelError, "no family"),
        (
            lambda at: _edit(at / "config.json", lambda c: c | {"quantization_config": {"quant_method": "gptq"}}),
            ModelError,
            "quantised",
        ),
        (lambda at: (at / "config.json").unlink(), ModelError, "no model config"),
        (lambda at: (at / "qwen.tiktoken").unlink(), DataError, "no tokenizer"),
    ],
)
def test_what_cannot_be_converted_is_one_error(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[QwenVLError], match: str
) -> None:
    a_published(tmp_path / "from")
    spoil(tmp_path / "from")
    with pytest.raises(error, match=match):
        convert(str(tmp_path / "from"), str(tmp_path / "to"))


def test_another_dtype_is_written_when_asked(tmp_path: Path) -> None:
    tensors = a_published(tmp_path / "from")
    convert(str(tmp_path / "from"), str(tmp_path / "to"), dtype="bf16")
    found = hub.load_tensors(str(tmp_path / "to"))
    assert torch.equal(found["lm_head.weight"](), tensors["lm_head.weight"].bfloat16())


# ---------------------------------------------------------------- parts


LANGUAGE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LANGUAGE |= {"num_attention_heads": 4}
TOWER: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}


def a_vicuna(folder: Path) -> dict[str, Tensor]:
    """As Vicuna-7B-v1.5 is released: two .bin files with buffers, a tokenizer in sentencepiece's form alone."""
    folder.mkdir()
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=90, tie_word_embeddings=False, **LANGUAGE))
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save({name: tensors[name] for name in names[:9]}, folder / FIRST)
    torch.save({name: tensors[name] for name in names[9:]} | buffers, folder / SECOND)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "config.json").write_text(json.dumps(LANGUAGE | {"model_type": "llama", "torch_dtype": "float16"}))
    return tensors


def a_clip(folder: Path) -> dict[str, Tensor]:
    """As CLIP is released: one .bin with the text half and the ids of positions."""
    folder.mkdir()
    torch.manual_seed(4)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=TOWER, projection_dim=8))
    tensors = dict(model.state_dict())
    buffers = {f"{half}_model.embeddings.position_ids": torch.arange(5)[None] for half in ("text", "vision")}
    torch.save(tensors | buffers, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": TOWER}))
    return tensors


def test_llavas_parts_as_released_are_converted_and_assembled(tmp_path: Path) -> None:
    language, clip = a_vicuna(tmp_path / "vicuna"), a_clip(tmp_path / "clip")
    for name, tensors in (("vicuna", language), ("clip", clip)):
        assert main(["convert", str(tmp_path / name), "--to", str(tmp_path / "to" / name)]) == 0
        found = {stored: read() for stored, read in hub.load_tensors(str(tmp_path / "to" / name)).items()}
        assert set(found) == set(tensors), "names are kept, buffers are not"
        assert all(torch.equal(found[stored], tensors[stored]) for stored in tensors)
    written = storage.read_json(str(tmp_path / "to" / "vicuna" / "config.json"))
    assert written == LANGUAGE | {"model_type": "llama"}
    text = LANGUAGE | {"model_type": "llama", "vocab_size": 92, "tie_word_embeddings": False}
    stated = {"model_type": "llava", "vision_config": TOWER, "text_config": text, "image_token_index": 91}
    whole = load_family("llava", stated)
    to = tmp_path / "to"
    made = initial.assemble(whole, llm=str(to / "vicuna"), vision=str(to / "clip"), merger="random", seed=1)
    for stored, ours in (
        ("vision_model.", "vision_tower.vision_model."),
        ("model.layers.", "language_model.model.layers."),
    ):
        source = clip if stored.startswith("vision") else language
        names = [name for name in source if name.startswith(stored)]
        assert names
        for name in names:
            assert torch.equal(made.tensors[ours + name.removeprefix(stored)](), source[name]), name
    rows = made.tensors["language_model.model.embed_tokens.weight"]()
    assert torch.equal(rows[:90], language["model.embed_tokens.weight"]) and len(rows) == 92


def test_qwen_7b_is_the_language_model_of_qwen_vl(tmp_path: Path) -> None:
    tensors = a_published(tmp_path / "from")
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("transformer.visual.")}
    for name in (FIRST, SECOND):
        _resave(tmp_path / "from" / name, lambda c: {n: t for n, t in c.items() if ".visual." not in n})
    _edit(tmp_path / "from" / "config.json", lambda c: {key: value for key, value in c.items() if key != "visual"})
    with pytest.raises(ModelError, match="without a vision tower"):
        convert(str(tmp_path / "from"), str(tmp_path / "to"), family="qwen_vl")
    convert(str(tmp_path / "from"), str(tmp_path / "to"))
    family = load_family("qwen_vl", config() | {"vocab_size": 600})
    made = initial.assemble(family, llm=str(tmp_path / "to"), vision="random", merger="random", seed=1)
    assert len(text) > 8 and all(torch.equal(made.tensors[name](), text[name]) for name in text)


def test_a_part_that_is_interrupted_or_damaged_is_told_as_a_whole_model_is(tmp_path: Path) -> None:
    a_vicuna(tmp_path / "from")
    (tmp_path / "from" / SECOND).write_bytes((tmp_path / "from" / SECOND).read_bytes()[:3000])
    with pytest.raises(ModelError, match="damaged weights file"):
        convert(str(tmp_path / "from"), str(tmp_path / "to"))
    (tmp_path / "from" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="clip, clip_vision_model, llama"):
        convert(str(tmp_path / "from"), str(tmp_path / "to"))
