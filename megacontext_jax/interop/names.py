"""nanochat's names for tensors and our places for them; which era a set of tensors belongs to.

Both sides store matrices as (out, in). Ours stack the layers; `Place` says which leaf of the params pytree a
tensor of PyTorch nanochat is, and which slice of it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import NANOCHAT, GPTConfig

PREFIX = "_orig_mod."  # put before every name by torch.compile
ERAS = {
    str(i): name for i, name in zip(("1", "2", "3", "3b", "4", "5"), (a.name for a in NANOCHAT), strict=True)
}

_MATRICES = {
    "c_q": "attn.c_q",
    "c_k": "attn.c_k",
    "c_v": "attn.c_v",
    "attn_proj": "attn.c_proj",
    "ve_gate": "attn.ve_gate",
    "c_fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}
_EMBEDDINGS = ("wte", "lm_head", "value_embeds")


class Place(NamedTuple):
    """A leaf of the params pytree (its path) and the index on its first axis, None for the whole leaf."""

    leaf: tuple[str, ...]
    index: int | None

    def pick(self, tree):
        """This tensor in a tree shaped like the parameters."""
        for key in self.leaf:
            tree = tree[key]
        return tree if self.index is None else tree[self.index]


def places(cfg: GPTConfig) -> dict[str, Place]:
    """nanochat's state dict of this model: name -> place, in nanochat's order."""
    shapes, ve_layers = cfg.param_shapes(), cfg.value_embed_layers()
    scalars = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")
    found = {name: Place((name,), None) for name in scalars if name in shapes}
    found["transformer.wte.weight"] = Place(("wte",), None)
    for i in range(cfg.n_layer):
        for ours, theirs in _MATRICES.items():
            if ours != "ve_gate":
                found[f"transformer.h.{i}.{theirs}.weight"] = Place(("h", ours), i)
            elif i in ve_layers:
                found[f"transformer.h.{i}.{theirs}.weight"] = Place((ours,), ve_layers.index(i))
    found["lm_head.weight"] = Place(("lm_head",), None)
    if "smear_gate" in shapes:
        found["smear_gate.weight"] = Place(("smear_gate",), None)
    for n, i in enumerate(ve_layers):
        found[f"value_embeds.{i}.weight"] = Place(("value_embeds",), n)
    return found


def shape_of(cfg: GPTConfig, place: Place) -> tuple[int, ...]:
    shape = cfg.param_shapes()
    for key in place.leaf:
        shape = shape[key]
    return shape if place.index is None else shape[1:]


def has_vocabulary_rows(place: Place) -> bool:
    """Whether the rows are tokens, whose number files may round up differently."""
    return place.leaf[0] in _EMBEDDINGS


def named(cfg: GPTConfig, tree) -> dict:
    """A tree shaped like the parameters by nanochat's names."""
    return {name: place.pick(tree) for name, place in places(cfg).items()}


def era_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The era of a state dict (names without prefix -> shapes). era3b looks like era3: its soft cap is not stored."""
    if "resid_lambdas" not in shapes:
        return "classic"
    gates = [shape for name, shape in shapes.items() if name.endswith("attn.ve_gate.weight")]
    if not any(name.startswith("value_embeds.") for name in shapes) or not gates:
        return "era2"
    if "smear_gate.weight" in shapes:
        return "latest"
    known = {arch.ve_channels: arch.name for arch in reversed(NANOCHAT) if not arch.smear}
    width = gates[0][-1]
    if width not in known:
        raise UserError(
            f"The gates of the value embeddings read {width} channels, and no generation of nanochat has that; "
            "name the closest one with --era, if the model is of a fork."
        )
    return known[width]


def era_named(word: str) -> str:
    """`--era`: an architecture's name, or its number in nanochat's history (1 to 5, 3b)."""
    word = word.lower().removeprefix("era")
    eras = ERAS | {arch.name: arch.name for arch in NANOCHAT}
    if word not in eras:
        raise UserError(f"There is no era {word!r}; choose one of {', '.join([*ERAS, *ERAS.values()])}.")
    return eras[word]


def listed(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
