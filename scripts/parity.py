"""Compare a checkpoint's numbers with PyTorch nanochat's: a table, and a status that is not 0 past the tolerance.

    python -m scripts.parity CHECKPOINT --expect io.npz          against stored arrays
    python -m scripts.parity CHECKPOINT --torch-module DIR       against a checkout of nanochat, run beside (needs torch)
    python -m scripts.parity CHECKPOINT --save ours.npz          write ours, for a comparison elsewhere

CHECKPOINT is nanochat's (a folder with model_*.pt and meta_*.json, or the model file) or ours (artifacts/megacontext_...).
Arrays in an .npz: input_ids, targets [B, T], logits [B, T, V], loss, loss_none, block_out_first_tok_last_tok [L, 2, C],
param_names, grad_norms; all but input_ids may be missing. Tokens come from --expect, --tokens or a seed.
"""

import argparse
from pathlib import Path

import numpy as np

from megacontext_jax.cli import run_main
from megacontext_jax.config import RunConfig
from megacontext_jax.errors import UserError
from megacontext_jax.files import atomic_path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--expect", type=Path, metavar="FILE.npz", help="reference arrays")
    parser.add_argument(
        "--torch-module", type=Path, metavar="DIR", help="checkout of PyTorch nanochat to run beside ours"
    )
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="write our arrays")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="input_ids (and targets) to run on")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens [0]")
    parser.add_argument("--rows", type=int, default=2, help="rows of random tokens [2]")
    parser.add_argument(
        "--length", type=int, default=0, help="tokens per row [the model's window, at most 256]"
    )
    parser.add_argument("-s", "--step", type=int, default=-1, help="which step (default: the latest)")
    parser.add_argument(
        "--era", default="", help="generation 1, 2, 3, 3b, 4 or 5 (default: what the tensors say)"
    )
    parser.add_argument(
        "--softcap", type=float, default=0.0, help="cap of the logits (default: the generation's)"
    )
    parser.add_argument(
        "--compute-dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]"
    )
    parser.add_argument(
        "--attention-impl", default="auto", help="auto, blocked, cudnn, xla or reference [auto]"
    )
    parser.add_argument("--platform", default="", choices=("", "cpu", "gpu"), help="default: what JAX finds")
    parser.add_argument("--tolerance", type=float, help="largest difference of logits [2e-5, bfloat16 0.25]")
    args = parser.parse_args(argv)
    if not (args.expect or args.torch_module or args.save):
        raise UserError(
            "Nothing to compare with: give --expect FILE.npz, --torch-module DIR or --save FILE.npz."
        )

    from dataclasses import replace

    import jax

    from megacontext_jax import runtime
    from megacontext_jax.interop import parity
    from megacontext_jax.interop.torch_module import torch_arrays
    from megacontext_jax.model.objective import make_objective

    runtime.start(RunConfig(platform=args.platform))
    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU's float32 products would be TF32
    model = parity.open_model(args.checkpoint, era=args.era, softcap=args.softcap, step=args.step)
    for note in model.notes:
        print(f"Note: {note}")
    cfg = model.cfg
    length = args.length or min(cfg.sequence_len, 256)
    given = parity.random_tokens(cfg, args.rows, length, args.seed)
    if args.expect or args.tokens:
        given = parity.read_arrays(args.expect or args.tokens)
    references = {}
    if args.expect:
        references[str(args.expect)] = given
    if args.torch_module:
        references[f"PyTorch in {args.torch_module}"] = beside = torch_arrays(args.torch_module, model, given)
        given = beside | given
    objective = make_objective(cfg, attention_impl=args.attention_impl, dtype=args.compute_dtype)
    print(
        f"{model.name}: era {cfg.arch}, depth {cfg.n_layer}, width {cfg.n_embd}, windows {cfg.window_pattern}, soft cap "
        f"{cfg.logit_cap:g}; {jax.devices()[0].device_kind}, {args.compute_dtype}, attention {objective.attention.name}"
    )
    tolerance = parity.BFLOAT16 if args.compute_dtype == "bfloat16" else parity.FLOAT32
    if args.tolerance is not None:
        tolerance = replace(tolerance, logits=args.tolerance)
    ours = parity.our_arrays(model, given, objective, gradients=tolerance.grad is not None)
    passed = True
    for name, theirs in references.items():
        rows = parity.compare(ours, theirs, tolerance)
        print(f"\nOurs beside {name}:\n{parity.table(rows)}")
        if left := parity.left_out(theirs):
            print(f"Not compared: {', '.join(left)}.")
        passed = passed and all(row.passed for row in rows)
    if args.save:
        with atomic_path(args.save) as scratch, open(scratch, "wb") as file:
            np.savez_compressed(file, **ours)
        print(f"\nWrote {args.save}")
    if references:
        print("\nAll within the tolerances." if passed else "\nToo far apart: see the rows marked above.")
    return 0 if passed else 1


if __name__ == "__main__":
    run_main(main)
