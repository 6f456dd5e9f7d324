"""Which files of a folder are data: by their endings, or as a data set that was saved says itself."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megacontext_jax.errors import UserError

KINDS = {
    ".arrow": "arrow",
    ".feather": "arrow",
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".txt": "txt",
}
_METADATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "manifest.json"}


def find_files(inputs: Sequence[str | Path], out: Path) -> tuple[list[Path], list[str]]:
    """(files in reading order, notes on what was left out) of files and folders.

    Folders are read with their sub-folders, numbers in names in numerical order, hidden files and `out` left out. A
    folder that Hugging Face `datasets` saved gives the files it lists; of one with splits, `train` is taken.
    Raises UserError for a path that does not exist or holds nothing to read.
    """
    files, notes = [], []
    for item in inputs:
        path = Path(item).expanduser().absolute()
        if path.is_dir():
            found = list(_in_folder(path, out, notes, set()))
            if not found:
                raise UserError(f"{path} holds no {', '.join(KINDS)} file; check the path.")
            files += found
        elif not path.exists():
            raise UserError(f"There is no file or folder {path}; check the path.")
        elif kind_of(path) is None:
            raise UserError(f"{path} is of no kind that is read ({', '.join(KINDS)}); convert or rename it.")
        else:
            files.append(path)
    return list(dict.fromkeys(files)), notes


def _in_folder(folder: Path, out: Path, notes: list[str], seen: set[Path]) -> Iterator[Path]:
    if folder.resolve() in seen or folder.resolve() == out:  # links may lead in a circle
        return
    seen.add(folder.resolve())
    names = {path.name for path in folder.iterdir()}
    if "dataset_dict.json" in names:
        splits = _metadata(folder / "dataset_dict.json", "splits", str)
        if "train" in splits and len(splits) > 1:
            others = ", ".join(split for split in splits if split != "train")
            notes.append(f"of the splits of {folder} only train is read (not {others}); name others by path.")
            splits = ["train"]
        for split in splits:
            yield from _in_folder(folder / split, out, notes, seen)
        return
    if "state.json" in names:
        listed = _metadata(folder / "state.json", "_data_files", dict)
        for path in (folder / str(entry.get("filename")) for entry in listed):
            if not path.is_file() or kind_of(path) is None:
                raise UserError(
                    f"{path}, which {folder / 'state.json'} lists, is missing; restore the data set."
                )
            yield path
        return
    caches = "dataset_info.json" in names  # what `datasets` computed from the data lies beside it
    for name in sorted(names - _METADATA, key=_numerically):
        path = folder / name
        if name.startswith(".") or name.endswith(".tmp") or (caches and re.match(r"cache-.*\.arrow$", name)):
            continue
        if path.is_dir():
            yield from _in_folder(path, out, notes, seen)
        elif kind_of(path) and path.is_file():
            yield path


def _metadata(path: Path, key: str, kind: type) -> list:
    try:
        content = json.loads(path.read_bytes())
        if content.get("_indices_data_files"):
            raise ValueError("its rows are chosen by an index; save it after flatten_indices()")
        values = content[key]
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{key!r} is no list of what it should be")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} does not describe a data set ({error}); mend it, or name the data files."
        ) from error
    return values


def kind_of(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def _numerically(name: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
