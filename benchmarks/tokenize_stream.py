"""Tokenising throughput of the pretraining stream beside its floor, a bare loop of pyarrow and tiktoken.

    python -m benchmarks.tokenize_stream

The text is the English of this Python's own documentation, repeated in documents of varied length, as parquet
shards in a temporary folder; the tokenizer is trained on it. Everything is read once with one tokenising thread:
by the floor, by the floor's loop in another thread, by the stream that concatenates and by the one that packs by
best fit. (tiktoken is slower in all threads but the first that uses an encoding: each thread of a stream has its
own.) The sides take turns and medians are compared, in CPU seconds too, which a busy machine disturbs less. The
last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from threading import Thread

import pyarrow.parquet as pq
import tiktoken

from benchmarks.common import machine
from megacontext_jax.data.corpus.python_english import passages
from megacontext_jax.data.rowgroups import write_shards
from megacontext_jax.data.stream import Corpus, PretrainStream
from megacontext_jax.data.tokenizer import Tokenizer

VOCABULARY = 8192
ROWS, TOKENS = 8, 1024
SIDES = ("floor", "in_thread", "concat", "best_fit")


def documents(characters: float) -> list[str]:
    """About so many characters of documents: mostly one passage, some of up to forty."""
    pieces, rng, made, size = passages()[0], random.Random(0), [], 0
    while size < characters:
        made.append("\n\n".join(rng.choices(pieces, k=min(40, int(rng.paretovariate(0.9))))))
        size += len(made[-1])
    return made


def read_bare(paths: list[Path], encoding: tiktoken.Encoding) -> int:
    """Tokens of all documents, bos included."""
    tokens = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["text"], use_threads=False)
                tokens += sum(1 + len(encoding.encode_ordinary(text)) for text in table["text"].to_pylist())
    return tokens


def read_stream(paths: list[Path], tokenizer: Tokenizer, packing: str) -> float:
    """Reads every batch of one pass; returns the share of tokens that reached one."""
    stream = PretrainStream(Corpus(paths), tokenizer, ROWS, TOKENS, packing=packing, repeat=False)
    for _ in stream:
        pass
    stream.close()
    return stream.kept_share


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mchars", type=float, default=8.0, help="million characters of text (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        texts = documents(args.mchars * 1e6)
        paths = write_shards(texts, folder, docs_per_shard=4096)
        tokenizer = Tokenizer.train(texts[:2000], VOCABULARY)
        encoding = tokenizer.vocabulary.encoding()
        tokens = read_bare(paths, encoding)
        bytes_per_token = sum(len(text.encode()) for text in texts) / (tokens - len(texts))
        share, wall, cpu = {}, {side: [] for side in SIDES}, {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                began = time.perf_counter(), time.process_time()
                if side == "floor":
                    read_bare(paths, encoding)
                elif side == "in_thread":
                    thread = Thread(target=read_bare, args=(paths, encoding))
                    thread.start()
                    thread.join()
                else:
                    share[side] = read_stream(paths, tokenizer, side)
                wall[side].append(tokens / (time.perf_counter() - began[0]) / 1e6)
                cpu[side].append(tokens / (time.process_time() - began[1]) / 1e6)

    wall, cpu = ({side: statistics.median(taken[side]) for side in SIDES} for taken in (wall, cpu))
    load = os.getloadavg()[0]
    print(f"machine: {machine()}; load {load:.1f} from all that runs on it")
    print(
        f"text: {len(texts):,} documents, {tokens / 1e6:.2f} M tokens of {bytes_per_token:.2f} bytes, "
        f"vocabulary {tokenizer.vocab_size:,}; batches of {ROWS} x {TOKENS}; 1 tokenising thread"
    )
    print(f"{'side':<10}{'M tok/s':>9}{'M tok/cpu-s':>13}{'of the floor':>14}{'tokens kept':>13}")
    for side in SIDES:
        kept = f"{share[side]:.1%}" if side in share else "-"
        print(f"{side:<10}{wall[side]:>9.2f}{cpu[side]:>13.2f}{wall[side] / wall['floor']:>14.0%}{kept:>13}")
    result = {
        "benchmark": "tokenize_stream",
        "machine": machine(),
        "load": load,
        "tokens": tokens,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": bytes_per_token,
        "mtok_per_s": wall,
        "mtok_per_cpu_s": cpu,
        "kept_share": share,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
