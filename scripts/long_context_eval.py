"""The tiny long-context suite: what is still known when the past is shown in gists, and what a lens adds.

    python -m scripts.long_context_eval                          all tasks
    python -m scripts.long_context_eval --tasks 'mqar_4x'        some
    python -m scripts.long_context_eval --seed 1
    python -m scripts.long_context_eval --attention gist         models with gist attention instead
    python -m scripts.long_context_eval -i base --mc             a trained model, asked in its own text

Trains its own tiny models, a learned GistNet and mean pooling for each kind of task, then asks the same questions
under every column: the full context, a sliding window of equal budget, mean gists, learned gists, and learned
gists of which each lens has some expanded. With --attention gist it trains models that see nothing but their own block
as tokens, everything before as gists in every layer, and models with a sliding window of equal budget; _gap is the accuracy
with a million tokens between what was said and what is asked (--gist-gap N trains for that). With -i (and -g, -s) nothing is
trained: a ledger of 24 pairs stands in a row of the model's own length and is asked again at the end, under the same columns with
--mc, otherwise under the model's own attention. Writes artifacts/report/long_context.json:
{task: {column: accuracy, "chance": y}}. An interrupted run goes on after the last finished task.
"""

from dataclasses import replace

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.errors import UserError
from megacontext_jax.paths import report_dir
from megacontext_jax.telemetry import report


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("eval", "run", "mc"))
    if "eval.source" in config.given:
        return of_checkpoint(config)
    if config.model.attention == "sliding":
        raise UserError("--attention sliding is a column of --attention gist; use that.")
    if config.model.attention != "gist" and config.given & {"model.gist_gap", "model.rope_share"}:
        raise UserError(
            "--gist-gap and --rope-share are for models with gist attention; add --attention gist."
        )
    runtime.start(config.run)
    from megacontext_jax.eval.longcontext import suite
    from megacontext_jax.eval.longcontext.models import Size

    size = replace(
        Size(), steps=config.eval.suite_steps, gap=config.model.gist_gap, rope_share=config.model.rope_share
    )
    tasks = suite.choose(config.eval.tasks)
    run = suite.run_rows if config.model.attention == "gist" else suite.run
    results = run(tasks, size, config.run.seed, report_dir())
    notes = suite.read_notes(report_dir())
    about = {
        "what": "accuracy in percent; entries: gists alone / with the budget for expansion",
        "seed": config.run.seed,
        "steps per model": size.steps,
    }
    pictures = [notes[name]["picture"] for name in results if "picture" in notes[name]]
    tell("long-context", "Long context", about, suite.table(results, notes), pictures)


def of_checkpoint(config) -> None:
    """The model of -i, -g and -s, asked in its own text."""
    if config.eval.tasks:
        raise UserError("--tasks are for the suite's own models; a trained model (-i) is asked for a ledger.")
    runtime.start(config.run)
    from megacontext_jax.eval.longcontext import ledgers, suite
    from megacontext_jax.eval.working_contexts import BASELINES, views_of
    from megacontext_jax.infer.load import load_model

    model = load_model(config)
    views = views_of(config, model.context, lenses=BASELINES) if model.context else None
    found = ledgers.evaluate(model, views, config.mc.mc_horizon, config.run.seed)
    about = {"model": str(model), "tokens of a row": model.cfg.sequence_len, "seed": config.run.seed}
    notes = {"tokens": model.cfg.sequence_len, "model": str(model), "seed": config.run.seed}
    if views:
        about["entries"], notes["entries"] = views.budget, {"budget": views.budget}
    suite.Book(report_dir(), about).enter_alone(ledgers.NAME, found, notes)
    rows = suite.table({ledgers.NAME: found}, {ledgers.NAME: notes})
    tell("long-context-model", "Long context, the trained model", about, rows, [])


def tell(slug: str, title: str, about: dict, rows: list[list[str]], pictures: list[str]) -> None:
    """Prints a table and puts it into the report."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    report.write_section(slug, title, about, summary={}, table=rows, pictures=pictures)


if __name__ == "__main__":
    run_main(main)
