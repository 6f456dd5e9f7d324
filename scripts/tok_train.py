"""Train the tokenizer: byte-level BPE with GPT-4's split, one- or two-digit numbers, nanochat's special tokens.

python -m scripts.tok_train --config run10_cpu
python -m scripts.tok_train --data-dir ~/my_texts --vocab-size 8192
"""

import time

from megacontext_jax.cli import parse, run_main
from megacontext_jax.data import rowgroups, sources
from megacontext_jax.data import tokenizer_training as training
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.telemetry import report

SECTION = "tokenizer-training"


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("tokenizer", "data"))
    opts = config.tokenizer
    text = sources.prepare_text(config)
    folder = text.tokenizer_dir
    tokenizer = training.find_trained(folder, opts)
    if tokenizer is not None:
        known = training.read_note(folder, tokenizer) is not None
        origin = (
            "" if known else " How it was trained is not on record: --max-chars and --doc-cap go unchecked."
        )
        print(
            f"The tokenizer in {folder} is finished ({tokenizer.vocab_size} tokens); nothing to do.{origin}"
        )
    else:
        print(f"Training a tokenizer of {opts.vocab_size} tokens on up to {opts.max_chars:,} characters ...")
        started = time.monotonic()
        texts = rowgroups.iter_texts(text.train, opts.max_chars, opts.doc_cap)
        tokenizer = Tokenizer.train(texts, opts.vocab_size)
        seconds = time.monotonic() - started
        training.keep_trained(tokenizer, folder, opts, seconds)
        print(f"{tokenizer.vocab_size} tokens in {seconds:.1f} s, saved to {folder}")
    run = f"{folder}, digest {tokenizer.digest[:12]}"
    if not report.has_section(SECTION, run):  # also where a kill fell between the tokenizer and its report
        facts = describe(tokenizer, training.read_note(folder, tokenizer))
        report.write_section(SECTION, "Tokenizer training", facts, run=run)


def describe(tokenizer: Tokenizer, note: dict | None) -> dict:
    """Facts for the report; how it was trained only if that is known."""
    token_bytes = tokenizer.token_bytes()
    sizes = token_bytes[token_bytes > 0]
    trained = {"max_chars": note["max_chars"], "doc_cap": note["doc_cap"]} if note else {}
    took = {"train_time (s)": note["seconds"]} if note else {}
    return {
        **trained,
        "vocab_size": tokenizer.vocab_size,
        **took,
        "num_special_tokens": len(tokenizer.special_tokens),
        "token_bytes_min": int(sizes.min()),
        "token_bytes_max": int(sizes.max()),
        "token_bytes_mean": float(sizes.mean()),
        "token_bytes_std": float(sizes.std()),
    }


if __name__ == "__main__":
    run_main(main)
