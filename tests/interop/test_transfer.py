"""Checkpoints of PyTorch nanochat into our runs and back, to the last bit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from megacontext_jax.checkpoints.restore import read_meta
from megacontext_jax.errors import UserError
from megacontext_jax.interop.folders import find_checkpoints
from megacontext_jax.interop.model_file import read_meta_file, read_model
from megacontext_jax.interop.names import era_named, era_of
from megacontext_jax.interop.optim_file import (
    BUFFERS,
    MOMENTS,
    OptimizerFiles,
    adam_groups,
    fill_state,
    matrices,
    rank_files,
)
from megacontext_jax.interop.torch_file import StoredTensor, TorchFile, write_torch_file
from megacontext_jax.interop.transfer import export_checkpoint, import_checkpoint
from megacontext_jax.model import gpt
from scripts import export_nanochat, import_nanochat
from tests.model.nanochat_weights import CASES, by_name, golden_model
from tests.train.test_optim import run_golden, trained_as

GOLDEN = Path(__file__).parents[1] / "golden"
RESUME = sorted(path.name for path in (GOLDEN / "nanochat/resume").iterdir())


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Everything in a torch file by its place: arrays as they are, other leaves as objects."""
    found = {}

    def walk(value, place):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{place}/{key}")
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                walk(inner, f"{place}/{i}")
        else:
            found[place] = value.read() if isinstance(value, StoredTensor) else value

    with TorchFile(path) as file:
        walk(file.tree, "")
    return found


def assert_bit_equal(ours: Path, theirs: Path, without=()):
    a, b = tensors(ours), tensors(theirs)
    for place in without:
        a, b = ({k: v for k, v in x.items() if place not in k} for x in (a, b))
    assert list(a) == list(b)
    for place, wanted in b.items():
        if isinstance(wanted, np.ndarray):
            assert (a[place].dtype, a[place].shape) == (wanted.dtype, wanted.shape), place
            assert a[place].tobytes() == wanted.tobytes(), place
        else:
            assert a[place] == wanted, place


@pytest.fixture
def stranger(tmp_path):
    """Makes a checkpoint folder of nanochat whose tokenizer has as many tokens as the model."""

    def make(source: Path, name: str = "their") -> Path:
        folder = tmp_path / name / "base_checkpoints" / "d2"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.npz", "greedy.json"))
        return folder

    return make


def tokenizer_of(vocab_size: int, folder: Path) -> Path:
    """A tokenizer.pkl of a given size; golden models have fewer tokens than there are bytes and special tokens."""
    from megacontext_jax.data import tokenizer_files as files
    from megacontext_jax.data.tokenizer import SPLIT_PATTERN

    folder.mkdir(parents=True, exist_ok=True)
    merges = [bytes([i]) for i in range(256)]
    merges += [b"ab%d" % i for i in range(vocab_size - len(files.SPECIAL_TOKENS) - 256)]
    specials = tuple((name, len(merges) + i) for i, name in enumerate(files.SPECIAL_TOKENS))
    vocabulary = files.Vocabulary(SPLIT_PATTERN, tuple(merges), specials)
    (folder / "tokenizer.pkl").write_bytes(files.to_pickle(vocabulary))
    return folder


def enlarged(folder: Path, vocab_size: int) -> None:
    """A golden model with a vocabulary that a tokenizer can have: more rows of the same kind."""
    model, meta = next(folder.glob("model_*.pt")), next(folder.glob("meta_*.json"))
    content = json.loads(meta.read_text())
    content["model_config"]["vocab_size"] = vocab_size
    meta.write_text(json.dumps(content, indent=2))
    rows = vocab_size if content["model_config"].get("window_pattern") is None else -(-vocab_size // 64) * 64
    arrays = {name[1:]: x for name, x in tensors(model).items()}
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        if any(word in name for word in ("wte", "lm_head", "value_embeds")):
            arrays[name] = rng.standard_normal((rows, *x.shape[1:])).astype(x.dtype)
    write_torch_file(model, arrays)


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_every_era_comes_back_bit_equal(case, stranger, tmp_path):
    folder = stranger(GOLDEN / "nanochat" / case)
    enlarged(folder, 301)
    softcap = 20.0 if "softcap20" in case else 0.0
    (found,) = find_checkpoints(folder, tokenizer=tokenizer_of(301, tmp_path / "tok"))
    done = import_checkpoint(found, softcap=softcap)
    assert done.cfg.logit_cap == (20.0 if softcap else 15.0)
    out = export_checkpoint(done.folder, tmp_path / "out")
    meta, model = (p for p in out.files if p.name.startswith(("model", "meta")))
    assert_bit_equal(model, found.model)
    assert json.loads(meta.read_text()) == found.meta
    assert model.name == found.model.name


@pytest.mark.parametrize("kind", ["bfloat16 embeddings", "float16", "prefix", "one file, no folder"])
def test_what_is_special_about_a_file_comes_back(kind, stranger, tmp_path):
    folder = stranger(GOLDEN / "nanochat/head_gqa_padvocab")
    enlarged(folder, 320)
    path = next(folder.glob("model_*.pt"))
    arrays = {name[1:]: x for name, x in tensors(path).items()}
    if kind == "bfloat16 embeddings":  # as trained on a GPU; NaN payloads and infinities included
        for name in ("transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"):
            arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)
        arrays["transformer.wte.weight"].view(np.uint16).reshape(-1)[:4] = [0x7F80, 0xFF80, 0x8000, 0x0001]
    elif kind == "float16":
        arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.float16)
    elif kind == "prefix":
        arrays = {f"_orig_mod.{name}": x for name, x in arrays.items()}
    write_torch_file(path, arrays)
    source = path if kind == "one file, no folder" else folder.parent
    (found,) = find_checkpoints(source, tokenizer=tokenizer_of(320, tmp_path / "tok"))
    done = import_checkpoint(found)
    out = export_checkpoint(done.folder, tmp_path / "out")
    assert_bit_equal(next(p for p in out.files if p.name.startswith("model")), path)


@pytest.mark.parametrize("era", ["pipeline_classic", "pipeline_head"])
def test_a_base_directory_comes_over_with_its_tokenizer(era, tmp_path, capsys):
    base = GOLDEN / era / "base_dir"
    import_nanochat.main([str(base)])
    folder = Path(os.environ["MEGACONTEXT_ARTIFACTS"]) / "megacontext_base_d2"
    assert read_meta(folder)["step"] == 7
    assert str(folder) in capsys.readouterr().out
    export_nanochat.main(["-i", "base", "--out", str(tmp_path / "out")])
    for path in sorted(base.rglob("*")):
        other = tmp_path / "out" / path.relative_to(base)
        if path.suffix == ".pt":
            assert_bit_equal(other, path)
        elif path.suffix == ".pkl":
            assert other.read_bytes() == path.read_bytes()
        elif path.suffix == ".json" and "meta" in path.name:
            assert json.loads(other.read_text()) == json.loads(path.read_text())
    with pytest.raises(UserError, match="not overwritten"):
        export_nanochat.main(["-i", "base", "--out", str(tmp_path / "out")])
    import_nanochat.main([str(base)])
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="--as"):
        import_nanochat.main(
            [str(GOLDEN / "nanochat/head_mha_L"), "--tag", "d2", "--tokenizer", str(base / "tokenizer")]
        )
    (tmp_path / "out/base_checkpoints/d2/model_000007.pt").unlink()
    (tmp_path / "out/base_checkpoints/d2/optim_000007_rank5.pt").write_bytes(b"theirs")
    with pytest.raises(UserError, match="rank5"):
        export_nanochat.main(["-i", "base", "--out", str(tmp_path / "out")])


def opened(folder: Path):
    path = next(folder.glob("model_*.pt"))
    model = read_model(path, read_meta_file(next(folder.glob("meta_*.json"))))
    return model, OptimizerFiles(rank_files(path), model.cfg, model.origin)


@pytest.mark.parametrize("name", RESUME)
def test_training_goes_on_as_in_nanochat(name):
    """Optimiser files of every kind, two GPUs included; three further steps."""
    folder = GOLDEN / "nanochat/resume" / name
    z = np.load(folder / "continue_golden.npz")
    model, files = opened(folder / "base_checkpoints/d2")
    opts = replace(trained_as(model.cfg.arch), grad_clip=float(z["grad_clip"]))
    with files as state:
        assert state.step == 3

        def opt_state(like):
            return jax.tree.map(jnp.asarray, fill_state(like, model.cfg, state, 3))

        after, losses, _ = run_golden(model.cfg, model.params, opts, z, first=3, opt_state=opt_state)
    np.testing.assert_allclose(losses, z["losses"][3:], rtol=1e-6)
    final = by_name(model.cfg, after.params)
    for tensor, wanted in zip(z["param_names"], z["final_param_norms"], strict=True):
        if not (name == "latest" and tensor == "backout_lambda"):  # its gradient is rounding there
            assert np.linalg.norm(np.float64(final[tensor])) == pytest.approx(float(wanted), rel=2e-6), tensor


@pytest.mark.parametrize("name", ["classic_world2", "latest_world2"])
def test_shards_of_two_gpus_give_the_whole_state(name):
    folder = GOLDEN / "nanochat/resume" / name
    whole = np.load(folder / "full_state.npz")
    with opened(folder / "base_checkpoints/d2")[1] as state:
        for key in whole:
            np.testing.assert_array_equal(
                state.read(*key.split(":", 1)), whole[key].reshape(state.read(*key.split(":", 1)).shape)
            )


@pytest.mark.parametrize("name", RESUME)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_optimiser_state_comes_back_for_any_number_of_gpus(name, ranks, stranger, tmp_path):
    source = GOLDEN / "nanochat/resume" / name / "base_checkpoints/d2"
    folder = stranger(source)
    vocab = 320
    grow(folder, vocab)
    (found,) = find_checkpoints(folder, tokenizer=tokenizer_of(vocab, tmp_path / "tok"))
    done = import_checkpoint(found)
    files = rank_files(found.model)
    assert done.ranks == len(files)
    out = export_checkpoint(done.folder, tmp_path / "out", ranks=ranks)
    written = [p for p in out.files if p.name.startswith("optim")]
    assert len(written) == ranks
    if ranks == len(files):  # the very file, but for its name and the number type of a counter
        for ours, theirs in zip(written, files, strict=True):
            assert_bit_equal(ours, theirs)
    model = read_model(found.model, found.meta)
    kinds = [(kind, n) for group in adam_groups(model.cfg) for n in group for kind in MOMENTS]
    kinds += [
        (kind, n) for n in matrices(model.cfg) for kind in BUFFERS[: 1 if model.cfg.arch == "classic" else 2]
    ]
    with (
        OptimizerFiles(files, model.cfg, model.origin) as a,
        OptimizerFiles(written, model.cfg, model.origin) as b,
    ):
        assert a.step == b.step
        for kind, tensor in kinds:
            np.testing.assert_array_equal(
                a.read(kind, tensor), b.read(kind, tensor), err_msg=f"{kind} {tensor}"
            )


def grow(folder: Path, vocab: int) -> None:
    """`enlarged`, and the moments of the embeddings with it; of several GPUs each part."""
    enlarged(folder, vocab)
    ranks = sorted(folder.glob("optim_*.pt"))
    model = read_model(next(folder.glob("model_*.pt")), read_meta_file(next(folder.glob("meta_*.json"))))
    names = [n for group in adam_groups(model.cfg) for n in group]
    rows = {
        i: model.origin.vocab_rows
        for i, n in enumerate(names)
        if any(w in n for w in ("wte", "lm_head", "value"))
    }
    for rank, path in enumerate(ranks):
        with TorchFile(path) as file:
            tree = copied(file.tree)
        entries = (tree[0] if isinstance(tree, list) else tree)["state"]
        for index, count in rows.items():
            for kind in MOMENTS:
                width = entries[index][kind].shape[1]
                whole = np.random.default_rng([index, MOMENTS.index(kind)]).random((count, width), np.float32)
                sharded = len(ranks) > 1 and (model.cfg.arch == "classic" or whole.size >= 1024)
                entries[index][kind] = np.split(whole, len(ranks))[rank] if sharded else whole
        write_torch_file(path, tree)


def copied(value):
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value.read() if isinstance(value, StoredTensor) else value


def test_the_era_is_read_from_the_tensors_or_given():
    for case in CASES:
        cfg, _, _ = golden_model(GOLDEN / "nanochat" / case)
        wanted = {"classic": "classic", "head": "latest"}.get(case.split("_")[0], case.split("_")[0])
        assert cfg.arch == wanted.replace("era3b", "era3")
    assert [era_named(w) for w in ("1", "era2", "3b", "5", "latest")] == [
        "classic",
        "era2",
        "era3b",
        "latest",
        "latest",
    ]
    cfg, params, _ = golden_model(GOLDEN / "nanochat/era3_feb05_ve32_half_window")
    shapes = {
        "resid_lambdas": (3,),
        "value_embeds.0.weight": (256, 16),
        "transformer.h.0.attn.ve_gate.weight": (1, 20),
    }
    with pytest.raises(UserError, match="20 channels"):
        era_of(shapes)
    path = next((GOLDEN / "nanochat/era3_feb05_ve32_half_window").glob("model_*.pt"))
    meta = read_meta_file(next(path.parent.glob("meta_*.json")))
    assert "softcap 20" in read_model(path, meta).notes[0]
    assert read_model(path, meta, era="3b").cfg.logit_cap == 20.0
    ids = np.arange(8)[None]
    capped = gpt.forward(params, replace(cfg, softcap=20.0), ids)
    assert float(jnp.abs(capped - gpt.forward(params, cfg, ids)).max()) > 1e-3


def edited_meta(**changes):
    def edit(folder: Path):
        path = next(folder.glob("meta_*.json"))
        content = json.loads(path.read_text())
        content["model_config"] |= changes
        path.write_text(json.dumps(content))

    return edit


def edited_model(edit):
    def apply(folder: Path):
        path = next(folder.glob("model_*.pt"))
        arrays = {name[1:]: x for name, x in tensors(path).items()}
        write_torch_file(path, edit(arrays))

    return apply


def broken_meta(text: bytes):
    return lambda folder: next(folder.glob("meta_*.json")).write_bytes(text)


DAMAGE = {
    "a tensor is missing": (edited_model(lambda a: {k: v for k, v in a.items() if "h.1.mlp.c_fc" not in k}), "c_fc"),
    "a tensor too many": (edited_model(lambda a: a | {"transformer.h.9.attn.c_q.weight": np.zeros(3, np.float32)}), "h.9"),
    "a tensor transposed": (edited_model(lambda a: a | {"transformer.h.0.mlp.c_fc.weight": a["transformer.h.0.mlp.c_fc.weight"].T.copy()}), "c_fc.*64"),
    "integers": (edited_model(lambda a: a | {"resid_lambdas": a["resid_lambdas"].astype(np.int32)}), "int32"),
    "a list": (edited_model(lambda a: [*a.values()]), "state dict"),
    "another width": (edited_meta(n_embd=128), "shape"),
    "another vocabulary": (edited_meta(vocab_size=9000), "9000"),
    "more layers": (edited_meta(n_layer=7), "lacks"),
    "absurd layers": (edited_meta(n_layer=10**9), "n_layer"),
    "no number": (edited_meta(n_head="two"), "n_head"),
    "heads that do not divide": (edited_meta(n_head=3), "heads"),
    "a window nobody knows": (edited_meta(window_pattern="SXL"), "SXL"),
    "a fork's setting": (edited_meta(n_experts=8), "n_experts"),
    "no JSON": (broken_meta(b"<html>"), "damaged"),
    "a list for a meta": (broken_meta(b"[]"), "model_config"),
    "no meta": (lambda folder: next(folder.glob("meta_*.json")).unlink(), "missing"),
    "a truncated model": (lambda folder: os.truncate(next(folder.glob("model_*.pt")), 5000), "truncated"),
}  # fmt: skip


def read_all(folder: Path):
    return [read_model(found.model, found.meta) for found in find_checkpoints(folder)]


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(name, stranger):
    folder = stranger(GOLDEN / "nanochat/head_mha_L")
    damage, word = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=word) as refused:
        read_all(folder)
    assert str(folder) in str(refused.value) or name in (
        "heads that do not divide",
        "a window nobody knows",
        "a fork's setting",
    )
    assert not list(Path(os.environ["MEGACONTEXT_ARTIFACTS"]).glob("*"))


def test_a_rank_that_is_missing_and_foreign_state_are_refused(tmp_path):
    source = GOLDEN / "nanochat/resume/latest_world2/base_checkpoints/d2"
    folder = tmp_path / "d2"
    shutil.copytree(source, folder)
    (folder / "optim_000003_rank0.pt").rename(folder / "optim_000003_rank2.pt")
    with pytest.raises(UserError, match="rank0"):
        rank_files(folder / "model_000003.pt")
    (folder / "optim_000003_rank1.pt").rename(folder / "optim_000003_rank0.pt")
    (folder / "optim_000003_rank2.pt").unlink()
    with pytest.raises(UserError, match="not the optimiser state of this model"), opened(folder)[1]:
        pass  # one of two parts
    shutil.copy(GOLDEN / "nanochat/resume/era4/base_checkpoints/d2/optim_000003_rank0.pt", folder)
    with pytest.raises(UserError, match="not the optimiser state of this model"), opened(folder)[1]:
        pass
    write_torch_file(folder / "optim_000003_rank0.pt", {"state": [], "param_groups": 3})
    with pytest.raises(UserError, match="unknown form"), opened(folder)[1]:
        pass


def test_places_without_a_checkpoint_or_tokenizer_are_named(tmp_path, stranger):
    for source, word in [
        (tmp_path / "nowhere", "nowhere"),
        (tmp_path, "no model_"),
        (GOLDEN / "pipeline_classic/base_dir/tokenizer/tokenizer.pkl", "model_XXXXXX"),
    ]:
        with pytest.raises(UserError, match=word):
            find_checkpoints(source)
    base = GOLDEN / "pipeline_head/base_dir"
    with pytest.raises(UserError, match="no step 9"):
        find_checkpoints(base, step=9)
    with pytest.raises(UserError, match="no 'd9'"):
        find_checkpoints(base, tag="d9")
    with pytest.raises(UserError, match="--tokenizer"):
        import_nanochat.main([str(stranger(GOLDEN / "nanochat/head_mha_L"))])
    with pytest.raises(UserError, match="320 tokens"):
        import_nanochat.main(
            [str(stranger(GOLDEN / "nanochat/head_swa", "other")), "--tokenizer", str(base / "tokenizer")]
        )
    with pytest.raises(UserError, match="era"):
        import_nanochat.main([str(base), "--era", "9"])
