"""A trained model that holds conversations: makes sessions of its kind, all sharing weights and compiled programs."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from megacontext_jax.context import gistnet
from megacontext_jax.context.gist_rows import GistRows
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.positions import LONGEST
from megacontext_jax.context.store import create_store, open_store
from megacontext_jax.errors import UserError
from megacontext_jax.files import remove_stale_scratch, scratch_path
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.focus_memory import FocusMemory
from megacontext_jax.infer.focus_programs import FocusConfig
from megacontext_jax.infer.gist_model import GistDecoder
from megacontext_jax.infer.memory import Memory, TokenMemory
from megacontext_jax.infer.model import Model
from megacontext_jax.infer.session import ABOUT, TREE, About, Session
from megacontext_jax.model import gpt
from megacontext_jax.telemetry.otel import open_otel

WEIGHTS_SAMPLE = 4096  # numbers of each array that tell one training from another
Event = Callable[[str, dict[str, Any], str], None]  # name, fields, session_id


def levels_for(block: int, tokens: int = LONGEST) -> int:
    """Levels above the tokens with which a history of `tokens` tokens ends in at most `block` entries of the last."""
    level, span = 1, block
    while span * block < tokens:
        level, span = level + 1, span * block
    return level


def session_rows(objective: GistRows, tokens: int = LONGEST) -> GistRows:
    """The same model with levels for a history of `tokens` tokens: the same function in rows as long as those of training."""
    cfg = objective.cfg
    spec = cfg.gist_spec.deeper(levels_for(cfg.gist_block, tokens), cfg.sequence_len)
    cfg = replace(cfg, gist_levels=spec.levels, gist_mid_spans=spec.mid_spans, sequence_len=tokens)
    return replace(objective, base=replace(objective.base, cfg=cfg))


@dataclass(frozen=True)
class ChatModel:
    """`focus` is there for a model of --mc; otherwise `model` reads every token."""

    tokenizer: object
    name: str  # run and step
    model: Model
    focus: FocusConfig | None = None
    params: dict | None = None  # with `focus`: GistNet, LensNet and the embeddings, as in training
    event: Event | None = None  # is told of what working contexts do

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)

    @property
    def kind(self) -> str:
        if self.focus:
            return "working context"
        return "gist attention" if isinstance(self.model.decoder, GistDecoder) else "plain"

    @cached_property
    def about(self) -> About:
        weights = digest(self.model.params, sample=WEIGHTS_SAMPLE)
        return About(f"{self.name}, {self.kind}", weights, self.tokenizer.digest)

    def memory(self) -> Memory:
        if self.focus is None:
            return TokenMemory(self.model)
        parts = {"decode": self.model.params, "train": self.params}
        if self.event is None:
            return FocusMemory(self.focus, parts)
        return FocusMemory(self.focus, parts, partial(self.event, session_id=f"infer_{secrets.token_hex(6)}"))

    @contextmanager
    def watched(self) -> Iterator["ChatModel"]:
        """The same model, whose refocuses go to OpenTelemetry where MC_OTEL_ENDPOINT asks for that."""
        sink = open_otel("megacontext-chat", self.name)
        if sink is None:
            yield self
            return
        try:
            yield replace(self, event=sink.event)
        finally:
            sink.close()

    def new_session(self, folder: Path | str | None = None) -> Session:
        """An empty conversation, in memory or in a new folder."""
        if folder is None:
            return Session(self.engine, self.memory(), create_store("ram", **self._tree))
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(
                f"{folder} exists and is no session; choose another folder, this one is left alone."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_scratch(folder.parent, folder.name)
        scratch = scratch_path(folder)
        scratch.mkdir()
        create_store("disk", scratch / TREE, **self._tree).close()
        self.about.write(scratch)
        scratch.replace(folder)  # complete, or not there
        return self.open_session(folder)

    def open_session(self, folder: Path | str, say: Callable[[str], None] = print) -> Session:
        """The conversation in a folder, as far as it was acknowledged. UserError if it is another model's."""
        folder = Path(folder)
        found = About.read(folder)
        if found != self.about:
            own = self.about
            whose = found.model
            if found.model == own.model:
                other = (
                    "with other weights or precision"
                    if found.weights != own.weights
                    else "with another tokenizer"
                )
                whose = f"this model {other}"
            raise UserError(
                f"{folder} is a conversation with {whose}, and this is {own.model}; choose that model, or another "
                "folder."
            )
        options = {
            k: v for k, v in self._tree.items() if k in ("gistnet", "encode", "embed", "block", "width")
        }
        tree = open_store(folder / TREE, say=say, gists=False, **options)  # the memory completes them
        session = Session(self.engine, self.memory(), tree, folder)
        session.restore(say)
        return session

    def session(self, folder: Path | str | None, say: Callable[[str], None] = print) -> Session:
        """The conversation of a folder, begun if there is none; without a folder one in memory."""
        if folder is None or not (Path(folder) / ABOUT).exists():
            return self.new_session(folder)
        return self.open_session(folder, say)

    def start_over(self, folder: Path | str | None) -> tuple[Session, Path | None]:
        """An empty conversation in place of the one of a folder, which must be closed; (session, where the old one is now)."""
        if folder is None:
            return self.new_session(), None
        folder = Path(folder)
        kept = next(path for i in count(1) if not (path := folder.with_name(f"{folder.name}.{i}")).exists())
        folder.rename(kept)
        return self.new_session(folder), kept

    @cached_property
    def _tree(self) -> dict:
        """How the tree of a session is made."""
        if self.focus is None:  # tokens alone
            nothing = {"encode": None, "embed": None}
            return {"block": 2, "width": 1, "gistnet": "none", "max_levels": 0, **nothing}
        return tree_options(self.focus.objective, self.params, self.focus.allocator.max_level)


def tree_options(objective: ContextObjective, params: dict, levels: int) -> dict:
    """Block, width, encoder and identity of the trees of a model trained with --mc."""
    block, width = objective.context.block, objective.cfg.n_embd
    aux = objective.aux_dtype or objective.base.dtype

    @jax.jit
    def embed(params, ids_n):
        e_NKC = gpt.embed(params, ids_n, objective.base.dtype).reshape(-1, block, width)
        return gpt.smear(params, e_NKC, gpt.shift_right(e_NKC)).reshape(-1, width)

    prepared = gistnet.prepare(params["gistnet"])

    @jax.jit
    def encode(prepared, x_NKC):
        gists_NC = gistnet.encode(prepared, objective.context.gist, x_NKC.astype(aux))
        return gists_NC.astype(objective.base.dtype).astype("float32")

    return {
        "block": block,
        "width": width,
        "gistnet": digest(params, ("gistnet", "wte", "smear_gate", "smear_lambda")),  # what makes its gists
        "max_levels": levels,
        "embed": lambda ids_n: embed(params, ids_n.astype(np.int32)),
        "encode": lambda x_NKC: encode(prepared, x_NKC),
    }


def digest(params: dict | None, names: tuple[str, ...] | None = None, sample: int | None = None) -> str:
    """Identity of the parameters, or of these parts of them that are there; of `sample` numbers of each array."""
    hasher = xxhash.xxh3_128()
    parts = {name: x for name, x in (params or {}).items() if names is None or name in names}
    for path, leaf in jax.tree.leaves_with_path(parts):
        values = np.asarray(jax.device_get(leaf)).reshape(-1)
        values = values[:: max(1, len(values) // sample)] if sample else values
        hasher.update(jax.tree_util.keystr(path).encode())
        hasher.update(np.ascontiguousarray(values).tobytes())
    return hasher.hexdigest()
