"""Supervised fine-tuning on conversations; only the assistant's tokens count.

    python -m scripts.chat_sft --config run10_cpu

Starts from the mid-trained model of the same tag. An interrupted run continues with the same command.
"""

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main


def main(argv: list[str]) -> int:
    config = parse(argv, doc=__doc__, stage="sft", show=("model", "data", "run"))
    runtime.start(config.run)
    from megacontext_jax.train.loop import train
    from megacontext_jax.train.stages import prepare

    return train(prepare(config, "sft"))


if __name__ == "__main__":
    run_main(main)
