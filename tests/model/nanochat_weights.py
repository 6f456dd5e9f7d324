"""nanochat's state dict as our params pytree (both sides store matrices as (out, in))."""

import numpy as np

NAMES = {
    "c_q": "attn.c_q",
    "c_k": "attn.c_k",
    "c_v": "attn.c_v",
    "attn_proj": "attn.c_proj",
    "c_fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}


def params_from(arrays, n_layer: int, prefix: str = "w:") -> dict:
    layers = {
        ours: np.stack([arrays[f"{prefix}transformer.h.{i}.{theirs}.weight"] for i in range(n_layer)])
        for ours, theirs in NAMES.items()
    }
    wte, head = arrays[f"{prefix}transformer.wte.weight"], arrays[f"{prefix}lm_head.weight"]
    return {"wte": wte, "lm_head": head, "h": layers}


def by_name(tree: dict) -> dict[str, np.ndarray]:
    """The other way: nanochat's names to arrays."""
    out = {"transformer.wte.weight": tree["wte"], "lm_head.weight": tree["lm_head"]}
    for ours, theirs in NAMES.items():
        for i, layer in enumerate(tree["h"][ours]):
            out[f"transformer.h.{i}.{theirs}.weight"] = layer
    return {name: np.asarray(x) for name, x in out.items()}
