"""Bring checkpoints of PyTorch nanochat here, of any generation, with their tokenizer and optimiser state.

    python -m scripts.import_nanochat ~/.cache/nanochat          every stage in a base dir, the latest step of each
    python -m scripts.import_nanochat nanochat-d32/ --tag d32    a folder with model_*.pt, meta_*.json, tokenizer.pkl
    python -m scripts.import_nanochat SRC --step 650 --stage sft one step of one stage

They become artifacts/megacontext_<stage>_<tag>/, for chat_cli, chat_eval, base_train (goes on with the same optimiser
state), mid_train and chat_sft. No PyTorch is needed and nothing in the files is executed.
"""

import argparse
import time
from pathlib import Path

from megacontext_jax.cli import run_main
from megacontext_jax.interop.folders import STAGE_FOLDERS, find_checkpoints
from megacontext_jax.interop.transfer import import_checkpoint


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_nanochat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="base dir, checkpoint folder or model_XXXXXX.pt"
    )
    parser.add_argument(
        "-g", "--tag", default="", help="which model of several, or its name (default: the deepest)"
    )
    parser.add_argument("--as", dest="name", default="", help="the tag it gets here (default: its own)")
    parser.add_argument("-s", "--step", type=int, default=-1, help="which step (default: the latest)")
    parser.add_argument(
        "-i", "--stage", default="", choices=tuple(STAGE_FOLDERS), help="which stage (default: each)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of tokenizer.pkl (default: beside the model, or its base dir)"
    )
    parser.add_argument(
        "--era", default="", help="generation 1, 2, 3, 3b, 4 or 5 (default: what the tensors say)"
    )
    parser.add_argument(
        "--softcap", type=float, default=0.0, help="cap of the logits (default: the generation's)"
    )
    parser.add_argument(
        "--no-optimizer", dest="optimizer", action="store_false", help="leave the optimiser's state behind"
    )
    parser.add_argument(
        "--no-place",
        dest="place",
        action="store_false",
        help="continue training at the beginning of the data",
    )
    args = parser.parse_args(argv)
    for found in find_checkpoints(
        args.source, stage=args.stage, tag=args.tag, step=args.step, tokenizer=args.tokenizer
    ):
        started = time.monotonic()
        size = found.model.stat().st_size / 1e6
        print(f"{found.model} ({size:,.1f} MB) ...", flush=True)
        done = import_checkpoint(
            found,
            tag=args.name,
            era=args.era,
            softcap=args.softcap,
            optimizer=args.optimizer,
            place=args.place,
        )
        for note in done.notes:
            print(f"Note: {note}")
        n = done.cfg.num_params()["total"]
        state = f"optimiser state of {done.ranks} GPU(s)" if done.ranks else "no optimiser state"
        print(
            f"  -> {done.folder} step {found.step}: era {done.cfg.arch}, {n:,} parameters, depth {done.cfg.n_layer}, "
            f"soft cap {done.cfg.logit_cap:g}, windows {done.cfg.window_pattern}, {state}; "
            f"{time.monotonic() - started:.1f} s"
        )


if __name__ == "__main__":
    run_main(main)
