"""Check the flags of a recipe and print what it will do: stages, shapes, tokens, memory, FLOPs.

    python -m scripts.plan --config speedrun
    bash speedrun.sh --dry-run            the same, through the recipe

Nothing is computed or written.
"""

from megacontext_jax.checkpoints.runs import unused_tag
from megacontext_jax.cli import parse, run_main
from megacontext_jax.config import STAGES
from megacontext_jax.context import row_setup
from megacontext_jax.context.store import check_place
from megacontext_jax.errors import UserError
from megacontext_jax.telemetry import hardware
from megacontext_jax.telemetry.progress import format_quantity
from megacontext_jax.train.plan import model_of, plan_stage


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("run", "model", "base"))
    check_place(config.mc.mc_tree, config.chat.session, "--session")  # the recipe ends with a conversation
    if config.run.mc and config.mc.positional_type == "gaussian_alibi":
        raise UserError(
            "--positional-type gaussian_alibi does not get through a recipe, whose chat_eval and chat_cli cannot decode "
            "with its bias; choose gaussian, simple or rank, or run the training scripts by themselves."
        )
    tag = config.run.tag or f"d{config.model.depth}"
    if config.run.fresh:
        tag = unused_tag("base", tag)
    if config.run.print_tag:
        if not config.run.dry_run:
            print(f"{tag}\n{'mc' if config.run.mc else 'vanilla'}")
        return

    gpus = hardware.gpus()
    needed, memory = config.run.min_devices, config.run.min_device_memory_gb * 10**9
    accelerated = memory > 0
    fitting = [gpu for gpu in gpus if gpu["memory_bytes"] >= memory]
    if accelerated and len(fitting) < needed and not config.run.dry_run:
        raise UserError(
            f"This recipe needs {needed} GPU(s) of {config.run.min_device_memory_gb} GB and this machine has "
            f"{len(fitting)}; --dry-run prints its plan, run10.sh --gpu cpu trains here."
        )
    cfg, _ = row_setup.pattern(config, model_of(config))
    devices = needed if accelerated else 1
    width = 2 if accelerated and config.run.compute_dtype != "float32" else 4
    n = cfg.num_params()
    print(
        f"Model: {cfg.arch}, depth {cfg.n_layer}, width {cfg.n_embd}, {cfg.n_head} heads of {cfg.head_dim}, ",
        end="",
    )
    print(f"vocabulary {cfg.vocab_size:,}, {cfg.sequence_len:,} tokens per row")
    print(f"       {n['total']:,} parameters, {cfg.flops_per_token():,} training FLOPs per token")
    if cfg.attention != "dense":
        print(f"       {row_setup.describe(cfg)}; with gists FLOPs and memory below are the dense model's")
    if config.run.mc:
        mc = config.mc
        print(
            f"MegaContext: gists of {mc.block_size}, {mc.mc_levels} levels, {mc.mc_num_random_variants} working contexts per "
            "row beside the raw one; FLOPs and memory below are the vanilla ones"
        )
    print(f"Data:  {config.data.data_dir or config.data.dataset}")
    again = f" (continue this run with --tag {tag} instead of --fresh)" if config.run.fresh else ""
    print(f"Tag:   {tag}{again}; devices: {devices}\n")
    print(
        f"{'stage':<6}{'steps':>10}{'tokens/step':>13}{'rows x micro':>14}{'tokens':>10}{'FLOPs':>10}"
        f"{'memory/device':>15}"
    )
    for stage in STAGES:
        p = plan_stage(config, stage, devices, width)
        steps = "by data" if p.steps is None else f"{p.steps:,}"
        tokens = "" if p.tokens is None else format_quantity(p.tokens)
        flops = "" if p.flops is None else f"{p.flops:.2e}"
        rows = f"{p.rows_per_device} x {p.accumulation}"
        print(
            f"{p.name:<6}{steps:>10}{p.tokens_per_step:>13,}{rows:>14}{tokens:>10}{flops:>10}"
            f"{format_quantity(p.memory_bytes, 'B'):>15}"
        )
    print(
        "\nStages: prepare_data, tok_train, tok_eval, base_train, base_loss, mid_train, chat_eval (mid), ",
        end="",
    )
    print(f"chat_sft, chat_eval (sft), {'long_context_eval, ' if config.run.mc else ''}report, chat")


if __name__ == "__main__":
    run_main(main)
