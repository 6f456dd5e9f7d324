"""`python -m megacontext_jax.data.corpus --out DIR`: writes the built-in corpus and prints what it holds."""

import argparse
import json
import sys
import time

from megacontext_jax.data.corpus.build import MANIFEST, build
from megacontext_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megacontext_jax.data.corpus", description=__doc__)
    parser.add_argument(
        "--out", required=True, help="folder for the corpus (a sub-folder per set of arguments)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain-mchars", type=float, default=20.0, help="million characters of documents")
    parser.add_argument("--mid-conversations", type=int, default=44_000)
    parser.add_argument("--sft-conversations", type=int, default=16_000)
    parser.add_argument("--max-doc-tokens", type=int, default=20_000)
    args = vars(parser.parse_args(argv))
    started = time.perf_counter()
    try:
        folder = build(args.pop("out"), **args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = json.loads((folder / MANIFEST).read_text())["files"]
    print(f"{folder} ({time.perf_counter() - started:.1f} s)")
    for stage in ("pretrain", "mid", "sft"):
        rows: dict[str, list[int]] = {}
        for name, facts in files.items():
            if name.startswith(stage):
                for kind, n in facts["documents"].items():
                    row = rows.setdefault(kind, [0, 0])
                    row[0] += n
                    row[1] += facts["characters_by_kind"][kind]
        total = sum(chars for _, chars in rows.values())
        print(f"\n{stage:<12}{'documents':>12}{'characters':>14}{'share':>8}")
        for kind, (n, chars) in sorted(rows.items(), key=lambda row: -row[1][1]):
            print(f"{kind:<12}{n:>12,}{chars:>14,}{chars / total:>8.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
