"""What a model says while it is trained: held-out beginnings continued, held-out questions answered."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from megacontext_jax.data.rowgroups import iter_texts
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.load import decoding_model

COUNT = 4
BEGINNING = 24  # tokens of a document
LONGEST = 32  # tokens of a sample


def document_prompts(paths: Sequence[Path], tokenizer) -> list[list[int]]:
    """The first tokens of the first documents."""
    texts = islice(iter_texts(paths, max_chars=None, doc_cap=2000), COUNT)
    return [[tokenizer.bos, *tokenizer.encode(text)[:BEGINNING]] for text in texts]


def chat_prompts(source, tokenizer) -> list[list[int]]:
    """The first conversations up to their first answer."""
    conversations = [source[i] for i in range(min(COUNT, len(source)))]
    prompts = []
    for conversation in conversations:
        messages = list(conversation["messages"])
        asked = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        prompts.append(tokenizer.render_for_completion({"messages": messages[: asked + 1]}))
    return prompts


def draw_samples(objective, tokenizer, prompts: list[list[int]], params) -> list[dict]:
    """Greedy continuations [{"prompt", "completion"}]; prompts that do not fit the window are passed over."""
    window = objective.cfg.sequence_len
    prompts = [p for p in prompts if len(p) < window]
    if not prompts:
        return []
    local = (
        jax.tree.map(np.asarray, params) if jax.process_count() == 1 and jax.device_count() > 1 else params
    )
    engine = Engine(decoding_model(local, objective), tokenizer)
    rows, _ = engine.generate_batch(prompts, max_tokens=LONGEST, temperature=0.0)
    return [
        {"prompt": tokenizer.decode(p), "completion": tokenizer.decode(row[len(p) :])}
        for p, row in zip(prompts, rows, strict=True)
    ]
