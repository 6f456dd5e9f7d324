"""A fact in a long history, asked at its end: does a session still know it?

    python -m scripts.long_history_eval                                       1,000 to 200,000 tokens
    python -m scripts.long_history_eval --history-tokens 1000,1000000 --history-count 4
    python -m scripts.long_history_eval --suite-steps 500                     less training

Trains a tiny model of its own on rows of 256 tokens (minutes on a CPU), then lets sessions read histories of any length in
96 entries and asks for numbers that stood anywhere in them; a sliding window of 96 tokens is asked the same. Writes
artifacts/report/long_history.json and a picture. An interrupted run goes on with the next cell.
"""

from contextlib import ExitStack
from dataclasses import replace

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main, whole_numbers
from megacontext_jax.errors import UserError
from megacontext_jax.paths import report_dir
from megacontext_jax.telemetry import report
from megacontext_jax.telemetry.progress import Progress, format_duration


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("eval", "run"))
    opts = config.eval
    lengths = whole_numbers(opts.history_tokens, "--history-tokens")
    runtime.start(config.run)
    from megacontext_jax.eval.longcontext import histories
    from megacontext_jax.eval.longcontext.models import Size

    if min(lengths) < histories.ROW:
        raise UserError(f"--history-tokens {min(lengths)}: the shortest history is {histories.ROW} tokens.")
    if opts.history_count < 1:
        raise UserError(f"--history-count {opts.history_count} must be at least 1.")
    size, folder = replace(Size(), steps=opts.suite_steps, rows=32), report_dir()
    cells: dict = {}
    bar = ExitStack()  # of the training, if there is any

    def told(step: int, loss) -> None:
        if step == 1:
            bar.progress = bar.enter_context(Progress("training", size.steps, unit="steps"))
        if step % 10 == 0:
            float(loss)  # not further ahead of the device than this
            bar.progress.update(10)
        if step == size.steps:
            bar.close()

    with bar:
        for tokens, depth, found in histories.run(
            size, config.run.seed, lengths, opts.history_count, folder, told
        ):
            cells[tokens, depth] = found
            print(
                f"{tokens:>9,} tokens, fact at {100 * depth:3.0f} %: session {100 * found['session']:5.1f} %, sliding window "
                f"{100 * found['window']:5.1f} %",
                flush=True,
            )
    picture = histories.draw(cells, folder / "long_history.png")
    seconds = histories.read_results(folder)["training_seconds"]
    table = [["tokens", *(f"at {100 * d:.0f} %" for d in histories.DEPTHS), "sliding window"]]
    for tokens in lengths:
        row = [cells[tokens, depth] for depth in histories.DEPTHS]
        window = sum(cell["window"] for cell in row) / len(row)
        table.append(
            [f"{tokens:,}", *(f"{100 * cell['session']:.0f}" for cell in row), f"{100 * window:.0f}"]
        )
    report.write_section(
        "long-history",
        "Long history",
        {
            "what": f"answers to what stood in a history, percent; {histories.BUDGET} entries; chance {100 * histories.CHANCE:.0f}",
            "training": f"{size.steps} steps, {format_duration(seconds)}",
            "seed": config.run.seed,
        },
        summary={},
        table=table,
        pictures=[picture.name],
    )


if __name__ == "__main__":
    run_main(main)
