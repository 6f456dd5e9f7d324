"""Mid-training: the base model meets conversations, tools and multiple choice.

    python -m scripts.mid_train --config run10_cpu

Starts from the base model of the same tag. An interrupted run continues with the same command.
"""

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main


def main(argv: list[str]) -> int:
    config = parse(argv, doc=__doc__, stage="mid", show=("model", "data", "run"))
    runtime.start(config.run)
    from megacontext_jax.train.loop import train
    from megacontext_jax.train.stages import prepare

    return train(prepare(config, "mid"))


if __name__ == "__main__":
    run_main(main)
