"""Architecture constants as data.

nanochat hard-codes its constants and has changed them over time; checkpoints do not record them. Here an
`Arch` is a row of numbers with a name, `GPTConfig` is what a checkpoint records, and the forward pass reads
both. A new generation is a new row, not a new branch.
"""

from dataclasses import asdict, dataclass

from megacontext_jax.errors import UserError


@dataclass(frozen=True)
class Arch:
    """Constants of one architecture generation."""

    name: str
    rope_base: float
    rope_bf16: bool  # cos/sin tables rounded to bfloat16, also in float32 runs
    softcap: float  # logits = softcap * tanh(z / softcap)
    qk_scale: float  # factor on q and on k after their norm; attention logits grow by its square
    proj_init: float  # output projections and head start at this fraction of the usual scale
    smear: float | None  # initial weight of the previous token's embedding; None: no smear


SMEAR_CHANNELS = 24  # of the embedding, read by the smear gate

ARCHS = {
    arch.name: arch
    for arch in (
        # nanochat, October 2025 to January 2026. Source: karpathy/nanochat at adb5d4a.
        Arch("classic", 1e4, True, 15.0, 1.0, 0.0, None),
        # For models small enough to train on a CPU in minutes: attention 2.4x sharper (with QK norm and few channels
        # per head the softmax cannot become selective otherwise), a short rotary base, output projections that do
        # not start at zero, and smear as in nanochat since March 2026: each token carries a gated share of the one
        # before it, which is half of an induction head. PyTorch nanochat cannot express this row.
        Arch("pocket", 1e3, False, 15.0, 1.55, 0.3, 2.0),
    )
}


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

    def __post_init__(self):
        if self.arch not in ARCHS:
            raise UserError(f"Unknown architecture {self.arch!r}; choose one of {', '.join(ARCHS)}.")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(
                f"Width {self.n_embd} does not split into {self.n_head} heads of even size; "
                "change --depth, --aspect-ratio or --head-dim."
            )
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} heads cannot share {self.n_kv_head} key/value heads evenly.")

    @property
    def constants(self) -> Arch:
        return ARCHS[self.arch]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    def param_shapes(self) -> dict:
        """Shapes of the params pytree; layer weights are stacked on axis 0, matrices are (out, in)."""
        L, C, V = self.n_layer, self.n_embd, self.padded_vocab_size
        kv = self.n_kv_head * self.head_dim
        smear = {"smear_gate": (1, min(SMEAR_CHANNELS, C)), "smear_lambda": (1,)}
        return {
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
            **(smear if self.constants.smear is not None else {}),
        }

    def num_params(self) -> dict[str, int]:
        """Parameter counts by group, with their total."""
        shapes = self.param_shapes()
        counts = {
            "wte": _size(shapes["wte"]),
            "lm_head": _size(shapes["lm_head"]),
            "transformer": sum(_size(shape) for shape in shapes["h"].values()),
            "scalars": sum(_size(shape) for name, shape in shapes.items() if name.startswith("smear")),
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per weight that multiplies, 12 per attention entry (nanochat)."""
        n = self.num_params()
        attention = 12 * self.n_layer * self.n_embd * self.sequence_len
        return 6 * (n["transformer"] + n["lm_head"]) + attention

    def to_dict(self) -> dict:
        return asdict(self)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def config_for_depth(
    depth: int, *, aspect_ratio: int = 64, head_dim: int = 128, n_kv_head: int = 0, **fields
) -> GPTConfig:
    """nanochat's one dial: width = depth * aspect_ratio, heads of `head_dim` (at least one)."""
    if depth < 1:
        raise UserError(f"--depth {depth} is not a model; use 1 or more.")
    width = depth * aspect_ratio
    heads = max(1, -(-width // head_dim))
    width = -(-width // heads) * heads
    return GPTConfig(n_layer=depth, n_embd=width, n_head=heads, n_kv_head=n_kv_head or heads, **fields)
