"""Ask a model held-out questions and count the exact answers.

    python -m scripts.chat_eval -i sft                      all kinds, 200 questions each
    python -m scripts.chat_eval -i mid -a 'ledger|facts'    some kinds
    python -m scripts.chat_eval -i sft --seed 7             other questions

Writes artifacts/report/chat_eval_<stage>.json: {kind: {"accuracy", "chance", "n"}}.
"""

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.eval import chat
from megacontext_jax.infer.load import load_engine
from megacontext_jax.paths import report_dir
from megacontext_jax.telemetry import report


def main(argv: list[str]) -> None:
    # --seed means the questions here; the seed of training has no part in an evaluation
    argv = [
        "--eval-seed" + word[len("--seed") :] if word.split("=")[0] == "--seed" else word for word in argv
    ]
    config = parse(argv, doc=__doc__, show=("eval", "run"))
    runtime.start(config.run)
    stage, opts = config.eval.source, config.eval
    engine, model = load_engine(config)
    runtime.print0(f"{model.folder.name} at step {model.step}, questions of seed {opts.eval_seed}")
    results, transcripts = chat.evaluate_kinds(engine, opts)
    for kind, r in results.items():
        runtime.print0(f"{kind:<12} accuracy {r['accuracy']:7.2%}   chance {r['chance']:7.2%}   n {r['n']}")
    chat.write_results(report_dir() / f"chat_eval_{stage}.json", results)
    report.write_section(
        f"chat-evaluation-{stage}",
        f"Chat evaluation {stage}",
        {"model": f"{model.folder.name}, step {model.step}", "seed": opts.eval_seed},
        accuracy=results,
        samples=transcripts,
    )


if __name__ == "__main__":
    run_main(main)
