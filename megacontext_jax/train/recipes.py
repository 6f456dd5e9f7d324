"""How nanochat's generations are optimised, as data: `--optimizer` names a row.

A `Recipe` says which rate, betas and decay each group of parameters gets, how Muon orthogonalises, and how
rates, decay and horizon follow from batch and model. Numbers a user may turn are options (`StageConfig`), set
for each architecture in `configs/archs/`. Source: karpathy/nanochat at the commits named.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Adam:
    """AdamW of one group: rate = option `rate` (None: 1) * `factor` (* (width / 768)^-0.5 if `wide`)."""

    rate: str | None
    factor: float = 1.0
    wide: bool = False
    betas: tuple[float, float] | None = None  # None: the options adam_beta1, adam_beta2
    decay: float | None = None  # None: the option weight_decay


# Polar Express (arXiv 2505.16932) for five steps, safety factor 2e-2, cushion 2
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class Muon:
    """How a matrix's momentum becomes its update."""

    coefficients: tuple[tuple[float, float, float], ...] = (
        (3.4445, -4.7750, 2.0315),
    ) * 5  # Keller Jordan's quintic
    margin: float = 1.0  # the norm is multiplied by this before it divides,
    epsilon: float = 1e-7  # and this is added
    beta2: float = 0.0  # NorMuon's variance reduction (arXiv 2510.05491); 0: none, and no cautious decay
    equilibrate: bool = False  # rows scaled to their mean norm first (MuonEq, arXiv 2603.28254)
    renormalise: bool = False  # result scaled to the norm of an orthogonal matrix (Muon+, arXiv 2602.21545)


@dataclass(frozen=True)
class Momentum:
    """Muon's momentum: `start` to `peak` over `steps`, then `final` at the end of the warm-down."""

    peak: float = 0.95
    steps: int = 300
    final: float | None = None
    start: float = 0.85


CLASSIC_MUON, CLASSIC_MOMENTUM = Muon(), Momentum()


@dataclass(frozen=True)
class Recipe:
    groups: dict[str, Adam]  # group -> AdamW; "matrix" only where Muon is not used
    muon: Muon | None = CLASSIC_MUON
    momentum: Momentum = CLASSIC_MOMENTUM  # of pretraining; later stages use the default
    decay_schedule: str = "constant"  # of Muon's decay: constant, linear or cosine to zero
    decay_scaling: str = (
        "none"  # none; depth: (12 / depth)^2; horizon: sqrt(batch / 2^19) * tokens(d12) / tokens
    )
    decay_matrices: bool = False  # plain decoupled decay of Muon's matrices; nanochat's is none, or cautious
    scale_rates: bool = False  # all rates times sqrt(batch / 2^19)
    count_all: bool = True  # tokens per parameter counts embeddings too; else matrices and head


def group_of(path: tuple[str, ...]) -> str:
    """The group of a leaf of the params pytree: the blocks of GistNet and LensNet are matrices like the GPT's."""
    name = path[0]
    if name in ("gistnet", "lensnet"):
        return "matrix" if path[1] == "h" else "context"
    return {
        "wte": "wte",
        "lm_head": "lm_head",
        "value_embeds": "value_embeds",
        "resid_lambdas": "resid",
        "x0_lambdas": "x0",
        "h": "matrix",
        "ve_gate": "matrix",
    }.get(name, "scalar")


_CLASSIC = Recipe(
    {
        "context": Adam("context_lr", decay=0.0),
        "lm_head": Adam("unembedding_lr", wide=True),
        "wte": Adam("embedding_lr", wide=True),
        "value_embeds": Adam("embedding_lr", wide=True),
        "resid": Adam("scalar_lr", 0.01),
        "x0": Adam("scalar_lr"),
        "scalar": Adam("scalar_lr"),
    }
)
_ADAMW = Recipe(
    {name: replace(adam, wide=False) for name, adam in _CLASSIC.groups.items()}
    | {"matrix": Adam("matrix_lr")},
    muon=None,
)
# b33e394: AdamW without decay, Muon with Polar Express, variance reduction and cautious decay
_ERA2 = Recipe(
    {name: replace(adam, decay=0.0) for name, adam in _CLASSIC.groups.items()},
    muon=Muon(_POLAR, margin=1.02, epsilon=1e-6, beta2=0.95),
    decay_schedule="linear",
    decay_scaling="depth",
    scale_rates=True,
)
# 2c062aa
_ERA3 = replace(
    _ERA2, groups=_ERA2.groups | {"x0": Adam("scalar_lr", betas=(0.96, 0.95), decay=0.0)}, count_all=False
)
# 324e69c
_ERA3B = replace(_ERA3, decay_scaling="horizon")
# 6ed7d1d
_ERA4 = replace(
    _ERA3B,
    groups={
        "context": Adam("context_lr", betas=(0.8, 0.95), decay=0.0),
        "lm_head": Adam("unembedding_lr", wide=True, betas=(0.8, 0.96), decay=0.01),
        "wte": Adam("embedding_lr", wide=True, betas=(0.8, 0.995), decay=0.001),
        "value_embeds": Adam("embedding_lr", 0.5, wide=True, betas=(0.8, 0.995), decay=0.01),
        "resid": Adam("scalar_lr", 0.01, betas=(0.8, 0.95), decay=0.05),
        "x0": Adam("scalar_lr", betas=(0.96, 0.95), decay=0.0),
        "scalar": Adam(None, 0.2, betas=(0.8, 0.95), decay=0.0),
    },
    muon=Muon(_POLAR, margin=1.01, epsilon=1e-6, beta2=0.9),
    momentum=Momentum(peak=0.97, steps=400),
    decay_schedule="cosine",
)
# 92d63d4; equilibration and renormalisation since 3 July 2026
_LATEST = replace(
    _ERA4,
    muon=replace(_ERA4.muon, equilibrate=True, renormalise=True),
    momentum=Momentum(peak=0.97, steps=400, final=0.90),
)
# Matrices that grow without bound turn ever more slowly, and what a model has not learned early it never learns: with
# decay, lookup in the context forms for every seed tried (docs/performance.md). PyTorch nanochat has no such row.
_POCKET = Recipe(
    {name: replace(adam, decay=0.0) for name, adam in _CLASSIC.groups.items()},
    decay_matrices=True,
    decay_schedule="cosine",
)

RECIPES = {
    "muon": _CLASSIC,
    "adamw": _ADAMW,
    "era2": _ERA2,
    "era3": _ERA3,
    "era3b": _ERA3B,
    "era4": _ERA4,
    "latest": _LATEST,
    "pocket": _POCKET,
}
