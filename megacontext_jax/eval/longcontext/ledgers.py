"""The suite for a trained model: a ledger in its own text, all of it asked again in another order at the end of the row.

Rows of T tokens: English, a ledger, the ledger in another order. The last H tokens are judged, at the values alone, under
every way to show what came before; words and sentences are those of the built-in corpus, the rows are new.
"""

import random
import re
from collections.abc import Iterable

import jax
import numpy as np

from megacontext_jax.data.corpus.ledgers import recall
from megacontext_jax.data.corpus.mixture import English
from megacontext_jax.errors import UserError
from megacontext_jax.eval.working_contexts import Views
from megacontext_jax.infer.load import LoadedModel
from megacontext_jax.model.loss import capped_logits

NAME, PAIRS, QUESTIONS, ROWS = "ledger", 24, 256, 32
SHORTEST = 192  # tokens of a row that holds a ledger twice


def evaluate(model: LoadedModel, views: Views | None, horizon: int, seed: int) -> dict[str, float]:
    """{column: accuracy, "chance": y}; without `views` the model's own attention alone (`full`)."""
    T = model.cfg.sequence_len
    if not horizon < T or T < SHORTEST:
        raise UserError(
            f"{model} has rows of {T} tokens, which do not hold a ledger twice ({SHORTEST} tokens) and --mc-horizon {horizon}; "
            "leave -i out, the suite then trains models of its own."
        )
    step = jax.jit(lambda params, batch, key: _hits(model, views, horizon, params, batch, key))
    rows, chance = make_rows(model.tokenizer, T, QUESTIONS, horizon, seed)
    right: dict[str, int] = {}
    for start in range(0, QUESTIONS, ROWS):
        batch = {name: x_NT[start : start + ROWS] for name, x_NT in rows.items()}
        for column, hits in jax.device_get(step(model.params, batch, jax.random.key(start))).items():
            right[column] = right.get(column, 0) + int(hits)
    asked = int((rows["targets"] >= 0).sum())
    return {column: hits / asked for column, hits in right.items()} | {"chance": chance}


def _hits(model: LoadedModel, views: Views | None, H: int, params, batch, key) -> dict:
    """{column: right values of the last H tokens}."""
    if views is None:
        hidden = model.objective.hidden(params, batch["inputs"])
        shown: Iterable = [("full", (hidden[0] if isinstance(hidden, tuple) else hidden)[:, -H:])]
    else:
        raw_RTC = views.objective.base.hidden(params, batch["inputs"])
        views_RHC = [(name, x_RHC) for name, x_RHC, _ in views.ahead(params, batch["inputs"], key)]
        shown = [("full", raw_RTC[:, -H:]), *views_RHC]
    cfg, targets_RH = model.cfg, batch["targets"][:, -H:]
    found = {}
    for name, x_RHC in shown:
        logits_RHV = capped_logits(x_RHC, params["lm_head"], cfg.logit_cap, cfg.vocab_size)
        column = name if name in ("full", "sliding", "gist") else f"gist_lens_{name}"
        found[column] = (logits_RHV.argmax(-1) == targets_RH).sum()
    return found


def make_rows(tokenizer, tokens: int, count: int, horizon: int, seed: int) -> tuple[dict, float]:
    """({"inputs", "targets"} int32 [count, tokens], chance): targets at the values of the last `horizon` tokens, else -1."""
    rng, english = random.Random(f"ledgers/{seed}"), English("val", seed)
    rows, targets, chances = [], [], []
    while len(rows) < count:
        ids, values, chance = _ledger(rng, tokenizer)
        if len(ids) > tokens + 1:
            raise UserError(
                f"A ledger of {PAIRS} pairs takes {len(ids)} tokens with this tokenizer and a row has {tokens}; leave -i out, "
                "the suite then trains models of its own."
            )
        before: list[int] = []
        while len(before) < tokens + 1 - len(ids):
            before = [tokenizer.bos, *tokenizer.encode(english.next()), *before]
        row = np.array([*before, *ids][-(tokens + 1) :], np.int32)
        asked = np.zeros(tokens + 1, bool)
        asked[len(row) - len(ids) + np.array(values)] = True
        asked[: tokens + 1 - horizon] = False
        rows.append(row)
        targets.append(np.where(asked, row, -1))
        chances.append(chance)
    return {"inputs": np.stack(rows)[:, :-1], "targets": np.stack(targets)[:, 1:]}, float(np.mean(chances))


def _ledger(rng: random.Random, tokenizer) -> tuple[list[int], list[int], float]:
    """(tokens of a ledger and of the same in another order, places of the values in the latter, chance)."""
    item = recall(rng, PAIRS, 1)
    pairs = re.findall(r" (\w+) (\w+)(?=[;.])", item.statement)
    ids, values = [tokenizer.bos, *tokenizer.encode(item.statement + " Again:")], []
    for i, (key, value) in enumerate(rng.sample(pairs, len(pairs))):
        ids += tokenizer.encode(f"{';' if i else ''} {key}")
        word = tokenizer.encode(f" {value}")
        values += range(len(ids), len(ids) + len(word))
        ids += word
    return ids, values, 1 / len({value for _, value in pairs})
