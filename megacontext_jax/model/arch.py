"""Architecture constants as data.

nanochat hard-codes its constants and has changed them over time; checkpoints do not record them. Here an
`Arch` is a row of numbers with a name, `GPTConfig` is what a checkpoint records, and the forward pass reads
both. A new generation is a new row, not a new branch.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from kernels_pallas import GistSpec
from megacontext_jax.errors import UserError


@dataclass(frozen=True)
class Init:
    """How a new model of an architecture starts. "Usual" is N(0, min(1, sqrt(out / in)) / sqrt(in))."""

    wte_std: float = 1.0
    uniform: bool = True  # matrices U(-s, s) with s = sqrt(3 / width); else the usual normal
    head_std: float | None = 0.001  # None: usual times `proj`
    proj: float = 0.0  # output projections: usual times this
    fc: float = 1.0  # factor on s for the MLP's first matrix
    resid: tuple[float, float] = (1.0, 1.0)  # residual scales, from the first layer to the last
    x0: tuple[float, float] = (0.0, 0.0)  # embedding scales, likewise
    gate: float = 0.0  # gates are U(0, this)
    smear: float = 0.0
    backout: float = 0.0


@dataclass(frozen=True)
class Arch:
    """Constants of one architecture generation."""

    name: str
    init: Init
    rope_base: float
    rope_bf16: bool  # cos/sin tables rounded to bfloat16, also in float32 runs
    softcap: float  # logits = softcap * tanh(z / softcap)
    qk_scale: float  # factor on q and on k after their norm; attention logits grow by its square
    lambdas: bool = False  # learned scales of the residual stream and of the embedding, at every layer
    ve_channels: int = 0  # channels read by the gates of the value embeddings; 0: no value embeddings
    ve_scale: float = 0.0  # gates lie between 0 and this
    smear: bool = False  # each token carries a gated share of the embedding before it
    backout: bool = False  # the stream at half depth is partly subtracted at the end
    window_pattern: str = "L"  # of new models, tiled over the layers; the last layer is always long
    short_divisor: int = 2  # the short window is the sequence length over this,
    short_tile: int = 0  # rounded up to this (0: rounded down to a whole number)
    width_rule: str = "shared"  # of odd depths: shared, kept or whole_heads, see `config_for_depth`


SMEAR_CHANNELS = 24  # of the embedding, read by the smear gate
VOCAB_TILE = 64  # embedding and head are padded to a multiple of this
ATTENTIONS = ("dense", "sliding", "gist")
GIST_POSITIONS = ("gaussian", "plain")

# nanochat's generations, each by what changed; in brackets the commit of karpathy/nanochat it was read from.
# October 2025 to 11 January 2026 (adb5d4a).
_CLASSIC = Arch(
    "classic",
    Init(uniform=False, head_std=None),
    rope_base=1e4,
    rope_bf16=True,
    softcap=15.0,
    qk_scale=1.0,
)
# 11 to 16 January 2026 (b33e394): scales per layer, sliding windows.
_ERA2 = replace(_CLASSIC, name="era2", init=Init(), lambdas=True, window_pattern="SSSL", width_rule="kept")
# 18 January to 2 March 2026 (2c062aa): value embeddings.
_ERA3 = replace(
    _ERA2, name="era3", init=Init(x0=(0.1, 0.1)), ve_channels=32, ve_scale=2.0, width_rule="whole_heads"
)
# 2 to 9 March 2026 (324e69c): another soft cap; nothing in a file tells it from era3.
_ERA3B = replace(_ERA3, name="era3b", softcap=20.0)
# 9 to 14 March 2026 (6ed7d1d): a longer rotary base, sharper attention, narrower gates, windows in tiles.
_ERA4 = replace(
    _ERA3,
    name="era4",
    init=Init(wte_std=0.8, fc=0.5, x0=(0.1, 0.1), gate=0.02),
    rope_base=1e5,
    rope_bf16=False,
    qk_scale=1.15,
    ve_channels=12,
    ve_scale=3.0,
    short_divisor=3,
    short_tile=128,
)
# Since 14 March 2026 (a825e63; 92d63d4 of July 2026): smear and backout.
_LATEST = replace(
    _ERA4,
    name="latest",
    init=Init(wte_std=0.8, fc=0.4, resid=(1.15, 1.05), x0=(0.20, 0.05), gate=0.02, backout=0.2),
    qk_scale=1.2,
    smear=True,
    backout=True,
    short_divisor=4,
)
# For models small enough to train on a CPU in minutes: attention 2.4x sharper (with QK norm and few channels
# per head the softmax cannot become selective otherwise), a short rotary base, output projections that do
# not start at zero, and smear: each token carries a gated share of the one before it, which is half of an
# induction head. PyTorch nanochat cannot express this row.
_POCKET = Arch(
    "pocket",
    Init(uniform=False, head_std=None, proj=0.3, smear=2.0),
    rope_base=1e3,
    rope_bf16=False,
    softcap=15.0,
    qk_scale=1.55,
    smear=True,
)

NANOCHAT = (_CLASSIC, _ERA2, _ERA3, _ERA3B, _ERA4, _LATEST)  # what PyTorch nanochat can express
ARCHS = {arch.name: arch for arch in (*NANOCHAT, _POCKET)}


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model; hashable, so it can be a static argument under `jit`."""

    arch: str = "classic"
    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "L"  # S (short) and L (all) tiled over the layers
    softcap: float = 0.0  # 0: the architecture's
    rope_share: float = 1.0  # of the channels, the fastest ones: these turn with the position, the others are alike everywhere
    attention: str = "dense"  # who sees whom: dense, or as below
    # the pattern of gist attention (`GistSpec`); sliding: as many tokens back as its queries see rows
    gist_block: int = 32
    gist_window: int = 256
    gist_mid_spans: int | tuple[int, ...] = 1
    gist_levels: int = 2
    gist_positions: str = "gaussian"  # of gist rows: phases damped by the span, or plain

    def __post_init__(self):
        for flag, value, known in (
            ("attention", self.attention, ATTENTIONS),
            ("gist-positions", self.gist_positions, GIST_POSITIONS),
        ):
            if value not in known:
                raise UserError(f"--{flag} does not take {value!r}; choose one of {', '.join(known)}.")
        if self.attention != "dense":
            self._check_pattern()
        if self.arch not in ARCHS:
            raise UserError(f"Unknown architecture {self.arch!r}; choose one of {', '.join(ARCHS)}.")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(
                f"Width {self.n_embd} does not split into {self.n_head} heads of even size; "
                "change --depth, --aspect-ratio or --head-dim."
            )
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly.")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise UserError(
                f"--window-pattern {self.window_pattern!r} must be made of S (short window) and L (long), e.g. SSSL."
            )
        if not 0 < self.rope_share <= 1:
            raise UserError(f"--rope-share {self.rope_share} must lie in (0, 1].")
        if self.softcap < 0:
            raise UserError(f"--softcap {self.softcap} must be positive (0 takes the architecture's).")

    def _check_pattern(self):
        try:
            _ = self.gist_spec
        except ValueError as error:
            raise UserError(f"--attention {self.attention}: {error}") from None
        if "S" in self.window_pattern.upper():
            raise UserError(
                f"--attention {self.attention} is the pattern of every layer; leave --window-pattern "
                f"{self.window_pattern} out, or set it to L."
            )

    @cached_property
    def gist_spec(self) -> GistSpec:
        return GistSpec(self.gist_block, self.gist_window, self.gist_mid_spans, self.gist_levels)

    def keys_per_token(self) -> np.ndarray:
        """Rows [sequence_len] that each token's query sees in gist attention, itself included."""
        ranges = self.gist_spec.key_ranges(0, np.arange(self.sequence_len))
        return sum(stop - start for start, stop in ranges)

    @property
    def constants(self) -> Arch:
        return ARCHS[self.arch]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def logit_cap(self) -> float:
        return self.softcap or self.constants.softcap

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings and the head: the vocabulary rounded up to a multiple of 64."""
        return _round_up(self.vocab_size, VOCAB_TILE)

    def windows(self) -> tuple[int, ...]:
        """Per layer, how many tokens back a query sees besides itself; `sequence_len` where that is all."""
        if self.attention == "sliding":
            return (min(self.sequence_len, int(self.keys_per_token().max()) - 1),) * self.n_layer
        divisor, tile = self.constants.short_divisor, self.constants.short_tile
        S, pattern = self.sequence_len, self.window_pattern.upper()
        short = _round_up(-(-S // divisor), tile) if tile else S // divisor
        last = self.n_layer - 1
        return tuple(
            short if pattern[i % len(pattern)] == "S" and i != last else S for i in range(self.n_layer)
        )

    def value_embed_layers(self) -> tuple[int, ...]:
        """The layers with value embeddings: every second one, the last included."""
        if not self.constants.ve_channels:
            return ()
        return tuple(range((self.n_layer - 1) % 2, self.n_layer, 2))

    def layer_period(self) -> tuple[int, int]:
        """(p, n): layers repeat their window and their value embeddings with period p, n whole times.

        What follows the n * p first layers (the last layer may break the pattern) stands by itself.
        """
        ve = self.value_embed_layers()
        kinds = [(window, i in ve) for i, window in enumerate(self.windows())]
        longest = math.lcm(len(self.window_pattern), 2 if ve else 1)
        period = next(
            p
            for p in range(1, longest + 1)
            if p == longest or all(k == kinds[i % p] for i, k in enumerate(kinds[:-1]))
        )
        period = min(period, self.n_layer)
        repeats = 0
        while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
            repeats += 1
        return period, repeats

    def param_shapes(self) -> dict:
        """Shapes of the params pytree; layer weights are stacked on axis 0, matrices are (out, in)."""
        L, C, V, arch = self.n_layer, self.n_embd, self.padded_vocab_size, self.constants
        kv, ve = self.n_kv_head * self.head_dim, len(self.value_embed_layers())
        shapes = {
            "wte": (V, C),
            "lm_head": (V, C),
            "h": {
                "c_q": (L, C, C),
                "c_k": (L, kv, C),
                "c_v": (L, kv, C),
                "attn_proj": (L, C, C),
                "c_fc": (L, 4 * C, C),
                "mlp_proj": (L, C, 4 * C),
            },
        }
        if arch.lambdas:
            shapes |= {"resid_lambdas": (L,), "x0_lambdas": (L,)}
        if ve:
            shapes |= {"value_embeds": (ve, V, kv), "ve_gate": (ve, self.n_kv_head, min(arch.ve_channels, C))}
        if arch.smear:
            shapes |= {"smear_gate": (1, min(SMEAR_CHANNELS, C)), "smear_lambda": (1,)}
        if arch.backout:
            shapes |= {"backout_lambda": (1,)}
        return shapes

    def num_params(self) -> dict[str, int]:
        """Parameter counts by group, with their total (nanochat's groups: gates of values count as matrices)."""
        sizes = {name: math.prod(shape) for name, shape in self.param_shapes().items() if name != "h"}
        matrices = sum(math.prod(shape) for shape in self.param_shapes()["h"].values())
        counts = {
            "wte": sizes.pop("wte"),
            "value_embeds": sizes.pop("value_embeds", 0),
            "lm_head": sizes.pop("lm_head"),
            "transformer": matrices + sizes.pop("ve_gate", 0),
            "scalars": sum(sizes.values()),
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per weight that multiplies, 12 per attention entry (nanochat).

        With gist attention this is the dense model's, over the tokens alone (`GistRows` counts what it does)."""
        n = self.num_params()
        gate = math.prod(self.param_shapes().get("smear_gate", (0,)))
        attention = sum(12 * self.n_embd * min(window, self.sequence_len) for window in self.windows())
        return 6 * (n["transformer"] + n["lm_head"] + gate) + attention

    def to_dict(self) -> dict:
        return asdict(self)


def _round_up(n: int, tile: int) -> int:
    return -(-n // tile) * tile


def config_for_depth(
    depth: int,
    *,
    arch: str = "classic",
    aspect_ratio: int = 64,
    head_dim: int = 128,
    n_kv_head: int = 0,
    window_pattern: str = "",
    **fields,
) -> GPTConfig:
    """nanochat's one dial: width = depth * aspect_ratio, heads of `head_dim` (at least one).

    Without a window pattern the architecture's own is taken.
    """
    if depth < 1:
        raise UserError(f"--depth {depth} is not a model; use 1 or more.")
    if arch not in ARCHS:
        raise UserError(f"Unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}.")
    width = depth * aspect_ratio
    heads = max(1, -(-width // head_dim))
    rule = ARCHS[arch].width_rule
    if rule == "whole_heads":  # heads of exactly the size asked for
        width = heads * head_dim
    elif rule == "kept":  # the divisor of the width nearest to the wanted number of heads, the larger of two
        ideal = max(1, round(width / head_dim))
        heads = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: (abs(h - ideal), -h))
    else:  # rounded up until the heads share it (nanochat's classic refuses such depths)
        width = _round_up(width, heads)
    return GPTConfig(
        arch=arch,
        n_layer=depth,
        n_embd=width,
        n_head=heads,
        n_kv_head=n_kv_head or heads,
        window_pattern=window_pattern or ARCHS[arch].window_pattern,
        **fields,
    )
