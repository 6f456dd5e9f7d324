"""What a run folder holds besides its steps: the tokenizer the model was trained with."""

from pathlib import Path

from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError

TOKENIZER = "tokenizer"


def load_tokenizer(run: Path, meta: dict) -> Tokenizer:
    """The run's own tokenizer; refused if it is not the one that the step with this `meta` was saved with."""
    folder = run / TOKENIZER
    tokenizer = Tokenizer.load(folder)
    vocabulary = meta["model_config"]["vocab_size"]
    if tokenizer.vocab_size != vocabulary or tokenizer.digest != meta["tokenizer"]:
        raise UserError(
            f"The tokenizer in {folder} ({tokenizer.vocab_size} tokens, digest {tokenizer.digest[:12]}) is not the one "
            f"of the model at step {meta['step']} ({vocabulary} tokens, digest {meta['tokenizer'][:12]}); put back the "
            "tokenizer that belongs to this run."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, run: Path) -> None:
    tokenizer.save(run / TOKENIZER)
