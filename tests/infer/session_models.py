"""Tiny models of every kind that can hold a conversation, and what whole sequences say in their place."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.context.allocator import AllocatorConfig
from megacontext_jax.context.layout import Layout
from megacontext_jax.context.tree import gist_levels
from megacontext_jax.infer.chat_model import ChatModel, session_rows
from megacontext_jax.infer.focus_programs import FocusConfig
from megacontext_jax.infer.gist_model import gist_model
from megacontext_jax.infer.model import GPTDecoder, Model, gpt_model, prepare_params
from megacontext_jax.model import gpt
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.loss import capped_logits
from tests.context.test_gist_rows import CFG, _moved, rows_objective
from tests.context.test_objective import K, objective_of, params_of
from tests.infer import mocks

TOK = mocks.tokenizer()
VOCAB = TOK.vocab_size
LONGEST = 1024  # tokens of a session with gist attention
BUDGET, RECENT, MAX_LEVEL = 24, 6, 12


def focus_chat(
    arch: str = "pocket", lens: str = "random", positions: str = "gaussian", **options
) -> ChatModel:
    """Flat working contexts, edited wherever they can be."""
    objective = objective_of(arch)
    base = replace(objective.base, cfg=replace(objective.cfg, vocab_size=VOCAB))
    context = replace(objective.context, positions=positions)
    objective = replace(objective, base=base, context=context)
    params = params_of(objective)
    allocator = AllocatorConfig(
        block=K,
        max_level=MAX_LEVEL,
        recent=RECENT,
        expand_threshold=-1.0,
        collapse_threshold=-1.0,
        hysteresis=-2.0,
    )
    decoder = GPTDecoder(objective.cfg, objective.base.attention.fn)
    options = {"interval": 8, "recompute": 8.0} | options
    cfg = FocusConfig(decoder, objective, allocator, BUDGET, lens, **options)
    model = Model(decoder, prepare_params(params, np.dtype("float32")))
    return ChatModel(TOK, "tiny, step 1", model, cfg, params)


def rows_chat(arch: str = "pocket") -> ChatModel:
    """Gist attention."""
    return trained_rows(arch)[0]


def trained_rows(arch: str = "pocket", **pattern):
    """A conversation model of gist attention, and its objective and parameters in training."""
    objective = rows_objective(replace(CFG, arch=arch, vocab_size=VOCAB, gist_window=8, **pattern))
    params = _moved(objective.init(jax.random.key(0)))
    chat = ChatModel(TOK, "tiny, step 1", gist_model(params, session_rows(objective, LONGEST)))
    return chat, objective, params


def plain_chat(window: int = 96) -> ChatModel:
    cfg = GPTConfig("pocket", window, VOCAB, 2, n_head=2, n_kv_head=2, n_embd=32)
    return ChatModel(TOK, "tiny, step 1", gpt_model(_moved(gpt.init_params(cfg, jax.random.key(0))), cfg))


@partial(jax.jit, static_argnames="objective")
def focus_logits(objective, params, ids_1T, layout: Layout):
    """Logits after the last entry, from the training pass over the working context as a whole."""
    e_1TC = gpt.embed(params, ids_1T, jnp.float32)
    tables = gist_levels(params, objective.context.gist, MAX_LEVEL, e_1TC)
    x_1WC = objective.hidden(params, tables, ids_1T, layout)
    last_11C = jnp.take_along_axis(x_1WC, layout.count_B[:, None, None] - 1, axis=1)
    return capped_logits(last_11C, params["lm_head"], objective.cfg.logit_cap, VOCAB)[:, 0]


def whole_focus_logits(chat: ChatModel, session, longest: int) -> np.ndarray:
    memory = session.memory
    ids_1T = np.zeros((1, longest), np.int32)
    ids_1T[0, : len(session)] = session.tree.tokens()
    places = chat.focus.places
    level, node = (np.pad(x, (0, places - len(x)))[None] for x in (memory._level, memory._node))
    valid = (np.arange(places) < len(memory._level))[None]
    layout = Layout(jnp.asarray(level), jnp.asarray(node), jnp.asarray(valid))
    return np.asarray(focus_logits(chat.focus.objective, chat.params, ids_1T, layout))
