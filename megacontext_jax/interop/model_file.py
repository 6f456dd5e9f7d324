"""A model of PyTorch nanochat, `model_XXXXXX.pt` with `meta_XXXXXX.json`: read into our parameters and written."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from megacontext_jax.errors import UserError
from megacontext_jax.interop.names import (
    PREFIX,
    era_named,
    era_of,
    has_vocabulary_rows,
    listed,
    places,
    shape_of,
)
from megacontext_jax.interop.torch_file import StoredTensor, TorchFile
from megacontext_jax.model.arch import ARCHS, GPTConfig

CONFIG_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
_REQUIRED = CONFIG_KEYS[:-1]
_LARGEST = {"sequence_len": 2**24, "vocab_size": 2**24, "n_layer": 2**12, "n_embd": 2**17}
BF16 = np.dtype(ml_dtypes.bfloat16)
_LOADABLE = (np.dtype(np.float32), BF16, np.dtype(np.float16))


@dataclass(frozen=True)
class Origin:
    """What a file holds besides values, so that it can be written back as it was."""

    dtypes: dict[str, str]  # of the tensors that are not float32
    vocab_rows: int  # rows of the embeddings and the head in the file
    prefix: str  # before every name

    def to_dict(self) -> dict:
        return {"dtypes": self.dtypes, "vocab_rows": self.vocab_rows, "prefix": self.prefix}


@dataclass(frozen=True)
class NanochatModel:
    cfg: GPTConfig
    params: dict  # numpy, float32, shaped like `cfg.param_shapes()`
    origin: Origin
    notes: list[str]  # what the files could not tell


def read_meta_file(path: Path) -> dict:
    """The content of a `meta_XXXXXX.json`. Raises UserError naming the file and what is wrong with it."""
    try:
        meta = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a model file cannot be read without its meta file.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again.") from None
    config = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path} has no 'model_config'; it is not a meta file of nanochat.")
    for key in _REQUIRED:
        value = config.get(key)
        if type(value) is not int or not 0 < value <= _LARGEST.get(key, 2**17):
            raise UserError(
                f"{path} has model_config.{key} = {value!r}, which is no model; restore the file."
            )
    return meta


def config_of(
    meta: Mapping, shapes: Mapping[str, tuple[int, ...]], era: str = "", softcap: float = 0.0
) -> GPTConfig:
    """The model that a meta file and the shapes of a state dict describe."""
    config = {key: value for key, value in meta["model_config"].items() if key in CONFIG_KEYS}
    unknown = set(meta["model_config"]) - set(CONFIG_KEYS)
    if unknown:
        raise UserError(
            f"The model has settings that nanochat does not ({listed(unknown)}); it is of a fork that is not known here."
        )
    arch = era_named(era) if era else era_of(shapes)
    cap = 0.0 if softcap in (0.0, ARCHS[arch].softcap) else softcap
    return GPTConfig(arch=arch, **({"window_pattern": "L"} | config), softcap=cap)


def read_model(path: Path, meta: Mapping, *, era: str = "", softcap: float = 0.0) -> NanochatModel:
    """Parameters of a model file. `era` and `softcap` overrule what the names in the file say.

    Every name and shape is checked before anything large is read. Raises UserError that names what is wrong.
    """
    with TorchFile(path) as file:
        tensors, prefix = _state_dict(file)
        cfg = config_of(meta, {name: t.shape for name, t in tensors.items()}, era, softcap)
        rows = _check(path, cfg, tensors)
        params = empty_params(cfg, rows)
        wanted = places(cfg)

        def read(name: str) -> None:
            target = wanted[name].pick(params)
            part = target[:rows] if has_vocabulary_rows(wanted[name]) else target
            tensors[name].read(out=part)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, wanted))
    notes = []
    if cfg.arch == "era3" and not era and not softcap:
        notes.append(
            "The file is of era3 (soft cap 15) or era3b (20, nanochat of 2 to 9 March 2026) and does not say which; "
            "era3 is taken, --softcap 20 takes the other."
        )
    dtypes = {name: t.dtype.name for name, t in tensors.items() if t.dtype != np.float32}
    return NanochatModel(cfg, params, Origin(dtypes, rows, prefix), notes)


def empty_params(cfg: GPTConfig, rows: int | None = None) -> dict:
    """Arrays for the parameters; only vocabulary rows beyond `rows` are filled (with zeros)."""

    def make(name: str, shape):
        if isinstance(shape, dict):
            return {key: make(key, inner) for key, inner in shape.items()}
        padded = rows is not None and rows < cfg.padded_vocab_size
        return (np.zeros if padded else np.empty)(shape, np.float32)

    return make("", cfg.param_shapes())


def state_dict(cfg: GPTConfig, params, origin: Origin | None = None) -> dict[str, np.ndarray]:
    """nanochat's state dict of our parameters: names, order, dtypes and rows as in the file they came from."""
    origin = origin or Origin({}, cfg.padded_vocab_size, "")
    out = {}
    for name, place in places(cfg).items():
        array = np.asarray(place.pick(params))
        array = array[: origin.vocab_rows] if has_vocabulary_rows(place) else array
        out[origin.prefix + name] = array.astype(
            np.dtype(_named_dtype(origin.dtypes.get(name, "float32"))), copy=False
        )
    return out


def _named_dtype(name: str) -> np.dtype:
    return BF16 if name == "bfloat16" else np.dtype(name)


def _state_dict(file: TorchFile) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a state dict without the prefix of torch.compile, and that prefix."""
    tree = file.tree
    if not isinstance(tree, dict) or not all(
        isinstance(name, str) and isinstance(t, StoredTensor) for name, t in tree.items()
    ):
        raise UserError(f"{file.path} holds no state dict (names of tensors); it is not a model of nanochat.")
    prefix = PREFIX if tree and all(name.startswith(PREFIX) for name in tree) else ""
    return {name.removeprefix(prefix): t for name, t in tree.items()}, prefix


def _check(path: Path, cfg: GPTConfig, tensors: Mapping[str, StoredTensor]) -> int:
    """Names, shapes and dtypes against the configuration; returns the rows of the vocabulary in the file."""
    wanted = places(cfg)
    missing, foreign = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or foreign:
        parts = [f"lacks {listed(missing)}"] * bool(missing) + [f"has {listed(foreign)} besides"] * bool(
            foreign
        )
        raise UserError(
            f"{path} is taken for a model of era {cfg.arch} and {' and '.join(parts)}; name its generation with --era, "
            "or take the meta file that belongs to it."
        )
    head = tensors["lm_head.weight"].shape
    rows = head[0] if head else 0
    if not cfg.vocab_size <= rows <= cfg.padded_vocab_size:
        raise UserError(
            f"{path} has {rows} rows in its head for a vocabulary of {cfg.vocab_size} (at most {cfg.padded_vocab_size} "
            "are expected); take the meta file that belongs to it."
        )
    for name, place in wanted.items():
        shape = shape_of(cfg, place)
        shape = (rows, *shape[1:]) if has_vocabulary_rows(place) else shape
        if tensors[name].shape != shape:
            raise UserError(
                f"{path} has {name} of shape {list(tensors[name].shape)} where the meta file asks for {list(shape)}; "
                "take the meta file that belongs to it."
            )
        if tensors[name].dtype not in _LOADABLE:
            raise UserError(
                f"{path} has {name} in {tensors[name].dtype.name}; known are float32, bfloat16 and float16."
            )
    return rows
