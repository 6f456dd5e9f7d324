"""What every entry point shares: flags to `Config`, help that teaches, errors as one sentence."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType

from megacontext_jax.checkpoints.runs import saved_arch
from megacontext_jax.config import (
    CONFIG_DIR,
    SOURCE_STAGES,
    STAGES,
    Config,
    apply_flags,
    flag_names,
    is_switch,
    load_arch,
    load_yaml,
)
from megacontext_jax.errors import UserError
from megacontext_jax.telemetry.hardware import gpu_profile

SHORT = {
    "-i": "source",
    "-g": "tag",
    "-s": "step",
    "-p": "prompt",
    "-t": "temperature",
    "-k": "top-k",
    "-a": "tasks",
    "-m": "max-tokens",
    "-b": "eval-batch-size",
}
ALIASES = {
    "model-tag": "tag",
    "model-step": "step",
    "gpu": "profile",
    "device-type": "platform",
    "mc-enabled": "mc",
    "mc-tree-type": "mc-tree",
    "gist-block": "block-size",
    "gistnet": "gistnet-type",
    "lensnet": "lensnet-type",
    "allocator": "allocator-type",
    "positional": "positional-type",
}
# Flags of the PyTorch fork that have nothing to turn here: accepted, with what takes their place.
REPLACED = {
    "mc-random-variant-iterations": "contexts of the wanted width are drawn directly, without retries",
    "mc-compile-gistnet": "the whole step is compiled",
    "mc-compile-lensnet": "the whole step is compiled",
    "mc-lens-adv-norm-beta": "advantages are normed by the spread of their own step",
    "mc-max-lod": "--mc-levels sets the levels of gists",
    "build-workers": "the tree of a whole batch is built in one call per level",
    "cache-lod0": "embeddings are never kept beside the tokens",
    "num-gpus": "one process serves all clients from one device, in turns",
    "telemetry-interval": "--log-every and --eval-every set it",
}


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run an entry point: user mistakes end in one sentence and status 2, Ctrl-C in status 130."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status or 0)


def parse(
    argv: list[str],
    *,
    doc: str,
    stage: str | None = None,
    show: tuple[str, ...] = (),
    short: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """Flags to a configuration.

    `stage` is the section that unqualified stage flags address; `show` are the sections `--help` explains
    in full, `short` are short flags that mean something else than usual. `--config NAME` (default: the recipe of the hardware profile) is read before the other flags, and
    before it how the architecture is trained: that of `--arch`, of the run a stage starts from, or of the recipe.
    """
    wants_help = "-h" in argv or "--help" in argv
    flags = _accept_replaced(_tokens([word for word in argv if word not in ("-h", "--help")], SHORT | short))

    def last(name: str) -> str | None:
        return next((value for flag, value in reversed(flags) if flag == name), None)

    for name, words in (("config", "the name of a file in configs/ or a path"), ("profile", "a profile")):
        if (name, None) in flags:
            raise UserError(f"--{'gpu' if name == 'profile' else name} needs {words}.")
    source = last("config") or recipe_config(last("recipe") or "run10", last("profile"))
    own = [flag for flag in flags if flag[0] not in ("config", "profile")]
    asked = apply_flags(load_yaml(Config(), source), own, stage)
    arch = asked.model.arch
    if stage in SOURCE_STAGES and not (last("arch") or last("model.arch")):
        # a model that exists is trained as its architecture is
        arch = saved_arch(SOURCE_STAGES[stage], asked.run.tag or f"d{asked.model.depth}") or arch
    config = load_yaml(load_arch(Config(), arch), source)
    if wants_help:
        print(_help(doc, config, source, stage, show, SHORT | short))
        raise SystemExit(0)
    config = apply_flags(config, own, stage)
    if config.mc.mc_tree == "disk" and "chat" not in show:  # which only programs with conversations explain
        print(
            "Note: --mc-tree disk is for the conversations of chat_cli and chat_web; the rows of a batch have their "
            "trees on the device.",
            file=sys.stderr,
        )
    return config


def whole_numbers(text: str, flag: str) -> list[int]:
    """Numbers from 1 on that are separated by commas. UserError names the flag."""
    try:
        found = [int(word.replace("_", "")) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text} must be whole numbers separated by commas.") from None
    if min(found) < 1:
        raise UserError(f"{flag} {text}: every number must be at least 1.")
    return found


def recipe_config(recipe: str, profile: str | None = None) -> str:
    """Name of the YAML file of a recipe; run10 has one per hardware profile."""
    if recipe != "run10":
        if profile:
            raise UserError(f"--gpu {profile} belongs to run10; {recipe} has one configuration.")
        return recipe
    profile = profile or gpu_profile()
    known = sorted(p.stem.removeprefix("run10_") for p in CONFIG_DIR.glob("run10_*.yaml"))
    if profile not in known:
        raise UserError(f"--gpu does not take {profile!r}; choose one of {', '.join(known)}.")
    return f"run10_{profile}"


def _tokens(argv: list[str], letters: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """[(name, value)] of `--name value`, `--name=value`, `--switch`, `-x value`; a lone `--` is skipped."""
    flags, words = [], [word for word in argv if word != "--"]
    while words:
        word = words.pop(0)
        if word in letters:
            word = f"--{letters[word]}"
        if not word.startswith("--"):
            raise UserError(f"Unexpected argument {word!r}; flags look like --name value. See --help.")
        name, equals, value = word[2:].partition("=")
        name = ALIASES.get(name.replace("_", "-"), name.replace("_", "-"))
        if equals:
            flags.append((name, value))
        elif is_switch(name):
            explicit = words and words[0].lower() in ("true", "false", "0", "1")
            flags.append((name, words.pop(0) if explicit else None))
        elif words and (not words[0].startswith("--") or name == "prompt"):
            flags.append((name, words.pop(0)))
        else:
            flags.append((name, None))
    return flags


def _accept_replaced(flags: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Says what replaced the flags and values of the fork that mean nothing here, and drops them."""
    kept = []
    for name, value in flags:
        if name in REPLACED:
            print(f"Note: --{name} is not needed: {REPLACED[name]}.", file=sys.stderr)
        elif (name, value) == ("allocator-type", "simple"):
            print(
                "Note: --allocator simple never existed in the fork's code; greedy takes its place.",
                file=sys.stderr,
            )
            kept.append((name, "greedy"))
        elif name.startswith(("mc-", "allocator-")) and value in ("", "None"):
            continue  # the fork's scripts hand on empty values for "derive it"
        else:
            kept.append((name, value))
    return kept


def _help(
    doc: str,
    config: Config,
    source: str,
    stage: str | None,
    show: tuple[str, ...],
    letters: Mapping[str, str],
) -> str:
    lines = [doc.strip(), "", f"Flags, with dashes or underscores, and their values in {source}:"]
    lines.append(
        "      --config NAME              a file in configs/, or a path; default: the profile of this machine"
    )
    short = {name: letter for letter, name in letters.items()}
    shown = (stage, *show) if stage else show
    for section_name in shown:
        section = getattr(config, section_name)
        lines.append(f"\n{section_name}:")
        for f in fields(section):
            name = f.name.replace("_", "-")
            letter = f"{short[name]}, " if name in short else "    "
            lines.append(f"  {letter}--{name:<24} {f.metadata['help']} [{getattr(section, f.name)}]")
    rest = sorted({n for n, owners in flag_names().items() if not set(owners) & set(shown)})
    lines.append("\nAlso accepted, so that a recipe can pass its flags on:")
    lines.append("  " + " ".join(f"--{n.replace('_', '-')}" for n in rest))
    if stage in STAGES:
        lines.append(f"\n--{'|--'.join(s + '.NAME' for s in STAGES)} address one stage from anywhere.")
    return "\n".join(lines)
