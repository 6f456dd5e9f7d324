"""Our numbers beside PyTorch nanochat's: logits, losses, hidden states and gradients, as one table.

The reference side is a file of arrays (`--expect`), or a user's own PyTorch nanochat (`--torch-module`), run on the
same weights and tokens. Names of the arrays: `input_ids`, `targets`, `targets_masked` [B, T]; `logits` [B, T, V];
`loss`, `loss_masked`, `loss_sum`, `loss_none` [B, T] (losses need their targets); `block_out_first_tok_last_tok` [L, 2, C], the residual stream of
the first row after each block; `param_names`, `grad_norms`, `grad_norms_masked`, `grad:<name>`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.checkpoints.restore import load_params, read_meta
from megacontext_jax.checkpoints.runs import steps
from megacontext_jax.errors import UserError
from megacontext_jax.interop.folders import find_checkpoints
from megacontext_jax.interop.model_file import read_model
from megacontext_jax.interop.names import named, places
from megacontext_jax.model import gpt
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective

STREAM = "block_out_first_tok_last_tok"
SINGLE = ("smear_lambda", "backout_lambda", "x0_lambdas")  # one number, or one per layer
_TINY = 1e-30  # a gradient that is zero on both sides is equal
_COMPARED = (
    "logits",
    "loss",
    "loss_masked",
    "loss_sum",
    "loss_none",
    "grad_norms",
    "grad_norms_masked",
    STREAM,
)
_ABOUT = ("input_ids", "targets", "targets_masked", "param_names")


@dataclass(frozen=True)
class Tolerance:
    """What may differ. `logits_mean` and `grad` are None where they are not judged."""

    logits: float  # absolute, largest
    logits_mean: float | None
    argmax: float  # share of equal choices
    loss: float  # absolute, beside the spacing of float32 at the reference's value
    stream: float  # relative to the largest value of the layer
    grad: float | None  # norms, relative


FLOAT32 = Tolerance(2e-5, None, 1.0, 1e-6, 1e-5, 1e-5)
# nanochat's own bfloat16 forward beside its float32 one: 0.20 at most, 0.027 on average, loss 2.1e-3
BFLOAT16 = Tolerance(0.25, 0.03, 0.9, 1e-2, 5e-2, None)


@dataclass(frozen=True)
class Row:
    name: str
    largest: float
    mean: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance  # not so for NaN


@dataclass(frozen=True)
class Model:
    cfg: GPTConfig
    params: dict
    name: str
    notes: list[str]


def open_model(path: Path, *, era: str = "", softcap: float = 0.0, step: int = -1) -> Model:
    """A checkpoint of nanochat (folder or model_*.pt) or one of our runs (its folder or a step in it)."""
    path = Path(path)
    run, wanted = (path.parent, int(path.name)) if path.name.isdecimal() else (path, step)
    if steps(run):
        if era or softcap:
            raise UserError(f"{run} records its architecture; leave out --era and --softcap.")
        meta = read_meta(run, None if wanted < 0 else wanted)
        params = load_params(run, meta["step"])
        return Model(GPTConfig(**meta["model_config"]), params, f"{run.name}, step {meta['step']}", [])
    found = find_checkpoints(path, step=step)[-1]
    model = read_model(found.model, found.meta, era=era, softcap=softcap)
    name = f"{found.model.parent.name}/{found.model.name}"
    return Model(model.cfg, jax.tree.map(jnp.asarray, model.params), name, model.notes)


def our_arrays(model: Model, given: dict, objective: Objective, *, gradients: bool = True) -> dict:
    """Our side of whatever `given` holds (at least `input_ids`), under the same names."""
    _validate(model.cfg, given)
    ids_BT = jnp.asarray(given["input_ids"], jnp.int32)
    forward = partial(gpt.forward, cfg=model.cfg, attention=objective.attention.fn, dtype=objective.dtype)
    logits_BTV = np.asarray(jax.jit(forward)(model.params, ids_BT=ids_BT))
    out = {"input_ids": np.asarray(ids_BT), "logits": logits_BTV}
    stream = partial(gpt.residual_stream, cfg=model.cfg, dtype=objective.dtype)
    *blocks, _ = jax.jit(stream)(model.params, ids_BT=ids_BT)
    out[STREAM] = np.stack([np.asarray(x_BTC[0, (0, -1), :], np.float32) for x_BTC in blocks])

    def mean_loss(params, targets_BT):
        total, (weight, _) = objective.loss(params, {"inputs": ids_BT, "targets": targets_BT}, None)
        return total / jnp.maximum(weight, 1.0)

    gradient = jax.jit(jax.grad(mean_loss))
    for suffix in ("", "_masked"):
        if f"targets{suffix}" not in given:
            continue
        targets_BT = np.asarray(given[f"targets{suffix}"], np.int32)
        nll_BT = np.float64(objective.nll(model.params, {"inputs": ids_BT, "targets": targets_BT}))
        out[f"targets{suffix}"] = targets_BT
        out[f"loss{suffix}"] = nll_BT.sum() / max(1, (targets_BT >= 0).sum())
        if not suffix:
            out |= {"loss_sum": nll_BT.sum(), "loss_none": nll_BT}
        whole = [key[5:] for key in given if key.startswith("grad:") and not suffix]
        if gradients and (whole or f"grad_norms{suffix}" in given):
            grads = named(model.cfg, gradient(model.params, targets_BT))
            names = out["param_names"] = np.array(sorted(grads))
            out[f"grad_norms{suffix}"] = np.array([np.linalg.norm(np.float64(grads[name])) for name in names])
            out |= {f"grad:{name}": np.asarray(grads[name]) for name in whole}
    return out


def _validate(cfg: GPTConfig, given: dict) -> None:
    """Raises UserError for arrays that cannot be compared on."""

    def tokens(key: str, lowest: int) -> np.ndarray:
        x = np.asarray(given[key])
        fits = x.ndim == 2 and x.size and np.issubdtype(x.dtype, np.integer)
        if not fits or x.min() < lowest or x.max() >= cfg.vocab_size:
            raise UserError(
                f"{key} must be a table [B, T] of whole numbers from {lowest} to {cfg.vocab_size - 1}; mend the file."
            )
        return x

    ids_BT = tokens("input_ids", 0)
    for suffix in ("", "_masked"):
        if f"targets{suffix}" in given:
            _like(given, f"targets{suffix}", ids_BT.shape)
            tokens(f"targets{suffix}", -1)
        losses = [key for key in (f"loss{suffix}", f"grad_norms{suffix}") if key in given]
        losses += [key for key in given if key in ("loss_sum", "loss_none") or key.startswith("grad:")] * (
            not suffix
        )
        if losses and f"targets{suffix}" not in given:
            raise UserError(f"The file holds {losses[0]} and no targets{suffix} that it is of; add them.")
    if "loss_none" in given and np.size(given["loss_none"]) != ids_BT.size:
        raise UserError(f"loss_none must have {ids_BT.size} numbers, one for each target; mend the file.")
    known = set(places(cfg))
    names = [str(n) for n in np.ravel(given.get("param_names", []))]
    names += [key[5:] for key in given if key.startswith("grad:")]
    if foreign := sorted(set(names) - known):
        raise UserError(
            f"The file speaks of {foreign[0]}, which this model does not have; take the file of this model."
        )
    for key in ("grad_norms", "grad_norms_masked"):
        if key in given and np.size(given[key]) != np.size(given.get("param_names", [])):
            raise UserError(f"{key} must have one number for each of param_names; mend the file.")


def nats(logits_BTV, targets_BT) -> np.ndarray:
    """Negative log-likelihoods in float64, 0 at ignored targets."""
    z_BTV = np.asarray(logits_BTV, np.float64)
    top_BT1 = z_BTV.max(-1, keepdims=True)
    total_BT = np.log(np.exp(z_BTV - top_BT1).sum(-1)) + top_BT1[..., 0]
    picked_BT = np.take_along_axis(z_BTV, np.maximum(targets_BT, 0)[..., None].astype(np.int64), -1)[..., 0]
    return np.where(targets_BT >= 0, total_BT - picked_BT, 0.0)


def compare(ours: dict, theirs: dict, tolerance: Tolerance) -> list[Row]:
    """One row per quantity that both sides have."""
    rows = []
    if "logits" in theirs:
        a, b = np.float64(ours["logits"]), np.float64(_like(theirs, "logits", ours["logits"].shape))
        rows.append(_row("logits", np.abs(a - b), tolerance.logits))
        if tolerance.logits_mean is not None:
            rows.append(Row("logits, mean", float(np.abs(a - b).mean()), None, tolerance.logits_mean))
        missed = float((a.argmax(-1) != b.argmax(-1)).mean())
        rows.append(Row("argmax, share that differs", missed, None, 1.0 - tolerance.argmax))
    for suffix in ("", "_masked"):
        key = f"loss{suffix}"
        if key not in ours:
            continue
        if "logits" in theirs:
            targets_BT = ours[f"targets{suffix}"]
            exact = nats(theirs["logits"], targets_BT).sum() / max(1, (targets_BT >= 0).sum())
            rows.append(
                Row(f"{key}, from the logits", abs(float(ours[key]) - float(exact)), None, tolerance.loss)
            )
        if key in theirs:
            stored = float(theirs[key])
            spacing = float(np.spacing(np.float32(stored)))  # the reference itself is rounded to this
            rows.append(
                Row(f"{key}, as stored", abs(float(ours[key]) - stored), None, tolerance.loss + spacing)
            )
    if "loss_sum" in theirs and "loss_sum" in ours:
        stored = float(theirs["loss_sum"])
        count = max(1, int((ours["targets"] >= 0).sum()))
        spacing = float(np.spacing(np.float32(stored)))
        limit = tolerance.loss * count + spacing
        rows.append(Row("loss_sum, as stored", abs(float(ours["loss_sum"]) - stored), None, limit))
    if "loss_none" in theirs and "loss_none" in ours:
        a, b = ours["loss_none"], np.float64(theirs["loss_none"]).reshape(ours["loss_none"].shape)
        rows.append(_row("loss of each token", np.abs(a - b), 2 * tolerance.logits))
    if STREAM in theirs:
        pairs = zip(ours[STREAM], _like(theirs, STREAM, ours[STREAM].shape), strict=True)
        for i, (a, b) in enumerate(pairs):
            scale = max(1e-6, float(np.abs(b).max()))
            rows.append(
                _row(f"after block {i} (relative)", np.abs(np.float64(a) - b) / scale, tolerance.stream)
            )
    if tolerance.grad is not None:
        rows += _gradient_rows(ours, theirs, tolerance.grad)
    if not rows:
        raise UserError(
            "The file shares no quantity with ours (logits, loss, ...); see --help for the names of arrays."
        )
    return rows


def left_out(theirs: dict) -> list[str]:
    """Arrays of the reference that no row is about."""
    known = {*_COMPARED, *_ABOUT}
    return sorted(key for key in theirs if key not in known and not key.startswith("grad:"))


def _gradient_rows(ours: dict, theirs: dict, tolerance: float) -> list[Row]:
    """Gradients relative to the norm of their tensor.

    That of a single number (`SINGLE`) is one sum over all activations whose terms cancel, so that
    float32 knows it only relative to them: it is judged relative to the largest norm of all. (x0_lambdas: PyTorch's own is
    off by up to 5e-6 of itself from float64, that of resid_lambdas, which is judged as any other, by 3e-7.)
    """
    rows = []
    for suffix in ("", "_masked"):
        key = f"grad_norms{suffix}"
        if key in ours and key in theirs:
            names, norms = [str(name) for name in theirs["param_names"]], np.float64(theirs[key])
            single = np.array([name in SINGLE for name in names])
            mine = dict(zip(map(str, ours["param_names"]), ours[key], strict=True))
            error = np.abs(np.array([mine[name] for name in names]) - norms)
            words = suffix.replace("_", ", ")
            rows.append(
                _row(
                    f"gradient norms{words} (relative)",
                    (error / np.maximum(norms, _TINY))[~single],
                    tolerance,
                )
            )
            if single.any():
                rows.append(
                    _row(f"of single numbers{words}", error[single] / max(norms.max(), _TINY), tolerance)
                )
    whole = [key for key in ours if key.startswith("grad:") and key in theirs]
    if whole:
        norms = {key: float(np.linalg.norm(np.float64(theirs[key]))) for key in whole}
        scale = norms | {key: max(norms.values()) for key in whole if key[5:] in SINGLE}
        errors = [np.abs(ours[key] - theirs[key]).max() / max(scale[key], _TINY) for key in whole]
        rows.append(_row("gradients (relative to norm)", np.array(errors), tolerance))
    return rows


def _like(arrays: dict, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if arrays[key].shape != shape:
        raise UserError(
            f"{key} has the shape {list(arrays[key].shape)} where this model gives {list(shape)}; take the file that "
            "belongs to this checkpoint."
        )
    return arrays[key]


def _row(name: str, error: np.ndarray, tolerance: float) -> Row:
    return Row(name, float(error.max()), float(error.mean()), tolerance)


def table(rows: list[Row]) -> str:
    lines = [f"{'quantity':<34}{'largest':>12}{'mean':>12}{'tolerance':>12}"]
    for row in rows:
        mean = "" if row.mean is None else f"{row.mean:.2e}"
        verdict = "  ok" if row.passed else "  TOO MUCH"
        lines.append(f"{row.name:<34}{row.largest:>12.2e}{mean:>12}{row.tolerance:>12.2e}{verdict}")
    return "\n".join(lines)


def read_arrays(path: Path) -> dict:
    """The arrays of an .npz. Raises UserError when it cannot be read or has no input_ids."""
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {name: z[name] for name in z.files}
    except FileNotFoundError:
        raise UserError(f"There is no {path}; give an .npz of reference arrays.") from None
    except Exception as error:  # numpy and zipfile fail in many ways on damaged files
        raise UserError(f"{path} is not an .npz of plain arrays ({error}); take an intact one.") from None
    if "input_ids" not in arrays:
        raise UserError(f"{path} holds no input_ids [B, T]; it is no file of reference arrays.")
    return arrays


def random_tokens(cfg: GPTConfig, rows: int, length: int, seed: int) -> dict:
    """Tokens and next-token targets to compare on."""
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length + 1), np.int32)
    return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}
