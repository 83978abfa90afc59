"""Qwen-7B and Qwen-VL on current transformers: our port, with the published config, names and arithmetic.

transformers has no such class and the published code needs transformers 4.3x. Importing this file registers the port
with AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText and AutoProcessor; a config without `visual` is
Qwen-7B alone.

Two rules of the published code hold outside training only, and only beyond `seq_length` (2048) tokens: logn scales the
query at place i by log(i) / log(seq_length), and dynamic ntk widens the rotary base by the length of the sample. Both
go by the sample here, never by the pack. While a sample is generated its prompt's length counts to the end, as
published with a cache: another base in between would turn queries by other angles than the keys that are cached. Here
generation without a cache keeps to it too, so both give the same tokens.

Shapes: B rows, L tokens now, C hidden width, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from trainer.models.qwen_vl import QwenVL
from trainer.models.qwen_vl_vision_model import CrossAttention, Resampler, VisionTransformer, sin_cos_2d
from trainer.step.attention import Segment


class QWenConfig(PreTrainedConfig):
    """config.json as published; fields that say how the published code runs are kept and not read."""

    model_type = QwenVL.model_type
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 8192
    use_cache: bool = True
    kv_channels: int = 128
    rotary_pct: float = 1.0
    rotary_emb_base: int | float = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    seq_length: int = 2048
    intermediate_size: int = 22016
    no_bias: bool = True
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    tie_word_embeddings: bool = False
    visual: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        wanted = {
            "rotary_pct": 1.0,
            "no_bias": True,
            "attn_dropout_prob": 0.0,
            "emb_dropout_prob": 0.0,
            "kv_channels": self.hidden_size // self.num_attention_heads,
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} {getattr(self, name)}: every released Qwen-VL has {value}, which is ported")


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


# ---------------------------------------------------------------- positions


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """float32, like int64 `lengths` of samples: 1 up to seq_length, then 3, 7, 15, ... at each doubling.

    2 ** ceil(log2(length / seq_length) + 1) - 1, counted in integers: a logarithm rounds at the borders.
    """
    borders = seq_length * 2 ** torch.arange(24, device=lengths.device)
    doublings = (lengths[..., None] > borders).sum(dim=-1)
    return 2.0 ** (doublings + 1) - 1


def rotation(config: Any, positions: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin float32[B, 1, L, D] of int64[B, L]; alpha float32 broadcast over them, None: 1.

    Computed here and not kept in a buffer, which a cast of the model would round.
    """
    dim = config.kv_channels
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    base = torch.full((1, 1), float(config.rotary_emb_base), device=positions.device)
    if alpha is not None:
        base = base * alpha ** (dim / (dim - 2))
    angles = positions.float()[..., None] * base[..., None] ** -steps
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """[B, H, L, D], in fp32 between, as published."""
    cos, sin = cos_sin
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


def logn_scale(positions: Tensor, seq_length: int) -> Tensor:
    """float32[B, 1, L, 1] of places from 0: log(i) / log(seq_length) for the i-th token beyond seq_length, else 1."""
    scale = (positions + 1).float().log() / math.log(seq_length)
    return scale.clamp(min=1.0)[:, None, :, None]


def sample_lengths(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """int64[1, L]: of the sample that each token of a pack belongs to. A prompt that several answers see counts with
    the longest of them: keys are turned once."""
    longest: dict[int, int] = {}
    roots = [segment.seen[0][0] if segment.seen else segment.start for segment in segments]
    for segment, root in zip(segments, roots, strict=True):
        whole = segment.length + sum(stop - start for start, stop in segment.seen)
        longest[root] = max(longest.get(root, 0), whole)
    lengths = torch.tensor([longest[root] for root in roots])
    return lengths.repeat_interleave(torch.tensor([segment.length for segment in segments]))[None].to(device)


class Places:
    """What the layers need to know of positions, once a forward."""

    def __init__(self, config: Any, positions: Tensor, lengths: Tensor | None):
        """int64[B, L], and the length of each token's sample, int64 broadcast over them; None: in training."""
        alpha = self.logn = None
        if lengths is not None and config.use_dynamic_ntk:
            alpha = ntk_alpha(lengths, config.seq_length)
        if lengths is not None and config.use_logn_attn:
            self.logn = logn_scale(positions, config.seq_length)
        self.rotation = rotation(config, positions, alpha)


# ---------------------------------------------------------------- language model


class QWenAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.num_key_value_groups = 1
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, places: Places, mask: Tensor | None, past_key_values: Cache | None, **more: Any
    ) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        query, key = turned(query, places.rotation), turned(key, places.rotation)
        if places.logn is not None:
            query = query * places.logn.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **more)
        return self.c_proj(out.flatten(2))


class QWenMLP(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * functional.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self, x: Tensor, places: Places, mask: Tensor | None, past_key_values: Cache | None = None, **more: Any
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), places, mask, past_key_values, **more)
        return x + self.mlp(self.ln_2(x))


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = {"QWenBlock", "VisualAttentionBlock"}  # noqa: RUF012 (as transformers declares it)
    _skip_keys_device_placement = {"past_key_values"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear, convolution, embedding, norms
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, VisionTransformer):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
            init.normal_(module.proj, std=module.proj.shape[1] ** -0.5)
        elif isinstance(module, Resampler):
            init.trunc_normal_(module.query, std=0.02)
            rows, width = module.pos_embed.shape
            init.copy_(module.pos_embed, sin_cos_2d(width, math.isqrt(rows)))
        elif isinstance(module, CrossAttention):
            init.normal_(module.in_proj_weight, std=self.config.initializer_range)
            init.zeros_(module.in_proj_bias)


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, number) for number in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if config.visual is not None:
            self.visual = VisionTransformer(config.visual)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segments: Sequence[Segment] | None = None,
        prompt_lengths: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """int64[B, L] or [B, L, C]; position_ids int64[B, L] default to places counted without padding; `segments` is
        the table of a pack (attention "segments"); prompt_lengths int64[B] of a sample that is being generated."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = _places(seen, attention_mask, x) if position_ids is None else position_ids
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        lengths = None
        if not self.training:
            lengths = _lengths(positions, segments, prompt_lengths, past_key_values if seen else None)
            if past_key_values is not None and not seen:
                past_key_values.prompt_lengths = lengths[:, 0]  # type: ignore[union-attr]
        places = Places(self.config, positions, lengths)
        more = {} if segments is None else {"segments": segments}
        for block in self.h:
            x = block(x, places, mask, past_key_values=past_key_values, **more)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values if use_cache else None
        )


def _places(seen: int, mask: Tensor | None, x: Tensor) -> Tensor:
    """int64[B, L]: the place of each token in its sample, padding (mask 0) not counted."""
    if mask is None or mask.dim() != 2:
        return torch.arange(seen, seen + x.shape[1], device=x.device).expand(x.shape[0], x.shape[1])
    return (mask[:, : seen + x.shape[1]].long().cumsum(dim=1) - 1).clamp(min=0)[:, seen:]


def _lengths(
    positions: Tensor, segments: Sequence[Segment] | None, prompt_lengths: Tensor | None, cache: Cache | None
) -> Tensor:
    """int64[B, 1], or [1, L] of a pack."""
    if segments is not None:
        return sample_lengths(segments, positions.device)
    if prompt_lengths is None:
        prompt_lengths = getattr(cache, "prompt_lengths", None)
    return positions.amax(dim=1, keepdim=True) + 1 if prompt_lengths is None else prompt_lengths[:, None]


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, *args: Any, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> Mapping[str, Any]:
        """generate() looks for the name `kwargs` when it checks its arguments."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values  # later steps have the pictures in their cache
        return inputs

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **more: Any) -> Any:
        """After the first step: remember how long each prompt was, for the steps that have no cache to ask."""
        if "prompt_lengths" not in model_kwargs and (places := model_kwargs.get("position_ids")) is not None:
            model_kwargs["prompt_lengths"] = places.amax(dim=-1) + 1
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **more)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """pixel_values float[M, 3, side, side] fill the places of <imgpad> in input_ids, in reading order.

        Raises:
            ValueError: there are more or fewer places than the pictures have features.
        """
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pictures need input_ids, which say where they stand")
            inputs_embeds, input_ids = self._with_pictures(input_ids, pixel_values), None
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **more,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **more)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def _with_pictures(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeddings = self.transformer.wte(input_ids)
        features = self.transformer.visual.pictures(pixel_values.to(embeddings.dtype)).to(embeddings.dtype)
        places = input_ids == self.config.visual["image_start_id"] + 2
        if (found := int(places.sum())) != len(features):
            raise ValueError(f"{found} tokens <imgpad> for {len(pixel_values)} pictures, which fill {len(features)}")
        return embeddings.masked_scatter(places[..., None], features)


# ---------------------------------------------------------------- processor


class QWenVLProcessor(ProcessorMixin):
    """A stock image processor and tokenizer. The chat template writes <img>, as many <imgpad> as a picture fills,
    </img>: text needs no further work here."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """input_ids and attention_mask int64[B, L], pixel_values float[M, 3, side, side]. One text is a batch of one,
        as in every processor of transformers."""
        return_tensors = kwargs.pop("return_tensors", None)
        found: dict[str, Any] = {}
        if images is not None:
            found |= self.image_processor(images, return_tensors=return_tensors)
        if text is not None:
            keep = {
                key: kwargs[key] for key in ("padding", "padding_side", "truncation", "max_length") if key in kwargs
            }
            text = [text] if isinstance(text, str) else text
            found |= self.tokenizer(text, add_special_tokens=False, return_tensors=return_tensors, **keep)
        return BatchFeature(found)


AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
AutoModelForImageTextToText.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
AutoProcessor.register(QWenConfig, QWenVLProcessor, exist_ok=True)
