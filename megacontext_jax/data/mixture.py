"""nanochat's mixtures for mid-training and SFT, from parquet files as the Hugging Face hub exports them.

`python -m megacontext_jax.data.mixture mid` downloads what a mixture needs into `task_data/` of the base
directory, in the folders PyTorch nanochat uses too: `<owner>--<name>/<subset>/<split>/`.
"""

import argparse
import json
import os
import random
import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacontext_jax.data.conversations import Conversation, ConversationSource, Source, checked
from megacontext_jax.data.download import download
from megacontext_jax.data.rowgroups import check_shard
from megacontext_jax.data.spelling import count_letter, spell_word
from megacontext_jax.errors import UserError
from megacontext_jax.files import write_bytes
from megacontext_jax.paths import base_dir

ROW_SEED = 42  # of the order of the rows of each hub set
MIX_SEED = 42  # of the order of the mixture
MANIFEST = "manifest.json"  # a list of file names, written when all of them are there


# Converters: one row of a hub set -> conversation. Pure functions.


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """nanochat's prompt: each choice before its letter, and no space before the letter (another token)."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    return (
        f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    )


def from_smoltalk(row: Mapping[str, Any]) -> Conversation:
    return {"messages": row["messages"]}


def from_mmlu(row: Mapping[str, Any]) -> Conversation:
    """MMLU; the `auxiliary_train` subset wraps its rows in a column `train`."""
    row = row.get("train") or row
    letters = "ABCD"
    prompt = multiple_choice(row["question"], letters, row["choices"])
    return _exchange(prompt, letters[row["answer"]]) | {"subject": row["subject"], "letters": list(letters)}


def from_arc(row: Mapping[str, Any]) -> Conversation:
    letters, answer = list(row["choices"]["label"]), row["answerKey"]
    if answer not in letters:
        raise ValueError(f"the answer {answer!r} is none of {letters}")
    return _exchange(multiple_choice(row["question"], letters, row["choices"]["text"]), answer) | {
        "letters": letters
    }


def from_gsm8k(row: Mapping[str, Any]) -> Conversation:
    """Each `<<expression=result>>` of the worked answer becomes a call of the calculator and its output."""
    parts = []
    for piece in re.split(r"(<<[^>]+>>)", row["answer"]):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, _, result = piece[2:-2].rpartition("=")
            if not expression:  # nothing but an expression
                expression, result = result, ""
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return _exchange(row["question"], parts)


def _exchange(question: str, answer: str | list) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# The tables


@dataclass(frozen=True)
class HubSet:
    """A parquet export of the hub, and how a row of it becomes a conversation."""

    repo: str
    subset: str
    split: str
    convert: Callable[[Mapping[str, Any]], Conversation]

    def folder(self, data_dir: Path) -> Path:
        return data_dir / self.repo.replace("/", "--") / self.subset / self.split


@dataclass(frozen=True)
class WebFile:
    """A single file by its address."""

    url: str

    def path(self, data_dir: Path) -> Path:
        return data_dir / self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Words:
    """`size` generated conversations about the words of a list; example i is seeded by i (test: -(i+1))."""

    file: WebFile
    make: Callable[[random.Random, Sequence[str]], Conversation]
    size: int
    split: str = "train"


@dataclass(frozen=True)
class Part:
    """The examples `start:stop` of a set, `repeat` times in one epoch."""

    data: HubSet | WebFile | Words
    repeat: int = 1
    start: int = 0
    stop: int | None = None


IDENTITY = WebFile("https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl")
WORDS = WebFile("https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt")
SMOLTALK, SMOLTALK_TEST = (
    HubSet("HuggingFaceTB/smol-smoltalk", "default", split, from_smoltalk) for split in ("train", "test")
)
MMLU_AUX, MMLU_TEST = (HubSet("cais/mmlu", "all", s, from_mmlu) for s in ("auxiliary_train", "test"))
GSM8K, GSM8K_TEST = (HubSet("openai/gsm8k", "main", split, from_gsm8k) for split in ("train", "test"))
ARC_EASY, ARC_CHALLENGE = (
    HubSet("allenai/ai2_arc", subset, "train", from_arc) for subset in ("ARC-Easy", "ARC-Challenge")
)
_VAL = (Part(SMOLTALK_TEST), Part(MMLU_TEST, stop=5200), Part(GSM8K_TEST, stop=420))

MIXTURES: dict[str, tuple[Part, ...]] = {
    "mid_train": (
        Part(SMOLTALK),
        Part(MMLU_AUX),
        Part(GSM8K),
        Part(IDENTITY, repeat=2),
        Part(Words(WORDS, spell_word, 200_000)),
        Part(Words(WORDS, count_letter, 80_000)),
    ),
    "mid_val": _VAL,
    "sft_train": (
        Part(ARC_EASY),
        Part(ARC_CHALLENGE),
        Part(GSM8K),
        Part(SMOLTALK, stop=10_000),
        Part(IDENTITY),
        Part(Words(WORDS, spell_word, 300)),
        Part(Words(WORDS, count_letter, 300)),
    ),
    "sft_val": (Part(SMOLTALK_TEST),),
    "sft_2026_train": (Part(SMOLTALK), Part(MMLU_AUX, repeat=3), Part(GSM8K, repeat=4)),
    "sft_2026_val": _VAL,
}
"""By stage and split: "mid" and "sft" of nanochat's classic pipeline, "sft_2026" the single SFT stage of its
successor."""
STAGES = tuple(name.removesuffix("_train") for name in MIXTURES if name.endswith("_train"))


# Reading


class HubRows:
    """The rows of a downloaded hub set as conversations, in nanochat's order (a permutation seeded by 42).

    Held in memory as Arrow from the first use; pickling carries only the names.
    """

    def __init__(self, data: HubSet, data_dir: Path, command: str):
        self.data = data
        folder = data.folder(data_dir)
        try:
            names = json.loads((folder / MANIFEST).read_text("utf-8"))
            self.paths = [folder / name for name in names]
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"{data.repo} ({data.subset}, {data.split}) is not in {folder}; run {command}"
            ) from None
        infos = [check_shard(path, None) for path in self.paths]
        self._ends = list(accumulate(info.rows for info in infos))
        self._tables: list[pa.Table] | None = None
        self._order: np.ndarray | None = None
        self.digest = (
            f"{folder.relative_to(data_dir)} {[path.stat().st_size for path in self.paths]} {self._ends}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": None, "_order": None}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        if self._order is None:
            self._order = np.random.default_rng(ROW_SEED).permutation(len(self))
        if self._tables is None:
            self._tables = [_read(path) for path in self.paths]
        position = int(self._order[index])
        file = bisect_right(self._ends, position)
        row = position - (self._ends[file - 1] if file else 0)
        where = f"{self.paths[file]}, row {row}"
        try:
            found = self.data.convert(self._tables[file].slice(row, 1).to_pylist()[0])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{where} does not look like {self.data.repo} ({error}); download it again."
            ) from error
        return checked(found, where)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or incomplete; make or download it again.") from error


class WordTask:
    """Generated spelling conversations; see `Words`."""

    def __init__(self, data: Words, data_dir: Path, command: str):
        self.data = data
        self.path = data.file.path(data_dir)
        if not self.path.exists():
            raise UserError(f"The word list {self.path} is missing; run {command}")
        self.digest = (
            f"{self.path.name} {self.path.stat().st_size} {data.make.__name__} {data.size} {data.split}"
        )

    def __len__(self) -> int:
        return self.data.size

    def __getitem__(self, index: int) -> Conversation:
        seed = index if self.data.split == "train" else -(index + 1)
        return self.data.make(random.Random(seed), _words(self.path))


@lru_cache(maxsize=2)
def _words(path: Path) -> list[str]:
    words = path.read_text("utf-8").split()
    if not words:
        raise UserError(f"The word list {path} is empty; delete it and download it again.")
    return words


class Mixture:
    """All examples of several sources in one deterministic order: `random.Random(42)` over (source, index)."""

    def __init__(self, sources: Sequence[tuple[Source, range]]):
        self._sources = [source for source, _ in sources]
        self._ranges = [examples for _, examples in sources]
        self._ends = list(accumulate(map(len, self._ranges)))
        if not self._ends or not self._ends[-1]:
            raise UserError("The mixture holds no conversation; check its files.")
        order = list(range(self._ends[-1]))
        random.Random(MIX_SEED).shuffle(order)
        self._order = array("q", order)
        facts = [(source.digest, examples) for source, examples in sources]
        self.digest = xxhash.xxh3_64_hexdigest(repr(facts).encode())

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Conversation:
        flat = self._order[index]
        source = bisect_right(self._ends, flat)
        local = flat - (self._ends[source - 1] if source else 0)
        return self._sources[source][self._ranges[source][local]]


def build_mixture(name: str, data_dir: str | Path | None = None) -> Mixture:
    """The mixture `name` of MIXTURES, such as "mid_train", from the files under `data_dir`.

    `data_dir` is `task_data/` in the base directory unless given. The mixture is shuffled already: read it with `shuffle=False` for nanochat's order. Raises UserError naming the
    download command when a file is missing.
    """
    if name not in MIXTURES:
        raise UserError(f"There is no mixture {name!r}; choose one of {', '.join(MIXTURES)}.")
    parts, stage = MIXTURES[name], name.rsplit("_", 1)[0]
    data_dir = Path(data_dir) if data_dir is not None else base_dir() / "task_data"
    command = f"`python -m megacontext_jax.data.mixture {stage} --data-dir {data_dir}`."
    sources: dict[Any, Source] = {}
    for part in parts:
        if part.data not in sources:
            sources[part.data] = _open(part.data, data_dir, command)
    chosen = []
    for part in parts:
        examples = range(len(sources[part.data]))[part.start : part.stop]
        chosen += [(sources[part.data], examples)] * part.repeat
    return Mixture(chosen)


def _open(data: HubSet | WebFile | Words, data_dir: Path, command: str) -> Source:
    if isinstance(data, HubSet):
        return HubRows(data, data_dir, command)
    if isinstance(data, Words):
        return WordTask(data, data_dir, command)
    path = data.path(data_dir)
    if not path.exists():
        raise UserError(f"The conversations {path} are missing; run {command}")
    return ConversationSource([path])


# Downloading


def download_mixture(stage: str, data_dir: str | Path | None = None, *, hub: str | None = None) -> list[Path]:
    """Fetches what is missing of both splits of a stage's mixture; returns the paths of all its files.

    The hub (`hub`, else HF_ENDPOINT, else huggingface.co) is asked which parquet files a set has. Raises
    UserError when it cannot be reached.
    """
    if stage not in STAGES:
        raise UserError(f"There is no mixture for {stage!r}; choose one of {', '.join(STAGES)}.")
    parts = MIXTURES[f"{stage}_train"] + MIXTURES[f"{stage}_val"]
    data_dir = Path(data_dir) if data_dir is not None else base_dir() / "task_data"
    hub = (hub or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    paths: list[Path] = []
    for data in dict.fromkeys(part.data for part in parts):
        if isinstance(data, HubSet):
            paths += _download_hub(data, data_dir, hub)
        else:
            file = data.file if isinstance(data, Words) else data
            paths += download([(file.url, file.path(data_dir))], check=None, label=file.path(data_dir).name)
    return paths


def _download_hub(data: HubSet, data_dir: Path, hub: str) -> list[Path]:
    folder, label = data.folder(data_dir), f"{data.repo} {data.split}"
    manifest, listing = folder / MANIFEST, folder / "listing.json"
    if manifest.exists():
        paths = [folder / name for name in json.loads(manifest.read_text("utf-8"))]
        if all(path.is_file() for path in paths):
            return paths
    listing.unlink(missing_ok=True)  # the hub may have changed since an interrupted download
    address = f"{hub}/api/datasets/{data.repo}/parquet/{data.subset}/{data.split}"
    download([(address, listing)], check=None, label=f"list of {label}")
    urls = _urls(listing.read_bytes())
    if not urls:
        raise UserError(f"{address} did not give a list of parquet files; check HF_ENDPOINT and try again.")
    names = [f"{i:05d}.parquet" for i in range(len(urls))]
    paths = download(zip(urls, (folder / name for name in names), strict=True), label=label)
    write_bytes(manifest, json.dumps(names).encode())
    listing.unlink()
    return paths


def _urls(listing: bytes) -> list[str]:
    """The hub's answer, empty if it is not a list of addresses."""
    try:
        urls = json.loads(listing)
    except ValueError:
        return []
    return urls if isinstance(urls, list) and all(isinstance(url, str) for url in urls) else []


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megacontext_jax.data.mixture", description="Downloads nanochat's conversations."
    )
    parser.add_argument("stage", nargs="+", choices=STAGES)
    parser.add_argument("--data-dir", help="where to put them (default: task_data in $NANOCHAT_BASE_DIR)")
    args = parser.parse_args(argv)
    for stage in args.stage:
        paths = download_mixture(stage, args.data_dir)
        sizes = [len(build_mixture(f"{stage}_{split}", args.data_dir)) for split in ("train", "val")]
        print(f"{stage}: {len(paths)} files, {sizes[0]:,} conversations to train on, {sizes[1]:,} held out")
    return 0


if __name__ == "__main__":
    from megacontext_jax.cli import run_main

    sys.exit(run_main(main))
