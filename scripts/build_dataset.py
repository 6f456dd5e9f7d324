"""Make training shards of Arrow, parquet, JSON lines or plain text, with long documents whole.

    python -m scripts.build_dataset books/ --out data/books            files and folders, sub-folders too
    python -m scripts.build_dataset hf_dataset/ more.parquet --column body --out data/mine
    python -m scripts.build_dataset packed/ --ids-column input_ids --tokenizer TOKENIZER_DIR --out data/packed

Read are .arrow and .feather (both formats, and folders that Hugging Face `datasets` saved), .parquet, .jsonl
and .json (one object a line), the same with .gz, and .txt (one document). Rows of token ids are decoded by the
tokenizer that made them; rows without <|bos|> at their start go on with the document before. DIR gets
shard_XXXXX.parquet, the last one held out for validation, and is then what --data-dir takes. An interrupted call
leaves nothing that counts; the same call begins again, and of a finished one says so.
"""

import argparse
import shlex
import time

from megacontext_jax.cli import run_main
from megacontext_jax.data import bridge
from megacontext_jax.data.bridge_documents import ROWS, describe_counts
from megacontext_jax.data.textdir import own_folder
from megacontext_jax.paths import base_dir

DEFAULT = bridge.Options()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.build_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", metavar="SRC", nargs="+", help="files and folders, read in this order")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the shards")
    parser.add_argument("--column", metavar="NAME", help="the column with the text (default: text)")
    parser.add_argument(
        "--ids-column",
        metavar="NAME",
        help="the column with token ids (default: input_ids or tokens, where there is no text)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer that made the ids")
    parser.add_argument(
        "--rows",
        choices=ROWS,
        default=DEFAULT.rows,
        help="what a row of ids is: a whole document, or a chunk that is joined to the row before unless a document "
        "begins there (default: chunks if a document begins in any of the first 1,000 rows)",
    )
    parser.add_argument(
        "--min-chars", type=int, default=DEFAULT.min_chars, help="drop shorter documents (default: none)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=DEFAULT.val_fraction,
        help="share of the documents held out, every k-th of them, at least one (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-mchars",
        type=float,
        default=DEFAULT.shard_mchars,
        help="million characters in a training shard (default: %(default)g)",
    )
    size.add_argument(
        "--shards", type=int, help="this many training shards instead (writes everything twice)"
    )
    parser.add_argument(
        "--docs-per-group",
        type=int,
        default=DEFAULT.docs_per_group,
        help="documents in a row group, the unit that training shuffles and shares out (default: %(default)s)",
    )
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="shuffle groups of 64 documents, then documents within 64 million characters (writes everything twice)",
    )
    parser.add_argument("--seed", type=int, default=DEFAULT.seed, help="of --shuffle (default: %(default)s)")
    args = vars(parser.parse_args([_dashes(word) for word in argv]))
    inputs, out = args.pop("inputs"), args.pop("out")
    options = bridge.Options(**args)
    started = time.monotonic()
    made, finished = bridge.build_dataset(inputs, out, options)
    if finished:
        print(f"{out} is finished; nothing to do.")
    train, val = made["train"], made["val"]
    print(
        f"{out}: {len(made['shards']) - 1} training shard(s) of {train['documents']:,} documents in "
        f"{made['row_groups']:,} row groups, 1 held-out shard of {val['documents']:,} documents"
        + ("" if finished else f"; {time.monotonic() - started:.1f} s")
    )
    print("\n".join(describe_counts(made["counts"], made["exact_tokens"])))
    for warning in made["warnings"]:
        print(f"Warning: {warning}")
    where = shlex.quote(out)
    train_it = f"python -m scripts.base_train --data-dir {where}"
    if made["vocab_size"]:
        folder = own_folder(out, base_dir() / "text")
        copy = shlex.join(["cp", "-r", options.tokenizer, f"{folder}/tokenizer_{made['vocab_size']}"])
        print(f"To train with the tokenizer of the ids: mkdir -p {shlex.quote(str(folder))} && {copy}")
        print(f"  {train_it} --vocab-size {made['vocab_size']}")
    print(f"To train with a tokenizer of its own: python -m scripts.tok_train --data-dir {where}")
    print(f"  {train_it}")


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


if __name__ == "__main__":
    run_main(main)
