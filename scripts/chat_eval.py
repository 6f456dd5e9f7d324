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
from megacontext_jax.telemetry import report


def main(argv: list[str]) -> None:
    # here --seed means the questions and -m their answers; training's seed and chat's length play no part
    meaning = {"--seed": "--eval-seed", "-m": "--max-new-tokens"}
    argv = [meaning.get(head := word.split("=")[0], head) + word[len(head) :] for word in argv]
    config = parse(argv, doc=__doc__, show=("eval", "run"))
    runtime.start(config.run)
    opts = config.eval
    engine, model = load_engine(config)
    print(f"{model}, {opts.num_examples} questions of each kind, seed {opts.eval_seed}")
    results, transcripts = chat.evaluate_kinds(engine, opts)
    for kind, r in results.items():
        print(f"{kind:<12} accuracy {r['accuracy']:7.2%}   chance {r['chance']:7.2%}   n {r['n']}")
    path = report.write_chat_eval(
        opts.source,
        results,
        {"model": str(model), "seed": opts.eval_seed},
        run=f"{model}, seed {opts.eval_seed}",
        samples=transcripts,
    )
    print(f"Wrote {path}")


if __name__ == "__main__":
    run_main(main)
