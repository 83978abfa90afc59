"""Qwen2-VL's torch side: transformers' model. The tower has no windows: every layer attends to a whole image, or to a
whole grid row of a video."""

from __future__ import annotations

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration, VisionAttention

from trainer.models.native_model import FrameAttention, NativeParts


class Attention(FrameAttention, VisionAttention):
    pass


class Qwen2VLParts(NativeParts):
    model_class = Qwen2VLForConditionalGeneration
    config_class = Qwen2VLConfig
    attention_class = Attention


PARTS = Qwen2VLParts()
