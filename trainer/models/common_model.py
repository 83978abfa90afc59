"""What the torch sides of all families share: a language model beside a vision path in one model of transformers' kind.

A family's Parts (family.py) is a subclass here; its module ends with PARTS, the one instance.

Shapes: L tokens of a pack, P patches, M media, G grid columns, N visual tokens, C hidden width, D vision width, B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainer.models.causal import build_causal, causal_config
from trainer.step import attention
from trainer.step.attention import Segment
from trainer.step.loss import Head, as_head


class CommonParts:
    """A family adds model_class, config_class, causal_type, dummy_grid, plan_vision, run_vision, tower and see."""

    model_class: Any
    config_class: Any
    segments_as: str | dict[str, str] = attention.NAME
    """What attn_implementation "segments" means to the model, where its parts differ."""

    def build(
        self,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        attn_implementation: str | None = None,
        init: bool = True,
    ) -> Any:
        """The model with random weights (`init`) or with memory only; model_type and architectures of config.json
        follow from the classes.

        attn_implementation "segments" is the trainer's: attention over a pack, and a head that computes the loss over
        target rows in chunks. None leaves transformers' default, for generation and export.
        """
        ours = attn_implementation == attention.NAME
        if ours:
            attention.register()
        given = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        made: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": self.segments_as if ours else attn_implementation,
        }
        if init:
            model = self.model_class._from_config(self.config_class(**given), **made)
        else:
            with no_init_weights():
                model = self.model_class._from_config(self.config_class(**given), **made)
        model.tie_weights()  # no_init_weights and zero.Init leave it undone
        if ours:
            as_head(model.lm_head)
            self.adapt(model)
        return model

    def adapt(self, model: Any) -> None:
        """Put the trainer's attention in the place of the tower's."""

    def language_of(self, model: Any) -> Any:
        return model.model.language_model

    def exact_buffers(self, model: nn.Module) -> None:
        """Compute the rotary frequencies again, in fp32, as transformers keeps them whatever the weights' dtype."""
        rotary = self.language_of(model).rotary_emb
        kind = rotary.rope_type
        compute: Any = rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        set_frequencies(rotary, *compute(rotary.config))

    def embed_tokens(self, model: nn.Module, ids: Tensor) -> Tensor:
        """int64[L] -> [L, C]."""
        return self.language_of(model).get_input_embeddings()(ids)

    def positions(self, position_ids: Tensor, *, packed: bool) -> Tensor:
        """What of int64[4, B, L] the language model takes: here one position a token, the rows being equal."""
        return position_ids[0]

    def deeper_inputs(
        self, deeper: tuple[Tensor, ...], visual_index: Tensor | None, embeddings: Tensor, *, packed: bool
    ) -> dict[str, Any]:
        """Arguments of the language model for outputs of the vision path that deeper layers read: here none."""
        return {}

    def run_language(
        self,
        model: nn.Module,
        embeddings: Tensor,
        position_ids: Tensor,
        segments: Sequence[Segment],
        deeper: tuple[Tensor, ...],
        visual_index: Tensor,
    ) -> Tensor:
        """[L, C] and int64[4, L] -> final hidden states [L, C]."""
        out = self.language_of(model)(
            inputs_embeds=embeddings[None],
            position_ids=self.positions(position_ids[:, None], packed=True),
            attention_mask=None,
            use_cache=False,
            segments=segments,
            **self.deeper_inputs(deeper, visual_index, embeddings[None], packed=True),
        )
        return out.last_hidden_state[0]

    def head_of(self, model: nn.Module) -> Head:
        return model.lm_head  # type: ignore[return-value]

    def causal_type(self, config: Mapping[str, Any]) -> str:
        """model_type of the language model alone, of a config.json."""
        raise NotImplementedError

    def language_model(self, config: Mapping[str, Any], *, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The causal language model alone, with random weights, and its config.json."""
        alone = causal_config(config, self.causal_type(config))
        return build_causal(alone, seed=seed), alone

    def read(
        self,
        model: nn.Module,
        embeddings: Tensor,
        position_ids: Tensor,
        *,
        mask: Tensor | None,
        cache: Cache,
        deeper: tuple[Tensor, ...] = (),
        visual_index: Tensor | None = None,
    ) -> Tensor:
        """[B, L, C] and int64[4, B, L] -> hidden states [B, L, C]: for generation, with transformers' own attention.
        `visual_index` are rows of [B * L]."""
        out = self.language_of(model)(
            inputs_embeds=embeddings,
            position_ids=self.positions(position_ids, packed=False),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self.deeper_inputs(deeper, visual_index, embeddings, packed=False),
        )
        return out.last_hidden_state


def set_frequencies(rotary: Any, frequencies: Tensor, scaling: float) -> None:
    rotary.attention_scaling = scaling
    for name in ("inv_freq", "original_inv_freq"):
        old = getattr(rotary, name)
        setattr(rotary, name, nn.Buffer(frequencies.to(old.device, torch.float32), persistent=False))
