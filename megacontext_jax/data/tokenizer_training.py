"""A tokenizer is trained once: how it was trained is noted beside it, and a save that was cut short is completed.

`training.json` is written before the tokenizer's own files and names the tokenizer by its digest. So wherever a
kill falls there is either no tokenizer, and it is trained again, or one that is known with its options. A
tokenizer without that note, or with the note of another, was put there by other means (PyTorch nanochat).
"""

import json
from pathlib import Path
from typing import Any

from megacontext_jax.config import TokenizerConfig
from megacontext_jax.data import tokenizer_files as files
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.files import remove_stale_scratch, write_bytes

NOTE = "training.json"


def find_trained(folder: Path, options: TokenizerConfig) -> Tokenizer | None:
    """The finished tokenizer in `folder`, with files a kill left out put in; None if there is none.

    Raises UserError if it was trained with other options, or a file is damaged.
    """
    if files.read_folder(folder) is None:
        return None
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(tokenizer, options.vocab_size, folder)
    note = read_note(folder, tokenizer)
    if note is None:
        return tokenizer
    for name in ("max_chars", "doc_cap"):
        wanted, flag = getattr(options, name), "--" + name.replace("_", "-")
        if note[name] != wanted:
            raise UserError(
                f"The tokenizer in {folder} was trained with {flag} {note[name]} and {flag} is now {wanted}; use "
                f"{flag} {note[name]}, or move that folder away to train another."
            )
    remove_stale_scratch(folder)
    tokenizer.save(folder)
    return tokenizer


def keep_trained(tokenizer: Tokenizer, folder: Path, options: TokenizerConfig, seconds: float) -> None:
    """Saves a tokenizer that was just trained, its note first. Raises UserError if another one lies there."""
    remove_stale_scratch(folder)
    if (
        files.read_folder(folder) is not None
    ):  # another process was as fast: leave its note alone if it differs
        tokenizer.save(folder)
    note = {
        "digest": tokenizer.digest,
        "vocab_size": options.vocab_size,
        "max_chars": options.max_chars,
        "doc_cap": options.doc_cap,
        "seconds": seconds,
    }
    write_bytes(folder / NOTE, (json.dumps(note, indent=1) + "\n").encode())
    tokenizer.save(folder)


def read_note(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """How `tokenizer` in `folder` was trained: the sizes asked for and the seconds it took; None if unknown."""
    path = folder / NOTE
    try:
        note = json.loads(path.read_bytes())
        if note["digest"] != tokenizer.digest:
            return None
        numbers = [note[name] for name in ("vocab_size", "max_chars", "doc_cap", "seconds")]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("a number is missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and the tokenizer is used as it is."
        ) from error
    return note


def check_vocabulary(tokenizer: Tokenizer, wanted: int, folder: Path) -> None:
    """Refuse a finished tokenizer of another size than `wanted`.

    A text that ran out of pairs gives fewer tokens than were asked for, which is right as long as the same
    number is asked for again. Raises UserError.
    """
    note = read_note(folder, tokenizer)
    asked = tokenizer.vocab_size if note is None else note["vocab_size"]
    if asked == wanted:
        return
    short = (
        "" if asked == tokenizer.vocab_size else f" (its training asked for {asked}, the text gave no more)"
    )
    raise UserError(
        f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens{short} and --vocab-size is {wanted}; use "
        f"--vocab-size {asked}, or move that folder away and run python -m scripts.tok_train again."
    )
