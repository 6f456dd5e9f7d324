"""Send one span `mc_preflight` to the OpenTelemetry collector at MC_OTEL_ENDPOINT and say whether it arrived.

MC_OTEL_ENDPOINT=http://localhost:4318 python -m scripts.mc_otel_preflight
"""

import argparse

from megacontext_jax.cli import run_main
from megacontext_jax.telemetry.otel import preflight


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.mc_otel_preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--message", default="hello from megacontext-jax", help="the span's mc.message")
    args = parser.parse_args(argv)
    print(f"The span mc_preflight arrived: {preflight(args.message)}.")


if __name__ == "__main__":
    run_main(main)
