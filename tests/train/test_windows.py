"""Windows that no kernel makes cheaper: never silently dense."""

from dataclasses import replace

import pytest

from megacontext_jax.config import Config
from megacontext_jax.model.objective import make_objective
from megacontext_jax.train.plan import model_of
from megacontext_jax.train.stages import settle_windows


@pytest.mark.parametrize(
    ("impl", "asked", "fixed", "pattern", "said"),
    [
        ("xla", "", False, "L", "window pattern L takes the place of SSSL"),
        ("xla", "SSL", False, "SSL", "a mask over full attention"),
        ("xla", "", True, "SSSL", "a mask over full attention"),
        ("blocked", "", False, "SSSL", ""),
    ],
)
def test_short_windows_without_a_kernel(impl, asked, fixed, pattern, said, capsys):
    config = Config()
    config = replace(
        config,
        model=replace(
            config.model, arch="latest", depth=4, head_dim=64, max_seq_len=512, window_pattern=asked
        ),
    )
    model = model_of(config)
    objective = make_objective(model, attention_impl=impl, dtype="float32")
    model, objective = settle_windows(config, model, objective, fixed=fixed)
    assert model.window_pattern == objective.cfg.window_pattern == pattern
    out = capsys.readouterr().out
    assert said in out
    assert bool(out) == bool(said)
