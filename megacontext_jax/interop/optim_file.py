"""Optimiser files of PyTorch nanochat, of one GPU or one per GPU, and our optimiser state: there and back.

What the files hold is flat: per tensor of the model (by nanochat's name) the two moments of AdamW, or Muon's
momentum and, since January 2026, its mean squares. How they hold it depends on the generation:

* until January 2026 a list [AdamW, Muon] of torch state dicts, one entry per tensor. On one GPU Muon's groups are
  the tensors of one size, in the order of a Python set; on several they are those of one shape, sorted, and the
  j-th tensor of a group lives on GPU j modulo their number.
* since then one dict; a group of Muon is one stack [K, rows, columns] under its first tensor, padded with zeros
  and cut into equal parts for the GPUs.
* AdamW's moments are cut by rows, one part per GPU; from era2 on tensors under 1,024 numbers are whole everywhere.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import optax

from megacontext_jax.errors import UserError
from megacontext_jax.interop.model_file import Origin
from megacontext_jax.interop.names import has_vocabulary_rows, places, shape_of
from megacontext_jax.interop.torch_file import StoredTensor, TorchFile
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.train.optim import EPSILON, MuonState, NorMuonState, base_rate
from megacontext_jax.train.recipes import RECIPES, Muon, group_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
BUFFERS = ("momentum_buffer", "second_momentum_buffer")  # Muon's
SMALL = 1024  # numbers; tensors below are not cut (era2 and later)
_ADAM_GROUPS = ("lm_head", "wte", "value_embeds", "resid", "x0", "scalar")  # nanochat's order


@dataclass
class OptimizerState:
    """Optimiser state by nanochat's names. `read` gives an array of a kind (`MOMENTS`, `BUFFERS`) for a name."""

    step: int  # updates AdamW has made
    read: Callable[[str, str], np.ndarray]
    groups: list = field(default_factory=list)  # hyper-parameters per group, as in the file


# --------------------------------------------------------------------------------------------------------
# The tensors of a group


def adam_groups(cfg: GPTConfig) -> list[list[str]]:
    """Names of the AdamW groups that this model has, in nanochat's order."""
    groups: dict[str, list[str]] = {name: [] for name in _ADAM_GROUPS}
    for name, place in places(cfg).items():
        group = group_of(place.leaf)
        if group != "matrix":
            groups[group].append(name)
    scalar = ("smear_gate.weight", "smear_lambda", "backout_lambda")
    groups["scalar"].sort(key=lambda name: scalar.index(name) if name in scalar else 0)
    return [names for names in groups.values() if names]


def matrices(cfg: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Muon's tensors, in nanochat's order."""
    return {
        name: shape_of(cfg, place) for name, place in places(cfg).items() if group_of(place.leaf) == "matrix"
    }


def groups_by_shape(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    return [[name for name in shapes if shapes[name] == shape] for shape in sorted(set(shapes.values()))]


def groups_by_size(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    sizes = {math.prod(shape) for shape in shapes.values()}  # in the order of a set, as in nanochat
    return [[name for name in shapes if math.prod(shapes[name]) == size] for size in sizes]


def is_list(cfg: GPTConfig) -> bool:
    """Whether the generation writes [AdamW, Muon] rather than one dict."""
    return cfg.arch in ("classic", "era2")


# --------------------------------------------------------------------------------------------------------
# Reading


def rank_files(model_path: Path) -> list[Path]:
    """The optimiser files beside a model file, by rank; empty if there are none.

    Raises UserError when the file of a rank is missing between others.
    """
    step = re.fullmatch(r"model_(\d+)\.pt", model_path.name)[1]
    single = model_path.with_name(f"optim_{step}.pt")
    if single.exists():
        return [single]
    found = {}
    for path in model_path.parent.glob(f"optim_{step}_rank*.pt"):
        if match := re.fullmatch(rf"optim_{step}_rank(\d+)\.pt", path.name):
            found[int(match[1])] = path
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise UserError(
            f"{model_path.parent} has optimiser files of {len(found)} GPUs and lacks optim_{step}_rank{missing[0]}.pt; "
            "bring it, or import with --no-optimizer."
        )
    return [found[rank] for rank in sorted(found)]


class OptimizerFiles:
    """Opened optimiser files of one checkpoint; a context manager that gives an `OptimizerState`."""

    def __init__(self, paths: list[Path], cfg: GPTConfig, origin: Origin):
        self._paths, self._cfg, self._origin = paths, cfg, origin
        self._stack = ExitStack()

    def __enter__(self) -> OptimizerState:
        with ExitStack() as stack:
            trees = [stack.enter_context(TorchFile(path)).tree for path in self._paths]
            try:
                state = self._merge(trees)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError, StopIteration) as error:
                raise self._refusal(f"it has an unknown form ({type(error).__name__}: {error})") from None
            self._stack = stack.pop_all()
        return state

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _refusal(self, reason: str) -> UserError:
        names = self._paths[0].name + (" and its like" if len(self._paths) > 1 else "")
        return UserError(
            f"{self._paths[0].parent / names} is not the optimiser state of this model: {reason}; bring the files that "
            "belong to it, or import with --no-optimizer."
        )

    def _merge(self, trees: list) -> OptimizerState:
        if is_list(self._cfg):
            adam, muon = ([tree[i] for tree in trees] for i in (0, 1))
            pieces = self._adam_pieces(adam) | self._muon_list_pieces(muon)
            groups = [_plain_groups(part[0]["param_groups"]) for part in (adam, muon)]
        else:
            pieces = self._adam_pieces(trees) | self._muon_dict_pieces(trees)
            groups = [_plain_groups(trees[0]["param_groups"])]
        adam_state = trees[0][0]["state"] if is_list(self._cfg) else trees[0]["state"]
        step = adam_state[0]["step"]
        step = int(step.read()) if isinstance(step, StoredTensor) else int(step)

        def read(kind: str, name: str) -> np.ndarray:
            return pieces[kind, name]()

        return OptimizerState(step, read, groups)

    def _adam_pieces(self, trees: list) -> dict:
        names = [name for group in adam_groups(self._cfg) for name in group]
        wanted = places(self._cfg)
        pieces = {}
        for index, name in enumerate(names):
            shape = shape_of(self._cfg, wanted[name])
            if has_vocabulary_rows(wanted[name]):
                shape = (self._origin.vocab_rows, *shape[1:])
            for kind in MOMENTS:
                parts = [tree["state"][index][kind] for tree in trees]
                if parts[0].shape == shape:  # one GPU, or whole on each of them
                    parts = parts[:1]
                if (sum(p.shape[0] for p in parts), *parts[0].shape[1:]) != shape:
                    shapes = ", ".join(str(list(p.shape)) for p in parts[:3])
                    raise self._refusal(
                        f"{kind} of {name} has the shape(s) {shapes} where {list(shape)} is asked for"
                    )
                pieces[kind, name] = _joined(parts)
        return pieces

    def _muon_list_pieces(self, trees: list) -> dict:
        shapes, pieces = matrices(self._cfg), {}
        states: dict[int, dict] = {}
        for tree in trees:
            states |= tree["state"]
        for group in trees[0]["param_groups"]:
            owned = next(states[i]["momentum_buffer"].shape for i in group["params"] if i in states)
            names = [name for name, shape in shapes.items() if math.prod(shape) == math.prod(owned)]
            if len(names) != len(group["params"]):
                names = [name for name in names if shapes[name] == owned]
            if len(names) != len(group["params"]):
                raise self._refusal(
                    f"a group of Muon has {len(group['params'])} matrices of shape {list(owned)}"
                )
            for index, name in zip(group["params"], names, strict=True):
                if index not in states:
                    raise self._refusal(
                        f"the momentum of {name} is in no file (nanochat of October 2025 kept only the first GPU's part)"
                    )
                for kind, tensor in states[index].items():
                    self._check_buffer(kind, name, tensor.shape, shapes[name])
                    pieces[kind, name] = tensor.read
        return pieces

    def _muon_dict_pieces(self, trees: list) -> dict:
        shapes, pieces = matrices(self._cfg), {}
        index = sum(map(len, adam_groups(self._cfg)))
        for names in groups_by_shape(shapes):
            for kind in BUFFERS:
                stacks = [tree["state"][index][kind] for tree in trees if index in tree["state"]]
                counts = [stack.shape[0] for stack in stacks]
                if sum(counts) < len(names):
                    raise self._refusal(
                        f"{kind} has {sum(counts)} of the {len(names)} matrices like {names[0]}"
                    )
                for stack in stacks:
                    self._check_buffer(kind, names[0], stack.shape[1:], shapes[names[0]])
                whole = _Once(_joined(stacks))
                for k, name in enumerate(names):
                    pieces[kind, name] = lambda whole=whole, k=k: whole()[k]
            index += len(names)
        return pieces

    def _check_buffer(self, kind: str, name: str, shape, wanted) -> None:
        if kind not in BUFFERS:
            raise self._refusal(f"it holds {kind} for {name}")
        if kind == "second_momentum_buffer":
            wanted = (wanted[0], 1) if wanted[0] >= wanted[1] else (1, wanted[1])
        if shape != wanted:
            raise self._refusal(
                f"{kind} of {name} has the shape {list(shape)} where {list(wanted)} is asked for"
            )


class _Once:
    """Reads a stack when its first matrix is asked for and keeps it for the others."""

    def __init__(self, read: Callable[[], np.ndarray]):
        self._read, self._value = read, None

    def __call__(self) -> np.ndarray:
        if self._value is None:
            self._value = self._read()
        return self._value


def _joined(parts: Iterable[StoredTensor]) -> Callable[[], np.ndarray]:
    """Reads the parts of all GPUs into one array."""
    parts = list(parts)
    return lambda: parts[0].read() if len(parts) == 1 else np.concatenate([part.read() for part in parts])


def _plain_groups(groups: list) -> list[dict]:
    """Hyper-parameters that JSON can keep: no indices, no tensors (DistMuon's buffer of zeros)."""

    def plain(value) -> bool:
        if isinstance(value, tuple | list):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    return [{k: v for k, v in group.items() if k != "params" and plain(v)} for group in groups]


# --------------------------------------------------------------------------------------------------------
# Our state

_OURS = (optax.ScaleByAdamState, optax.ScaleByScheduleState, MuonState, NorMuonState)


def fill_state(like, cfg: GPTConfig, state: OptimizerState, step: int):
    """Our optimiser state with the values of `state`, as numpy arrays.

    `like` is the state of our optimiser (arrays or shapes). The schedules continue at `step`.
    """
    wanted = places(cfg)
    by_leaf: dict[tuple, list[str]] = {}
    for name, place in wanted.items():
        by_leaf.setdefault(place.leaf, []).append(name)

    def fill(kind: str, tree):
        def one(path, leaf):
            out = np.zeros(leaf.shape, np.float32)
            for name in by_leaf[tuple(key.key for key in path)]:
                place, array = wanted[name], state.read(kind, name)
                target = out if place.index is None else out[place.index]
                target[: array.shape[0]] = array
            return out

        return jax.tree.map_with_path(one, tree)

    def convert(part):
        counted = {"count": np.int32(state.step if isinstance(part, optax.ScaleByAdamState) else step)}
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(**counted, mu=fill(MOMENTS[0], part.mu), nu=fill(MOMENTS[1], part.nu))
        if isinstance(part, NorMuonState):
            counted["second"] = fill(BUFFERS[1], part.second)
        if isinstance(part, MuonState | NorMuonState):
            counted["momentum"] = fill(BUFFERS[0], part.momentum)
        return part._replace(**counted) if isinstance(part, _OURS) else part

    return jax.tree.map(convert, like, is_leaf=lambda part: isinstance(part, _OURS))


def state_of(opt_state, cfg: GPTConfig, origin: Origin, groups: list) -> OptimizerState:
    """Our optimiser state by nanochat's names."""
    found: dict[str, dict[tuple, np.ndarray]] = {kind: {} for kind in (*MOMENTS, *BUFFERS)}
    steps = []

    def collect(kind: str, tree) -> None:
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[kind][tuple(key.key for key in path)] = np.asarray(leaf)

    for part in jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, _OURS)):
        if isinstance(part, optax.ScaleByAdamState):
            collect(MOMENTS[0], part.mu)
            collect(MOMENTS[1], part.nu)
            steps.append(int(part.count))
        elif isinstance(part, MuonState | NorMuonState):
            collect(BUFFERS[0], part.momentum)
            if isinstance(part, NorMuonState):
                collect(BUFFERS[1], part.second)
    wanted = places(cfg)

    def read(kind: str, name: str) -> np.ndarray:
        place = wanted[name]
        array = found[kind][place.leaf]
        array = array if place.index is None else array[place.index]
        return array[: origin.vocab_rows] if has_vocabulary_rows(place) else array

    return OptimizerState(max(steps), read, groups)


# --------------------------------------------------------------------------------------------------------
# Writing


def optimizer_trees(state: OptimizerState, cfg: GPTConfig, ranks: int = 1) -> list:
    """What `torch.save` wrote in each of `ranks` processes of nanochat, with numpy arrays.

    Raises UserError when nanochat could not have cut the state into so many parts.
    """
    return [(_list_tree if is_list(cfg) else _dict_tree)(state, cfg, rank, ranks) for rank in range(ranks)]


def _list_tree(state: OptimizerState, cfg: GPTConfig, rank: int, ranks: int) -> list:
    shapes = matrices(cfg)
    step = np.array(state.step, np.float32 if ranks == 1 else np.int64)
    adam = _adam_entries(state, cfg, rank, ranks, step)
    muon, index, members = {}, 0, groups_by_size(shapes) if ranks == 1 else groups_by_shape(shapes)
    kinds = BUFFERS[: 2 if RECIPES[recipe_name(cfg)].muon.beta2 else 1]
    muon_groups = _numbered(state.groups[1], members, 0)
    for names in members:
        for j, name in enumerate(names):
            if j % ranks == rank:
                muon[index + j] = {kind: state.read(kind, name) for kind in kinds}
        index += len(names)
    if ranks > 1:  # DistMuon keeps a matrix of zeros in each of its groups
        blanks = [{"zero_buffer": np.zeros(shapes[names[0]], np.float32)} for names in members]
        muon_groups = [blank | group for blank, group in zip(blanks, muon_groups, strict=True)]
    adam_part = {"state": adam, "param_groups": _numbered(state.groups[0], adam_groups(cfg), 0)}
    return [adam_part, {"state": muon, "param_groups": muon_groups}]


def _dict_tree(state: OptimizerState, cfg: GPTConfig, rank: int, ranks: int) -> dict:
    shapes = matrices(cfg)
    entries = _adam_entries(state, cfg, rank, ranks, state.step)
    members = adam_groups(cfg) + groups_by_shape(shapes)
    index = len(entries)
    for names in groups_by_shape(shapes):
        chunk = -(-len(names) // ranks)
        entries[index] = {}
        for kind in BUFFERS:
            mine = [state.read(kind, name) for name in names[rank * chunk : (rank + 1) * chunk]]
            blank = np.zeros_like(state.read(kind, names[0]))
            entries[index][kind] = np.stack(mine + [blank] * (chunk - len(mine)))
        index += len(names)
    return {"state": entries, "param_groups": _numbered(state.groups[0], members, 0)}


def _adam_entries(state: OptimizerState, cfg: GPTConfig, rank: int, ranks: int, step) -> dict[int, dict]:
    entries = {}
    for index, name in enumerate(name for group in adam_groups(cfg) for name in group):
        entries[index] = {"step": step}
        for kind in MOMENTS:
            array = state.read(kind, name)
            if ranks > 1 and (array.size >= SMALL or cfg.arch == "classic"):
                if array.shape[0] % ranks:
                    raise UserError(
                        f"--ranks {ranks} does not divide the {array.shape[0]} rows of {name}; choose another."
                    )
                array = np.split(array, ranks)[rank]
            entries[index][kind] = array
    return entries


def _numbered(groups: list[dict], members: list[list[str]], first: int) -> list[dict]:
    """The groups with the indices of their tensors."""
    if len(groups) != len(members):  # the file came from another number of GPUs: all groups of Muon are alike
        groups = groups[: len(members)] + [groups[-1]] * (len(members) - len(groups))
    out = []
    for group, names in zip(groups, members, strict=True):
        values = {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        out.append(values | {"params": list(range(first, first + len(names)))})
        first += len(names)
    return out


def recipe_name(cfg: GPTConfig) -> str:
    return "muon" if cfg.arch == "classic" else cfg.arch


def fresh_groups(cfg: GPTConfig, opts, rate_scale: float, weight_decay: float) -> list:
    """The hyper-parameters that nanochat would have in its files for a run with these options (a `StageConfig`)."""
    recipe = RECIPES[opts.optimizer]
    torch_only = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
    }
    torch_only |= {"fused": True, "decoupled_weight_decay": True}
    adam = []
    for names in adam_groups(cfg):
        row = recipe.groups[group_of(places(cfg)[names[0]].leaf)]
        rate = base_rate(row, opts, cfg.n_embd, rate_scale) * opts.init_lr_frac
        group = {
            "lr": rate,
            "betas": row.betas or (opts.adam_beta1, opts.adam_beta2),
            "eps": EPSILON,
            "weight_decay": opts.weight_decay if row.decay is None else row.decay,
            "initial_lr": rate,
        }
        adam.append(group | torch_only if is_list(cfg) else {"kind": "adamw"} | group)
    rate = opts.matrix_lr * rate_scale * opts.init_lr_frac
    muon = {"lr": rate, "momentum": 0.95, "ns_steps": 5}
    settings: Muon = recipe.muon
    if settings.beta2:
        muon |= {"beta2": settings.beta2, "weight_decay": weight_decay}
    muon |= {"initial_lr": rate}
    count = len(groups_by_shape(matrices(cfg)))
    if is_list(cfg):
        return [adam, [{**muon, "nesterov": True} for _ in range(count)]]
    return [adam + [{"kind": "muon", **muon} for _ in range(count)]]
