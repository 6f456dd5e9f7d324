"""Any change to a sealed folder is found and named."""

import json
import random

import pytest

from megacontext_jax.checkpoints import digest


@pytest.fixture
def folder(tmp_path):
    for name, content in {
        "top.txt": b"top",
        "params/a": bytes(range(256)) * 40,
        "params/deep/b": b"b" * 1000,
        "opt/empty": b"",
        "opt/c": b"c" * 77,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert digest.seal(tmp_path, {"step": 7}) == 3 + 10240 + 1000 + 77
    return tmp_path


def damage_of(folder, items=None) -> tuple[str, str] | None:
    try:
        digest.verify(folder, digest.read_manifest(folder), items)
    except digest.Damage as damage:
        return str(damage.path.relative_to(folder)), damage.reason
    return None


def test_intact(folder):
    assert damage_of(folder) is None
    assert digest.read_manifest(folder)["about"] == {"step": 7}
    assert json.loads((folder / digest.MANIFEST).read_bytes())["files"]["opt/empty"][0] == 0


def test_every_bit_of_a_file(folder):
    path = folder / "opt" / "c"
    intact = path.read_bytes()
    for bit in range(8 * len(intact)):
        changed = bytearray(intact)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert damage_of(folder) == ("opt/c", "is damaged (its digest differs)")


def test_every_bit_of_the_manifest(folder):
    path = folder / digest.MANIFEST
    intact = path.read_bytes()
    for bit in range(8 * len(intact)):
        changed = bytearray(intact)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert damage_of(folder) == (digest.MANIFEST, "is damaged (its digest differs)"), bit


def test_manifest_cut_anywhere(folder):
    path = folder / digest.MANIFEST
    intact = path.read_bytes()
    for size in random.Random(0).sample(range(len(intact)), 200):
        path.write_bytes(intact[:size])
        assert damage_of(folder) == (digest.MANIFEST, "is damaged (its digest differs)"), size
    for other in (b"[]", b"1", b"null", b'{"self": 1}', b"\xff"):
        path.write_bytes(other)
        assert damage_of(folder) == (digest.MANIFEST, "is damaged (its digest differs)"), other
    path.unlink()
    assert damage_of(folder) == (digest.MANIFEST, "is missing")


def test_sizes_and_names(folder):
    path = folder / "params" / "deep" / "b"
    path.write_bytes(b"b" * 999)
    assert damage_of(folder) == ("params/deep/b", "is truncated (999 bytes where 1000 were saved)")
    path.write_bytes(b"b" * 1001)
    assert damage_of(folder) == ("params/deep/b", "has grown (1001 bytes where 1000 were saved)")
    path.unlink()
    assert damage_of(folder) == ("params/deep/b", "is missing")
    path.write_bytes(b"b" * 1000)
    (folder / "opt" / "more").write_bytes(b"")
    assert damage_of(folder) == ("opt/more", "was not saved with this checkpoint")


def test_items_left_alone(folder):
    (folder / "opt" / "c").unlink()
    (folder / "opt" / "more").write_bytes(b"")
    assert damage_of(folder, {"params"}) is None
    (folder / "top.txt").write_bytes(b"tap")
    assert damage_of(folder, {"params"}) == ("top.txt", "is damaged (its digest differs)")


def test_a_manifest_of_another_folder_is_found_out(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "top.txt").write_bytes(b"top")
    digest.seal(other, {"step": 7})
    (folder / digest.MANIFEST).write_bytes((other / digest.MANIFEST).read_bytes())
    assert damage_of(folder)[1] == "was not saved with this checkpoint"
