"""What the processes of one run tell each other around files. With one process all of it is free."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from megacontext_jax.errors import UserError


def agree(error: BaseException | None) -> None:
    """Raise `error` here and a `UserError` on the other processes if any process has one; call on all."""
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(error is not None))
        if error is None and failed.any():
            raise UserError(f"Process {int(failed.argmax())} stopped at a checkpoint; its message says why.")
    if error is not None:
        raise error


def gather_json(value) -> list:
    """The JSON-able values of all processes, in their order; call on all."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
