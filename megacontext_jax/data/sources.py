"""From a configuration to files: which shards, which conversations, which tokenizer a run reads."""

from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from megacontext_jax.config import Config
from megacontext_jax.data import corpus, mixture, rowgroups, shards, textdir
from megacontext_jax.data.conversations import ConversationSource, Source
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.data.tokenizer_training import check_vocabulary
from megacontext_jax.paths import base_dir

__all__ = [
    "ChatData",
    "TextData",
    "build_corpus",
    "check_vocabulary",
    "conversations",
    "fingerprint",
    "load_tokenizer",
    "prepare_text",
]


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
        out = base_dir() / "text"
        folder = textdir.prepare_text_dir(data.data_dir, out)
        # The user's folder may serve as it is, but is never written to.
        return _text(
            rowgroups.list_shards(folder), _tokenizer_dir(textdir.own_folder(data.data_dir, out), config)
        )
    if data.dataset == "builtin":
        folder = build_corpus(config, echo=echo)
        held_out = {"python": [folder / "python_val.parquet"]}
        paths = corpus.built_files(folder, "pretrain/shard_*")
        return _text(paths, _tokenizer_dir(folder, config), held_out)
    if download:
        shards.download_dataset(data.dataset, data.num_shards, base_url=data.base_url or None)
    return _text(shards.dataset_files(data.dataset, data.num_shards), base_dir() / "tokenizer")


def conversations(config: Config, stage: str, *, download: bool = False, echo=print) -> ChatData:
    """The conversations of mid-training or SFT: the built-in ones, or nanochat's own mixture."""
    if config.data.dataset == "builtin":
        folder = build_corpus(config, echo=echo)
        train, val = (
            ConversationSource(corpus.built_files(folder, f"{stage}/{split}-*")) for split in ("train", "val")
        )
        return ChatData(f"built-in, {folder / stage}", train, val)
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
    """The tokenizer that scripts.tok_train left in `folder`. Raises UserError if there is none."""
    return Tokenizer.load(folder)


def fingerprint(paths: list[Path]) -> str:
    """Names and sizes of files as one word: has the data under a run changed?"""
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return xxhash.xxh3_64_hexdigest(listing.encode())


def _tokenizer_dir(folder: Path, config: Config) -> Path:
    # Beside the text it was trained on: nanochat's own `tokenizer/` is never touched by small experiments.
    return folder / f"tokenizer_{config.tokenizer.vocab_size}"


def _text(paths: list[Path], tokenizer_dir: Path, held_out: dict | None = None) -> TextData:
    train, val = (rowgroups.split_shards(paths, split) for split in ("train", "val"))
    return TextData(paths[0].parent, train, val, held_out or {}, tokenizer_dir)
