"""Pretrain the base model.

    python -m scripts.base_train --config run10_cpu
    python -m scripts.base_train --depth 12 --num-iterations 1000

An interrupted run continues with the same command; a finished one says so. --fresh starts under a new tag.
"""

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main


def main(argv: list[str]) -> int:
    config = parse(argv, doc=__doc__, stage="base", show=("model", "data", "run"))
    runtime.start(config.run)
    from megacontext_jax.train.loop import train
    from megacontext_jax.train.stages import prepare

    return train(prepare(config, "base"))


if __name__ == "__main__":
    run_main(main)
