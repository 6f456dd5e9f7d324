"""Held-out questions, answered in batches and counted: accuracy of each kind beside chance."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO

from megacontext_jax.errors import UserError
from megacontext_jax.eval.tasks import TASKS, Example, make, score
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.text import answer_text
from megacontext_jax.telemetry.progress import Progress

Results = dict[str, dict[str, float | int]]  # {kind: {"accuracy", "chance", "n"}}
Transcripts = list[dict[str, str]]  # [{"kind", "prompt", "completion", "answer"}]


class EvalOptions(Protocol):
    """What `evaluate_kinds` reads of the configuration."""

    tasks: str  # names joined by |, empty = all
    num_examples: int  # per kind
    eval_seed: int
    eval_batch_size: int
    max_new_tokens: int


def evaluate_kinds(engine: Engine, options: EvalOptions) -> tuple[Results, Transcripts]:
    """Draws the questions and asks them. Raises UserError for a kind that does not exist."""
    kinds = [kind.strip() for kind in options.tasks.split("|") if kind.strip()] or list(TASKS)
    examples = [x for kind in kinds for x in make(kind, options.num_examples, options.eval_seed)]
    return evaluate_tasks(
        engine, examples, batch_size=options.eval_batch_size, max_new_tokens=options.max_new_tokens
    )


def evaluate_tasks(
    engine: Engine,
    examples: Sequence[Example],
    *,
    batch_size: int = 50,
    max_new_tokens: int = 32,
    transcripts_per_kind: int = 2,
    stream: TextIO | None = None,
) -> tuple[Results, Transcripts]:
    """Asks every question greedily and compares whole answers.

    Prompts of different lengths share a batch; the longest come first, so that few shapes are compiled and
    memory runs out at the start if at all. A question that leaves no room for an answer in the window counts
    as wrong, and its kind then carries the number of such questions as "too_long".

    Returns the results by kind, in the order of `examples`, and the first transcripts of each kind.
    """
    if batch_size < 1:
        raise UserError(f"--eval-batch-size {batch_size} must be at least 1.")
    tokenizer = engine.tokenizer
    prompts = [tokenizer.render_for_completion(example.conversation()) for example in examples]
    askable = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.window]
    askable.sort(key=lambda i: -len(prompts[i]))
    completions: dict[int, str] = {}
    with Progress("chat eval", len(askable), unit="questions", stream=stream) as progress:
        for start in range(0, len(askable), batch_size):
            chosen = askable[start : start + batch_size]
            rows, _ = engine.generate_batch(
                [prompts[i] for i in chosen],
                max_tokens=max_new_tokens,
                temperature=0.0,
                pad_rows=min(batch_size, len(askable)),
            )
            for i, row in zip(chosen, rows, strict=True):
                completions[i] = answer_text(row[len(prompts[i]) :], tokenizer)
            progress.update(len(chosen))
    return _results(examples, completions), _transcripts(examples, completions, transcripts_per_kind)


def _results(examples: Sequence[Example], completions: Mapping[int, str]) -> Results:
    results: Results = {}
    for kind in dict.fromkeys(example.kind for example in examples):
        of_kind = [(i, example) for i, example in enumerate(examples) if example.kind == kind]
        right = sum(i in completions and score(kind, completions[i], x.answer) for i, x in of_kind)
        n = len(of_kind)
        results[kind] = {"accuracy": right / n, "chance": sum(x.chance for _, x in of_kind) / n, "n": n}
        if too_long := sum(i not in completions for i, _ in of_kind):
            results[kind]["too_long"] = too_long
    return results


def _transcripts(examples: Sequence[Example], completions: Mapping[int, str], per_kind: int) -> Transcripts:
    transcripts, count = [], dict.fromkeys((example.kind for example in examples), 0)
    for i, example in enumerate(examples):
        if i in completions and count[example.kind] < per_kind:
            count[example.kind] += 1
            transcripts.append(
                {
                    "kind": example.kind,
                    "prompt": example.prompt,
                    "completion": completions[i],
                    "answer": example.answer,
                }
            )
    return transcripts
