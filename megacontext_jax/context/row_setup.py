"""From options to a model with gist attention: its pattern, its GistNet, its objective."""

from dataclasses import replace

from kernels_pallas import Refused, choose
from kernels_pallas import describe as describe_choice
from kernels_pallas.api import Chosen
from megacontext_jax.config import Config
from megacontext_jax.context import setup
from megacontext_jax.context.gist_rows import GistRows
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.head_places import place_attention
from megacontext_jax.context.positions import LONGEST
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import Choice
from megacontext_jax.model.objective import Objective, Phase

# flags that mean something only for these kinds of attention: a sliding window is as wide as the pattern's queries see
PATTERN_FLAGS = ("model.gist_window", "model.gist_mid_spans", "model.gist_levels")
GIST_FLAGS = ("model.gist_positions", "model.gist_gap", "mc.gist_heads", "run.require_fused")
IDLE_FLAGS = {"dense": PATTERN_FLAGS + GIST_FLAGS, "sliding": GIST_FLAGS, "gist": ()}


def pattern(
    config: Config, model: GPTConfig, source: str = "", trained: GPTConfig | None = None
) -> tuple[GPTConfig, str]:
    """The model under the pattern that --attention asks for, and a sentence where that is not its own.

    `source` is the name of the run that a model comes from; without it the model is a new one. `trained` is the model
    of that run, where rows had another length.
    """
    m = config.model
    if m.gist_site != "kv":
        raise UserError(
            f"--gist-site {m.gist_site} does not name a kind of gist attention: kv has gists in every layer; flat "
            "working contexts of embeddings are what --mc trains."
        )
    if m.gist_positions == "rank":
        raise UserError(
            "--gist-positions rank counts what one query sees, and in gist attention every query sees something "
            "else; use gaussian or plain, or --mc --positional-type rank."
        )
    asked, attention = model, m.attention or model.attention
    if attention != "dense":
        wanted = {"gist_block": ("mc", "block_size")}
        wanted |= {
            name: ("model", name)
            for name in ("gist_window", "gist_mid_spans", "gist_levels", "gist_positions")
        }
        if model.attention in (attention, "gist"):  # it has a pattern: only what flags name is another
            wanted = {name: at for name, at in wanted.items() if ".".join(at) in config.given}
        values = {name: getattr(getattr(config, section), key) for name, (section, key) in wanted.items()}
        # in place of the windows that its architecture has, or that it was trained with
        asked = replace(model, attention=attention, window_pattern=m.window_pattern or "L", **values)
    elif m.attention:
        asked = replace(model, attention=attention)
    if config.run.mc and asked.attention != "dense":
        raise UserError(
            f"--mc shows the past in flat working contexts, {asked.attention} attention inside every layer; choose one: "
            "leave --mc out, or set --attention dense."
        )
    _refuse_idle_flags(config, asked.attention)
    before, now, note = describe(trained or model), describe(asked), ""
    if source and before != now:
        note = f"{source} was trained with {before}; here it runs with {now}."
    elif source and asked.attention != "dense":
        note = f"{source} has {now}."
    return asked, note


def _refuse_idle_flags(config: Config, attention: str):
    for at in (at for at in IDLE_FLAGS[attention] if at in config.given):
        section, name = at.split(".")
        value, flag = getattr(getattr(config, section), name), f"--{name.replace('_', '-')}"
        asked = flag if value is True else f"{flag} {value}"
        raise UserError(
            f"{asked} is for gist attention, and this model has {attention} attention; add --attention gist, or leave "
            "it out."
        )


def describe(model: GPTConfig) -> str:
    if model.attention == "dense":
        short = "S" in model.window_pattern.upper()
        return f"dense attention in windows {model.window_pattern}" if short else "dense attention"
    if model.attention == "sliding":
        return f"sliding attention over {model.windows()[0] + 1} tokens"
    return (
        f"gist attention (blocks of {model.gist_block}, window {model.gist_window}, {model.gist_mid_spans} middle "
        f"span(s), {model.gist_levels} level(s), {model.gist_positions} positions)"
    )


def dense_implementation(config: Config, model: GPTConfig) -> str:
    """What --attention-impl means for dense attention: with gist attention it names that of the gists."""
    return "auto" if model.attention == "gist" else config.run.attention_impl


def gist_config(config: Config, model: GPTConfig) -> GistConfig:
    """A new GistNet for a model with gist attention."""
    gist = setup.gist_config(config.mc, replace(model, attention="dense"))
    if config.mc.gist_heads == "alike":
        return gist
    if model.n_kv_head < 2:
        raise UserError(
            f"--gist-heads {config.mc.gist_heads} divides the places of a block among the key heads, and this model has "
            "one; lower --head-dim, or leave it out."
        )
    return replace(gist, read_layers=model.n_layer, read_heads=model.n_kv_head)


def phases(
    config: Config, base: Objective, gist: GistConfig, num_iterations: int, *, first_stage: bool
) -> list[Phase]:
    """The curriculum: everything as tokens while retrieval forms, then gist attention; that alone unless `first_stage`."""
    share = config.mc.mc_raw_share
    if not 0 <= share < 1:
        raise UserError(f"--mc-raw-share {share} must lie in [0, 1): gist attention would never begin.")
    rows = objective(config, base, gist)
    start = round(share * num_iterations) if first_stage else 0
    if gist.read_heads:
        why = "every head sees those far away at its own places"
        base = replace(base, attention=Choice("places", place_attention(base.cfg.gist_spec), why))
    return [Phase(0, base), Phase(start, rows)] if start else [Phase(0, rows)]


def objective(config: Config, base: Objective, gist: GistConfig) -> GistRows:
    gap = config.model.gist_gap
    if not 0 <= gap <= LONGEST:
        raise UserError(f"--gist-gap {gap} must lie between 0 (none) and {LONGEST:,} tokens.")
    span = base.cfg.gist_block**base.cfg.gist_levels
    if gap and base.cfg.sequence_len <= span:
        raise UserError(
            f"--gist-gap {gap} lies at the end of a span of the top level, and rows of {base.cfg.sequence_len} tokens hold "
            f"no more than one of {span:,}; lower --gist-levels or raise --max-seq-len."
        )
    return GistRows(
        base,
        gist,
        config.mc.mc_gist_regression_weight,
        implementation(config, base).name,
        gap,
        decode_implementation(config),
    )


def implementation(config: Config, base: Objective) -> Chosen:
    """What runs gist attention here, by --attention-impl and --require-fused."""
    wanted, cfg = config.run.attention_impl, base.cfg
    try:
        return choose(
            None if wanted == "auto" else wanted,
            spec=cfg.gist_spec,
            dtype=base.dtype,
            head_dim=cfg.head_dim,
            require_fused=config.run.require_fused,
        )
    except Refused as error:
        raise UserError(f"--attention-impl {wanted}: {error}") from None


def decode_implementation(config: Config) -> str:
    """What decodes: the kernel where it is asked for by name, since a few sequences are bound by launches."""
    return "mosaic_gpu" if config.run.attention_impl == "mosaic_gpu" else "xla"


def runs(config: Config, base: Objective) -> str:
    """One line: what runs gist attention here, and why nothing better."""
    return describe_choice(implementation(config, base))
