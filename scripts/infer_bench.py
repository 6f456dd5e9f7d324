"""How fast a model speaks over a history of any length, and what it holds on the device.

    python -m scripts.infer_bench                                   every kind, a small model of random weights
    python -m scripts.infer_bench --mc --histories 4000,1000000     one kind: flat working contexts
    python -m scripts.infer_bench --attention gist                  gist attention
    python -m scripts.infer_bench -i sft --mc                       a trained model

First the static card: weights, cache, what reading both takes (the floor of a token). Then, for every length of
history, a random text is read and an answer is timed. One JSON line per length and kind: history, kind, ms_per_token_p50, _p99
(a refocus weighs on the token that waits for it), _mean, tokens_per_s, ttft_s (a message of 16 tokens to the first token of
the answer), read_tokens_per_s, refocus_ms (of those that looked), settle_share (the host's and the lens's share of the
time), device_bytes (all live arrays), tree_bytes; times_plain: over the time of the same weights
with a plain cache of as many slots, in turns of 64 tokens; with --mc how many refocuses looked (refocuses), had nothing
that they could pay for (unpaid), and edited (expands, collapses). A plain model ends at its window and is timed there.
"""

import json
from dataclasses import replace

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main, whole_numbers
from megacontext_jax.config import Config
from megacontext_jax.context.row_setup import IDLE_FLAGS
from megacontext_jax.errors import UserError
from megacontext_jax.infer.bench import ROUND, Words, card, measure, plain_plan
from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.load import load_chat, random_chat
from megacontext_jax.telemetry import hardware
from megacontext_jax.telemetry.progress import Progress
from megacontext_jax.train.plan import model_of


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("bench", "eval", "run", "mc"))
    lengths = whole_numbers(config.bench.histories, "--histories")
    if config.bench.bench_tokens < 64:
        raise UserError(f"--bench-tokens {config.bench.bench_tokens} must be at least 64, two refocuses.")
    runtime.start(config.run)
    trained = bool(config.given & {"eval.source", "run.tag"})
    chats = [load_chat(config)] if trained else random_chats(config)
    print(f"{hardware.cpu_model()}, {hardware.usable_cpus()} cores; {config.bench.bench_tokens} tokens each")
    for chat in chats:
        print(f"\n{chat.name}, {chat.kind}")
        print("\n".join(card(chat).lines()))
        print(
            f"{'history':>10} {'read/s':>9} {'first':>9} {'p50':>9} {'p99':>9} {'mean':>9} {'tokens/s':>9} {'device':>10} {'plain':>7}"
        )
        chat.memory().warm_up()
        timed, lengths_here = config.bench.bench_tokens, sorted(set(lengths))
        if chat.kind == "plain":
            timed, longest = plain_plan(chat, timed)
            lengths_here = [min(longest, max(lengths))]
            measure(chat, lengths_here[0], timed)  # compiles, as the next line does
        else:
            measure(chat, min(3000, max(lengths)), 2 * ROUND)
        for history in lengths_here:
            with Progress("reading", history, unit="tokens") as progress:
                told = 0

                def tick(tokens: int, progress=progress) -> None:
                    nonlocal told
                    progress.update(tokens - told)
                    told = tokens

                found = measure(chat, history, timed, tick)
            print(
                f"{history:>10,} {found['read_tokens_per_s']:>9,.0f} {1e3 * found['ttft_s']:>6.1f} ms "
                f"{found['ms_per_token_p50']:>6.3f} ms {found['ms_per_token_p99']:>6.3f} ms "
                f"{found['ms_per_token_mean']:>6.3f} ms {found['tokens_per_s']:>9,.0f} {found['device_bytes'] / 1e6:>7.2f} MB"
                + (f" {found['times_plain']:>6.2f}x" if "times_plain" in found else "")
            )
            print(json.dumps(found))


def random_chats(config: Config) -> list[ChatModel]:
    """A model of the kind that was asked for, or of every kind."""
    kinds = [(config.run.mc, config.model.attention)]
    if kinds == [(False, "")]:
        kinds = [(False, ""), (False, "gist"), (True, "")]
    chats = []
    for mc, attention in kinds:
        asked = replace(
            config, run=replace(config.run, mc=mc), model=replace(config.model, attention=attention)
        )
        if len(kinds) > 1:  # flags of one kind are no mistake in the others
            asked = replace(asked, given=config.given - set(IDLE_FLAGS[attention or "dense"]))
        chats.append(random_chat(asked, model_of(asked), Words(config.tokenizer.vocab_size)))
    return chats


if __name__ == "__main__":
    run_main(main)
