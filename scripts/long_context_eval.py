"""The tiny long-context suite: what is still known when the past is shown in gists, and what a lens adds.

    python -m scripts.long_context_eval                          all tasks
    python -m scripts.long_context_eval --tasks 'mqar_4x'        some
    python -m scripts.long_context_eval --seed 1
    python -m scripts.long_context_eval --attention gist         models with gist attention instead

Trains its own tiny models, a learned GistNet and mean pooling for each kind of task, then asks the same questions
under every column: the full context, a sliding window of equal budget, mean gists, learned gists, and learned
gists of which each lens has some expanded. With --attention gist it trains models that see nothing but their own block
as tokens, everything before as gists in every layer, and models with a sliding window of equal budget. Writes artifacts/report/long_context.json:
{task: {column: accuracy, "chance": y}}. An interrupted run goes on after the last finished task.
"""

from dataclasses import replace

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.errors import UserError
from megacontext_jax.paths import report_dir
from megacontext_jax.telemetry import report


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("eval", "run"))
    if config.model.attention == "sliding":
        raise UserError("--attention sliding is a column of --attention gist; use that.")
    runtime.start(config.run)
    from megacontext_jax.eval.longcontext import suite
    from megacontext_jax.eval.longcontext.models import Size

    size = replace(Size(), steps=config.eval.suite_steps)
    tasks = suite.choose(config.eval.tasks)
    run = suite.run_rows if config.model.attention == "gist" else suite.run
    results = run(tasks, size, config.run.seed, report_dir())
    notes = suite.read_notes(report_dir())
    rows = suite.table(results, notes)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    pictures = [notes[name]["picture"] for name in results if "picture" in notes[name]]
    report.write_section(
        "long-context",
        "Long context",
        {
            "what": "accuracy in percent; entries: gists alone / with the budget for expansion",
            "seed": config.run.seed,
            "steps per model": size.steps,
        },
        summary={},
        table=rows,
        pictures=pictures,
    )


if __name__ == "__main__":
    run_main(main)
