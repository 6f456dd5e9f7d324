"""Train the tokenizer: byte-level BPE with GPT-4's split, one- or two-digit numbers, nanochat's special tokens.

python -m scripts.tok_train --config run10_cpu
python -m scripts.tok_train --data-dir ~/my_texts --vocab-size 8192
"""

import time

from megacontext_jax.cli import parse, run_main
from megacontext_jax.data import rowgroups, sources
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.telemetry import report


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("tokenizer", "data"))
    opts = config.tokenizer
    text = sources.prepare_text(config)
    if text.tokenizer_dir.exists():
        tokenizer = sources.load_tokenizer(text.tokenizer_dir)
        sources.check_vocabulary(tokenizer, opts.vocab_size, text.tokenizer_dir)
        print(
            f"The tokenizer in {text.tokenizer_dir} is finished ({tokenizer.vocab_size} tokens); nothing to do."
        )
        return
    print(f"Training a tokenizer of {opts.vocab_size} tokens on up to {opts.max_chars:,} characters ...")
    started = time.monotonic()
    tokenizer = Tokenizer.train(
        rowgroups.iter_texts(text.train, opts.max_chars, opts.doc_cap), opts.vocab_size
    )
    seconds = time.monotonic() - started
    tokenizer.save(text.tokenizer_dir)
    print(f"{tokenizer.vocab_size} tokens in {seconds:.1f} s, saved to {text.tokenizer_dir}")
    token_bytes = tokenizer.token_bytes()
    sizes = token_bytes[token_bytes > 0]
    facts = {
        "max_chars": opts.max_chars,
        "doc_cap": opts.doc_cap,
        "vocab_size": tokenizer.vocab_size,
        "train_time (s)": seconds,
        "num_special_tokens": len(tokenizer.special_tokens),
        "token_bytes_min": int(sizes.min()),
        "token_bytes_max": int(sizes.max()),
        "token_bytes_mean": float(sizes.mean()),
        "token_bytes_std": float(sizes.std()),
    }
    report.write_section("tokenizer-training", "Tokenizer training", facts)


if __name__ == "__main__":
    run_main(main)
