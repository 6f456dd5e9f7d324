"""From a configuration to files: which shards, which conversations, which tokenizer a run reads."""

from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from megacontext_jax.config import Config
from megacontext_jax.data import corpus, mixture, rowgroups, shards, textdir
from megacontext_jax.data.conversations import ConversationSource, Source
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.paths import base_dir


@dataclass(frozen=True)
class TextData:
    """Pretraining text: training and validation shards, further held-out sets by name, and its tokenizer."""

    folder: Path
    train: list[Path]
    val: list[Path]
    held_out: dict[str, list[Path]] = field(default_factory=dict)
    tokenizer_dir: Path = Path()


@dataclass(frozen=True)
class ChatData:
    """Conversations for one stage."""

    about: str
    train: Source
    val: Source
    shuffled: bool = False  # the order of `train` is a good one already


def prepare_text(config: Config, *, download: bool = False, echo=print) -> TextData:
    """Find the pretraining text, making or (if asked) downloading it first."""
    data = config.data
    if data.data_dir:
        folder = textdir.prepare_text_dir(data.data_dir, base_dir() / "text")
        return _text(folder, _tokenizer_dir(folder, config))
    if data.dataset == "builtin":
        folder = build_corpus(config, echo=echo)
        held_out = {"python": [folder / "python_val.parquet"]}
        return _text(folder / "pretrain", _tokenizer_dir(folder, config), held_out)
    folder = shards.dataset_dir(data.dataset)
    if download:
        shards.download_dataset(data.dataset, data.num_shards, base_url=data.base_url or None)
    elif not folder.exists():
        raise UserError(
            f"There are no shards in {folder}; run python -m scripts.prepare_data with the same flags."
        )
    return _text(folder, base_dir() / "tokenizer")


def conversations(config: Config, stage: str, *, download: bool = False, echo=print) -> ChatData:
    """The conversations of mid-training or SFT: the built-in ones, or nanochat's own mixture."""
    if config.data.dataset == "builtin":
        folder = build_corpus(config, echo=echo) / stage
        train, val = (
            ConversationSource(sorted(folder.glob(f"{split}-*.parquet"))) for split in ("train", "val")
        )
        return ChatData(f"built-in, {folder}", train, val)
    folder = base_dir() / "task_data"
    if download:
        mixture.download_mixture(stage, folder)
    train, val = (mixture.build_mixture(f"{stage}_{split}", folder) for split in ("train", "val"))
    return ChatData(f"nanochat's mixture, {folder}", train, val, shuffled=True)


def build_corpus(config: Config, *, echo=print) -> Path:
    data = config.data
    return corpus.build(
        base_dir() / "builtin",
        seed=data.corpus_seed,
        pretrain_mchars=data.corpus_mchars,
        mid_conversations=data.mid_conversations,
        sft_conversations=data.sft_conversations,
        echo=echo,
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    if not folder.exists():
        raise UserError(f"There is no tokenizer in {folder}; run python -m scripts.tok_train first.")
    return Tokenizer.load(folder)


def check_vocabulary(tokenizer: Tokenizer, wanted: int, folder: Path) -> None:
    """Refuse a finished tokenizer of another size (a small corpus may end before the size asked for)."""
    if tokenizer.vocab_size > wanted:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens and --vocab-size asks for {wanted}; move "
            "that folder away, or use its size."
        )


def fingerprint(paths: list[Path]) -> str:
    """Names and sizes of files as one word: has the data under a run changed?"""
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return xxhash.xxh3_64_hexdigest(listing.encode())


def _tokenizer_dir(folder: Path, config: Config) -> Path:
    # Beside the text it was trained on: nanochat's own `tokenizer/` is never touched by small experiments.
    return folder / f"tokenizer_{config.tokenizer.vocab_size}"


def _text(folder: Path, tokenizer_dir: Path, held_out: dict | None = None) -> TextData:
    paths = rowgroups.list_shards(folder)
    train, val = (rowgroups.split_shards(paths, split) for split in ("train", "val"))
    return TextData(folder, train, val, held_out or {}, tokenizer_dir)
