"""A user's own PyTorch nanochat, run on given weights; the only place that imports torch, and only when asked."""

import contextlib
import dataclasses
import importlib
import os
import sys
from pathlib import Path

import numpy as np

from megacontext_jax.errors import UserError
from megacontext_jax.interop.model_file import CONFIG_KEYS, Origin, state_dict
from megacontext_jax.interop.parity import STREAM, Model


def torch_arrays(module: Path, model: Model, given: dict) -> dict:
    """What the nanochat below `module` (its checkout, or the folder of gpt.py) computes in float32 on a CPU.

    Raises UserError when torch or the source is missing, or when it does not take these weights strictly.
    """
    root = Path(module).absolute()
    root = root.parent if root.name == "nanochat" and (root / "gpt.py").exists() else root
    if not (root / "nanochat" / "gpt.py").exists():
        raise UserError(
            f"There is no nanochat/gpt.py below {module}; --torch-module names a checkout of nanochat."
        )
    try:
        import torch
    except ImportError:
        raise UserError(
            "--torch-module needs PyTorch: install it into this environment (pip install torch)."
        ) from None
    os.environ["NANOCHAT_DTYPE"] = "float32"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with _first_on_path(root):
        try:
            source = importlib.import_module("nanochat.gpt")
        except Exception as error:  # whatever that checkout needs and this environment lacks
            raise UserError(
                f"{root}/nanochat/gpt.py cannot be imported here ({error}); install what it needs."
            ) from None
    known = {field.name for field in dataclasses.fields(source.GPTConfig)}
    config = {key: getattr(model.cfg, key) for key in CONFIG_KEYS if key in known}
    net = source.GPT(source.GPTConfig(**config))
    net.init_weights()
    arrays = state_dict(model.cfg, model.params, Origin({}, _rows(net), ""))
    try:
        net.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The nanochat in {root} does not take a model of era {model.cfg.arch} ({reason}); name a checkout of that "
            "generation."
        ) from None
    net.eval()
    blocks: list = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: blocks.append(out)) for block in net.transformer.h
    ]
    ids = torch.from_numpy(np.asarray(given["input_ids"], np.int64))
    out = {"input_ids": np.asarray(given["input_ids"])}
    with torch.no_grad():
        out["logits"] = net(ids).float().numpy()
        for hook in hooks:
            hook.remove()
        out[STREAM] = np.stack([x[0, [0, -1]].float().numpy() for x in blocks])
    if "targets" in given:
        targets = torch.from_numpy(np.asarray(given["targets"], np.int64))
        loss = net(ids, targets)
        loss.backward()
        out["targets"], out["loss"] = np.asarray(given["targets"]), float(loss.detach())
        grads = {name: p.grad.double().norm().item() for name, p in net.named_parameters()}
        out["param_names"] = np.array(sorted(grads))
        out["grad_norms"] = np.array([grads[name] for name in sorted(grads)])
    return out


def _rows(net) -> int:
    return net.lm_head.weight.shape[0]


@contextlib.contextmanager
def _first_on_path(root: Path):
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
