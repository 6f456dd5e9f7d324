"""Make or fetch what a recipe trains on, so that later stages only read.

    python -m scripts.prepare_data --config run10_cpu           the built-in corpus
    python -m scripts.prepare_data --data-dir ~/my_texts        your own .parquet, .jsonl or .txt files
    python -m scripts.prepare_data --config speedrun            real shards and task data, from the hub

Finished work is recognised; an interrupted download or generation continues.
"""

from megacontext_jax.cli import parse, run_main
from megacontext_jax.data import sources


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("data",))
    text = sources.prepare_text(config, download=True)
    print(
        f"Pretraining text: {len(text.train)} training and {len(text.val)} validation shard(s) in {text.folder}"
    )
    for stage in ("mid", "sft"):
        chat = sources.conversations(config, stage, download=True)
        print(
            f"Conversations for {stage}: {len(chat.train):,} to train, {len(chat.val):,} held out ({chat.about})"
        )


if __name__ == "__main__":
    run_main(main)
