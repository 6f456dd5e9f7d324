"""Chat with a trained model in the terminal.

    python -m scripts.chat_cli                      a conversation with the SFT model
    python -m scripts.chat_cli -p "Why?"            one prompt, one answer
    python -m scripts.chat_cli -i mid -g d12 -t 0   another stage and tag, greedy

In a conversation: clear starts over, quit leaves, Ctrl-C stops an answer.
"""

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.infer.chat import ChatLoop
from megacontext_jax.infer.load import load_engine


def main(argv: list[str]) -> int | None:
    config = parse(argv, doc=__doc__, show=("chat", "eval", "run"))
    runtime.start(config.run)
    engine, model = load_engine(config)
    loop = ChatLoop(engine, config.chat, seed=config.run.seed)
    prompt = config.chat.prompt or (config.chat.demo and config.chat.demo_prompt)
    if prompt:
        return loop.answer_once(prompt)
    print(f"{model}. clear starts over, quit leaves, Ctrl-C stops an answer.")
    return loop.run()


if __name__ == "__main__":
    run_main(main)
