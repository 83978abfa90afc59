"""The model that the first stage starts from: a whole one, or one assembled from a language model, a vision tower and a
merger, each from a folder or random.

Missing, extra and wrong-shaped tensors are errors, but for the rows of tokens that a family adds to its language model:
these begin as the mean of the others. Where each group came from is told and kept in the stage's result.

    made = assemble(family, llm=uri, vision="random", merger="random", seed=1)
    hub.save_tensors(made.tensors, uri, family, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.errors import ModelError
from trainer.models import hub
from trainer.models.family import Family
from trainer.recipe import GROUPS

RANDOM = "random"


@dataclass(frozen=True)
class Assembled:
    tensors: dict[str, Callable[[], Tensor]]
    """Hub name -> read it."""
    origin: dict[str, str]
    """Group -> URI or random."""


def assemble(
    family: Family, *, llm: str, vision: str, merger: str, seed: int, dtype: torch.dtype = torch.float32
) -> Assembled:
    """One source a group. A folder may hold more than the group asked for (a whole VLM): the rest is not read.

    Raises:
        ModelError: a tensor of a group is missing, extra or of another shape.
    """
    fresh = random_tensors(family, seed=seed, dtype=dtype)
    wanted = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    tensors: dict[str, Callable[[], Tensor]] = {}
    origin = {"vision": vision, "merger": merger, "llm": llm}
    for group in GROUPS:
        names = [name for name in wanted if family.group_of(name) == group]
        if origin[group] == RANDOM:
            tensors |= {name: _keep(fresh[name]) for name in names}
        else:
            tensors |= _group_from(family, group, origin[group], {name: wanted[name] for name in names})
    return Assembled({name: tensors[name] for name in wanted}, origin)


def random_tensors(family: Family, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a model with the family's own random initialisation, by hub name; tied ones once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.build(dtype=dtype)
    return {family.hub_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def _keep(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _group_from(
    family: Family, group: str, uri: str, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, Callable[[], Tensor]]:
    readers = hub.load_tensors(uri)
    infos = {entry.name: entry for info in hub.read_headers(uri) for entry in info.tensors}
    found: dict[str, str] = {}
    for stored in infos:
        if family.unused(stored):
            continue
        name = _named(family, stored, wanted)
        if name is None:
            raise ModelError(
                "a tensor that the family does not know", where=f"{uri}: {stored}", expected=f"tensors of {group}"
            )
        if family.group_of(name) == group:
            found[name] = stored
    tied = bool(family.config.get("tie_word_embeddings"))
    tensors = {name: infos[stored] for name, stored in found.items()}
    rows = family.text_config(family.config).get("vocab_size")
    longer = {name for name, entry in tensors.items() if _lacks_rows(entry.shape, wanted.get(name), rows)}
    for name in sorted(longer):
        more = wanted[name][0] - tensors[name].shape[0]
        print(f"init: {name} of {uri} gets {more} rows for new tokens: the mean of its own", flush=True)
        tensors[name] = replace(tensors[name], shape=wanted[name])
    hub.check_names(tensors, wanted, tied=tied, where=f"{uri} ({group})")
    return {
        name: _with_rows(readers[found[name]], wanted[name][0]) if name in longer else readers[found[name]]
        for name in wanted
    }


def _lacks_rows(stored: tuple[int, ...], wanted: tuple[int, ...] | None, vocab_size: int | None) -> bool:
    """Embedding or head of a language model that has no rows for tokens that the family adds (<image> of LLaVA)."""
    if wanted is None or len(stored) != 2 or len(wanted) != 2:
        return False
    return wanted[0] == vocab_size and stored[0] < wanted[0] and stored[1] == wanted[1]


def _with_rows(read: Callable[[], Tensor], rows: int) -> Callable[[], Tensor]:
    def longer() -> Tensor:
        stored = read()
        mean = stored.float().mean(dim=0).to(stored.dtype)
        return torch.cat([stored, mean.expand(rows - len(stored), -1)])

    return longer


def _named(family: Family, stored: str, wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """Hub name of a stored tensor: as it is, or behind one of the prefixes that folders of parts leave out."""
    for prefix in family.part_prefixes:
        name = family.hub_name(family.model_name(prefix + stored))
        if name in wanted:
            return name
    name = family.hub_name(family.model_name(stored))
    try:
        family.group_of(name)
    except ModelError:
        return None
    return name
