"""Qwen-VL: grids, template and names (arXiv 2308.12966; config.json, visual.py and tokenization_qwen.py as published).

Every picture is resized, not padded, to a square and becomes as many tokens as the adapter has queries, whatever its
size: 256 as released. The square's side follows from the pixel budget: the largest multiple of the patch whose square
lies within `image_max` (224 px is 50176, 448 px is 200704), so stages choose their resolution in the recipe.
Arithmetic only: the torch model is our own port (qwen_vl_port_model.py), since transformers has no such class.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from trainer.data.chat import ChatML
from trainer.data.coordinates import Convention
from trainer.data.media import resize
from trainer.data.objects import TaggedObjects
from trainer.data.pieces import Piece, Shown
from trainer.errors import ModelError, RecipeError
from trainer.flops import Shape
from trainer.models import fields
from trainer.models.family import Buildable, Grid, Group, Markers, Placed, common_facts, plain_positions
from trainer.recipe import Pixels

IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
QUERIES = 256
"""Of the adapter, where the config does not say (visual.n_queries): the default of the published class."""
VISUAL = {
    "patch_size": int,
    "n_queries": int,
    "width": int,
    "layers": int,
    "heads": int,
    "mlp_ratio": float,
    "output_dim": int,
}
"""What the section `visual` has to say; its image_size is not read, pictures are as large as the budget."""
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
}
"""What the published QWenConfig fills in where a config.json leaves it out."""
POOL_HEAD = 128
"""Width of a head of the adapter's attention; a narrower adapter has one head."""
NOT_OURS = (
    "auto_map",
    "quantization_config",
    "onnx_safe",
    "transformers_version",
    "torch_dtype",
    "bf16",
    "fp16",
    "fp32",
)
"""Of a published config.json: code that lies beside it, and how it was stored."""

CHAT_TEMPLATE = (
    "{% set pictures = namespace(number=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}{% set pictures.number = pictures.number + 1 %}"
    "Picture {{ pictures.number }}: <img>{{ '<imgpad>' * QUERIES }}</img>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What ChatML and media_pieces write, for an exported folder; published as Python (make_context, from_list_format)."""

POS_EMBED = "transformer.visual.attn_pool.pos_embed"


class QwenVL(Buildable):
    name = "qwen_vl"
    model_type = "qwen"
    special_tokens = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "<quad>",
        "</quad>",
        IMAGE_START,
        IMAGE_END,
        IMAGE_PAD,
    )
    plain_tokens = ()
    tiktoken_tokens = (
        *special_tokens[:3],
        *(f"<|extra_{number}|>" for number in range(205)),
        *special_tokens[3:],
    )
    """What follows the ranks of the published qwen.tiktoken, in order of id."""
    markers = Markers(image_pad=IMAGE_PAD, video_pad=IMAGE_PAD)
    template = ChatML()
    objects = TaggedObjects("<ref>", "</ref>", "<box>", "</box>")
    coordinates = Convention("thousand")
    merge_size = 1
    temporal_patch_size = 1
    grid_columns = 3
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    tokens_per_second = 0.0
    assumed = ()
    part_prefixes = ("", "transformer.", "transformer.visual.", "transformer.visual.attn_pool.")

    def __init__(self, config: Mapping[str, Any]):
        self.config: dict[str, Any] = {k: v for k, v in copy.deepcopy(dict(config)).items() if k not in NOT_OURS}
        visual = self.config["visual"]
        self.patch_size = visual.setdefault("patch_size", 14)
        self.num_queries = visual.setdefault("n_queries", QUERIES)
        fields.check(visual, VISUAL, "visual")
        self._text()
        self.patch_width = 3 * self.patch_size**2

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, tokens_per_second: float | None = None) -> QwenVL:
        """ModelError for the config of another model (Qwen-7B alone has the same model_type and no `visual`) or one
        whose sizes are missing, RecipeError for a number of temporal ids a second: there is no video."""
        if tokens_per_second is not None:
            raise RecipeError([("model.tokens_per_second", "Qwen-VL has no temporal positions: leave it out (null)")])
        fields.check_model_type(config, cls.model_type)
        visual = config.get("visual")
        if not isinstance(visual, Mapping):
            raise ModelError("a Qwen without a vision tower", where="visual", expected="its sizes", got=visual)
        fields.check({"n_queries": QUERIES} | dict(visual), {"n_queries": int}, "visual")
        queries = visual.get("n_queries", QUERIES)
        if math.isqrt(queries) ** 2 != queries:
            raise ModelError("queries lie on a square grid", where="visual.n_queries", expected="a square", got=queries)
        return cls(config)

    # ---------------------------------------------------------------- media

    def image_grid(self, width: int, height: int, *, min_pixels: int, max_pixels: int) -> Grid:
        """The largest square within `max_pixels`, whatever the picture's own size and `min_pixels`."""
        side = max(math.isqrt(max_pixels) // self.patch_size, 1)
        return Grid(1, side, side, side * self.patch_size, side * self.patch_size)

    def video_grid(
        self, num_frames: int, width: int, height: int, *, min_pixels: int, max_pixels: int, total_pixels: int
    ) -> Grid:
        """ValueError: Qwen-VL was published without video."""
        raise ValueError("Qwen-VL reads no video")

    def grid_row(self, grid: Grid) -> tuple[int, ...]:
        return grid.t, grid.h, grid.w

    def visual_tokens(self, grid: Grid) -> int:
        return self.num_queries

    def patches(self, grid: Grid) -> int:
        return grid.h * grid.w

    def image_patches(self, picture: Image, grid: Grid) -> np.ndarray:
        """uint8[P, 3 * patch * patch] row by row, each as channel, row, column: what conv1's weight multiplies."""
        p = self.patch_size
        pixels = np.asarray(resize(picture, grid.width, grid.height)).reshape(grid.h, p, grid.w, p, 3)
        return np.ascontiguousarray(pixels.transpose(0, 2, 4, 1, 3)).reshape(grid.h * grid.w, self.patch_width)

    def video_patches(self, frames: np.ndarray, grid: Grid) -> np.ndarray:
        raise ValueError("Qwen-VL reads no video")

    # ---------------------------------------------------------------- text

    def media_pieces(self, shown: Shown) -> list[Piece]:
        """<img>, the picture, </img>; in a chat with its number before and a line's end after (from_list_format)."""
        if shown.kind == "video":
            raise ValueError("Qwen-VL reads no video")
        pieces = [Piece("special", IMAGE_START), Piece("image", media=shown.media), Piece("special", IMAGE_END)]
        if shown.rendering == "document":
            return pieces
        return [Piece("text", f"Picture {shown.number}: "), *pieces, Piece("text", "\n")]

    def position_ids(self, spans: Sequence[Placed], *, start: int = 0, first: int = 0) -> np.ndarray:
        """int64[4, L]: a token of a picture has one position like any other."""
        return plain_positions(spans, start=start, first=first)

    # ---------------------------------------------------------------- names

    def group_of(self, parameter_name: str) -> Group:
        """The adapter is the attention over learned queries: the published fine-tuning freezes ln_post and proj, which
        come after it, with the tower."""
        if parameter_name.startswith("transformer.visual.attn_pool."):
            return "merger"
        if parameter_name.startswith("transformer.visual."):
            return "vision"
        if parameter_name.startswith(("transformer.wte.", "transformer.h.", "transformer.ln_f.", "lm_head.")):
            return "llm"
        raise ModelError("a parameter that belongs to no module group", where=parameter_name)

    def constant(self, parameter_name: str) -> str | None:
        if parameter_name == POS_EMBED:
            return "2-D sines and cosines, a parameter with requires_grad off in the published class"
        return None

    def hub_name(self, parameter_name: str) -> str:
        """The port's names are the published ones."""
        return parameter_name

    def model_name(self, hub_name: str) -> str:
        return hub_name

    # ---------------------------------------------------------------- model and export

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The whole: Qwen-VL's config is Qwen-7B's with a section `visual`."""
        return config

    def with_tokens(self, id_of: Callable[[str], int]) -> dict[str, Any]:
        """ModelError where </img> and <imgpad> do not follow <img>: the config names the first only."""
        config = copy.deepcopy(self.config)
        ids = [id_of(token) for token in (IMAGE_START, IMAGE_END, IMAGE_PAD)]
        if ids != list(range(ids[0], ids[0] + 3)):
            raise ModelError(
                "the tokenizer's image tokens do not follow each other",
                where="<img>, </img>, <imgpad>",
                expected=f"{ids[0]}, {ids[0] + 1}, {ids[0] + 2}",
                got=ids,
            )
        config["visual"]["image_start_id"] = ids[0]
        config["eos_token_id"] = id_of(self.markers.turn_end)
        config["pad_token_id"] = config["bos_token_id"] = id_of(self.markers.eos)
        return config

    def with_one_layer(self) -> dict[str, Any]:
        return self.export_config() | {"num_hidden_layers": 1}

    def export_config(self) -> dict[str, Any]:
        return copy.deepcopy(self.config) | {"model_type": self.model_type, "architectures": ["QWenLMHeadModel"]}

    def processor_files(self, pixels: Pixels) -> dict[str, str]:
        """A stock image processor at the square of these budgets; the template writes a picture's places itself."""
        side = self.image_grid(0, 0, min_pixels=pixels.image_min, max_pixels=pixels.image_max).width
        image = {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "QWenVLProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": 3,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        return {
            "preprocessor_config.json": json.dumps(image, indent=2, sort_keys=True) + "\n",
            "chat_template.jinja": CHAT_TEMPLATE.replace("QUERIES", str(self.num_queries)),
        }

    def import_warnings(self, processor: Mapping[str, Any]) -> list[str]:
        """None: the released model has no processor in transformers' form."""
        return []

    def unused(self, stored_name: str) -> bool:
        """Buffers that older versions saved."""
        return stored_name.endswith("inv_freq")

    def tokenizer_settings(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "QWenVLProcessor",
            "add_bos_token": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": self.markers.turn_end,
            "pad_token": self.markers.eos,
        }

    def _text(self) -> dict[str, Any]:
        return fields.filled(self.config, TEXT_DEFAULTS, "")

    def shape(self) -> Shape:
        text, visual = self._text(), self.config["visual"]
        c, d, width = text["hidden_size"], visual["width"], visual["output_dim"]
        mlp = int(d * visual["mlp_ratio"])
        return Shape(
            text_weights=text["num_hidden_layers"] * (4 * c * c + 3 * c * (text["intermediate_size"] // 2)),
            text_layers=text["num_hidden_layers"],
            text_width=c,
            hidden_size=c,
            vocab_size=text["vocab_size"],
            patch_weights=d * self.patch_width + visual["layers"] * (4 * d * d + 2 * d * mlp),
            merger_weights=(d * width if d != width else 0) + 2 * width * width,  # kv_proj, keys, values
            # output and the product after ln_post; the queries' own is the same for all pictures, once a pack
            picture_weights=2 * width * width * self.num_queries,
            vision_width=d,
            full_layers=visual["layers"],
        )

    def layout_facts(self) -> dict[str, Any]:
        return {
            **common_facts(self),
            "num_queries": self.num_queries,
        }
