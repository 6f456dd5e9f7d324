"""Write a run as PyTorch nanochat's files: model, meta, optimiser state, tokenizer.

    python -m scripts.export_nanochat -i base -g d20 --out ~/nanochat-export
    python -m scripts.export_nanochat artifacts/megacontext_sft_d20 --out DIR --ranks 8

DIR is laid out as a nanochat base dir (NANOCHAT_BASE_DIR=DIR); PyTorch nanochat of the model's generation loads it.
"""

import argparse
from pathlib import Path

from megacontext_jax.checkpoints.runs import STAGES, find_run
from megacontext_jax.cli import run_main
from megacontext_jax.interop.transfer import export_checkpoint


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export_nanochat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", nargs="?", type=Path, help="a run's folder (default: the one of --stage and --tag)"
    )
    parser.add_argument("-i", "--stage", default="base", choices=STAGES, help="which stage [base]")
    parser.add_argument("-g", "--tag", help="which run (default: the deepest)")
    parser.add_argument("-s", "--step", type=int, help="which step (default: the latest)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="base dir to write to")
    parser.add_argument(
        "--ranks", type=int, default=1, help="GPUs that will continue: one optimiser file each [1]"
    )
    parser.add_argument(
        "--no-optimizer", dest="optimizer", action="store_false", help="leave the optimiser's state out"
    )
    parser.add_argument(
        "--bf16-embeddings",
        action="store_true",
        help="store embeddings as nanochat does on a GPU (of runs trained here)",
    )
    args = parser.parse_args(argv)
    run = args.run or find_run(args.stage, args.tag)
    done = export_checkpoint(
        run,
        args.out,
        step=args.step,
        ranks=args.ranks,
        optimizer=args.optimizer,
        bf16_embeddings=args.bf16_embeddings,
    )
    for path in done.files:
        print(f"{path.stat().st_size / 1e6:12,.2f} MB  {path}")
    for note in done.notes:
        print(f"Note: {note}")


if __name__ == "__main__":
    run_main(main)
