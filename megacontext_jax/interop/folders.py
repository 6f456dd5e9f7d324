"""Where PyTorch nanochat keeps its files, and which of them are meant."""

import re
from dataclasses import dataclass
from pathlib import Path

from megacontext_jax.errors import UserError
from megacontext_jax.interop.model_file import read_meta_file

STAGE_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
_MODEL = re.compile(r"model_(\d+)\.pt")


@dataclass(frozen=True)
class Found:
    """One checkpoint of PyTorch nanochat."""

    stage: str
    tag: str
    step: int
    model: Path
    meta: dict
    tokenizer: Path | None  # folder with tokenizer.pkl


def find_checkpoints(
    source: Path, *, stage: str = "", tag: str = "", step: int = -1, tokenizer: Path | None = None
) -> list[Found]:
    """The checkpoints in a base dir (one per stage), a `*_checkpoints` folder, a checkpoint's folder or a model file.

    `tag` chooses among several models, or names the one in a folder that has no name of nanochat's. Without `tag` and
    `step` nanochat's own choice: the largest depth, then the latest step. Raises UserError that says what there is.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(
            f"There is no {source}; give a nanochat base dir, a checkpoint's folder or a model_*.pt."
        )
    if source.is_file():
        if not (match := _MODEL.fullmatch(source.name)):
            raise UserError(
                f"{source} is not called model_XXXXXX.pt; give nanochat's model file or its folder."
            )
        return [_found(source.parent, int(match[1]), stage, tag, tokenizer)]
    if _steps(source):
        return [_found(source, _choose_step(source, step), stage, tag, tokenizer)]
    folders = [
        source / name for s, name in STAGE_FOLDERS.items() if stage in ("", s) and _tags(source / name)
    ]
    if _tags(source):
        folders = [source]
    if not folders:
        wanted = STAGE_FOLDERS.get(stage, "*_checkpoints")
        raise UserError(
            f"{source} holds no model_*.pt, neither itself nor in {wanted}/<tag>/; give another folder."
        )
    folders = [folder for folder in folders if tag in _tags(folder)] or folders[:1] if tag else folders
    found = []
    for folder in folders:
        chosen = folder / (tag if tag in _tags(folder) else _choose_tag(folder, tag))
        found.append(_found(chosen, _choose_step(chosen, step), stage, tag, tokenizer))
    return found


def _steps(folder: Path) -> list[int]:
    return sorted(int(m[1]) for p in folder.glob("model_*.pt") if (m := _MODEL.fullmatch(p.name)))


def _tags(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and _steps(p)) if folder.is_dir() else []


def _choose_tag(folder: Path, tag: str) -> str:
    tags = _tags(folder)
    if tag:
        raise UserError(f"{folder} has no {tag!r}; it has {', '.join(tags)}.")
    depths = {t: int(m[1]) for t in tags if (m := re.match(r"d(\d+)", t))}
    if depths:
        return max(depths, key=lambda t: depths[t])
    return max(tags, key=lambda t: (folder / t).stat().st_mtime)


def _choose_step(folder: Path, step: int) -> int:
    steps = _steps(folder)
    if step >= 0 and step not in steps:
        raise UserError(f"{folder} has no step {step}; its steps are {', '.join(map(str, steps))}.")
    return steps[-1] if step < 0 else step


def _found(folder: Path, step: int, stage: str, tag: str, tokenizer: Path | None) -> Found:
    model = next(
        p for p in folder.glob("model_*.pt") if (m := _MODEL.fullmatch(p.name)) and int(m[1]) == step
    )
    number = _MODEL.fullmatch(model.name)[1]
    meta = read_meta_file(folder / f"meta_{number}.json")
    if not stage:
        known = {name: s for s, name in STAGE_FOLDERS.items()}
        stage = known.get(folder.absolute().parent.name) or _stage_by_meta(meta)
    placed = folder.absolute().parent.name in STAGE_FOLDERS.values()
    tag = folder.name if placed else tag or f"d{meta['model_config']['n_layer']}"
    return Found(stage, tag, step, model, meta, _tokenizer(folder, tokenizer))


def _stage_by_meta(meta: dict) -> str:
    """Which script wrote a meta file: SFT of 2025 notes its accuracies, RL no step, pretraining its row length."""
    if "mmlu_acc" in meta or "val_loss" in meta:
        return "sft"
    if "step" not in meta:
        return "rl"
    return "base"


def _tokenizer(folder: Path, given: Path | None) -> Path | None:
    if given is not None:
        if not (given / "tokenizer.pkl").exists():
            raise UserError(
                f"There is no tokenizer.pkl in {given}; --tokenizer names the folder that holds it."
            )
        return given
    near = (folder, folder / "tokenizer", folder.absolute().parent.parent / "tokenizer")
    return next((place for place in near if (place / "tokenizer.pkl").exists()), None)
