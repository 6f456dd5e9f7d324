import multiprocessing
import subprocess

import jax
import numpy as np
import psutil
import pytest

from megacontext_jax.telemetry import hardware


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8),
    ],
)
def test_peaks_of_known_gpus(kind, tera):
    assert hardware.peak_flops(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "Some GPU 9000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA A1000",
    ],
)
def test_no_guess_for_other_devices(kind):
    assert hardware.peak_flops(kind) is None


def test_peak_depends_on_the_type():
    assert hardware.peak_flops("Tesla V100-SXM2-32GB", "float16") == pytest.approx(125e12)
    assert hardware.peak_flops("Tesla V100-SXM2-32GB", "bfloat16") is None  # no bfloat16 units
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3", np.dtype("float16")) == pytest.approx(989.4e12)
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3", np.float32) is None


def test_jax_types_name_themselves():
    jnp = pytest.importorskip("jax.numpy")
    assert hardware.peak_flops("NVIDIA H200", jnp.bfloat16) == pytest.approx(989.4e12)
    assert hardware.peak_flops("NVIDIA H200", jnp.dtype(jnp.bfloat16)) == pytest.approx(989.4e12)


def test_description_of_this_machine():
    facts = hardware.describe()
    assert facts["cpu_cores"] >= 1
    assert 2**28 < facts["memory_bytes"] <= psutil.virtual_memory().total
    assert facts["cpu"]
    assert facts["versions"]["jax"].count(".") >= 2
    assert isinstance(facts["gpus"], list)


def test_devices_of_this_machine():
    assert hardware.memory_bytes() > 2**28
    if jax.default_backend() == "cpu":
        assert hardware.total_peak_flops() is None
        assert hardware.peak_memory() == hardware.peak_rss()


def test_peak_memory_rises_with_use_and_stays():
    before = hardware.peak_rss()
    size = before + 2**26 - psutil.Process().memory_info().rss
    block = np.ones(size, np.uint8)
    del block
    assert hardware.peak_rss() >= before + 2**25


def child_peak(queue):
    queue.put(hardware.peak_rss())


def test_peak_memory_is_this_processes_own():
    block = np.ones(2**28, np.uint8)  # the parent is large; a fresh child is not
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child_peak, args=(queue,))
    process.start()
    peak = queue.get(timeout=60)
    process.join()
    assert block[0] == 1
    assert 2**20 < peak < hardware.peak_rss()


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_git_state(tmp_path):
    assert hardware.git_state(tmp_path) is None
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first words")
    state = hardware.git_state(tmp_path)
    assert (state["branch"], state["dirty"], state["message"]) == ("trunk", False, "first words")
    assert len(state["commit"]) == 12
    (tmp_path / "a").write_text("2")
    assert hardware.git_state(tmp_path)["dirty"]
    (tmp_path / "inner").mkdir()
    assert hardware.git_state(tmp_path / "inner") is None  # a package inside a foreign repository


@pytest.mark.parametrize(
    ("mebibytes", "profile"),
    [([], "cpu"), ([8192], "cpu"), ([32_607], "5090"), ([81_559], "h100"), ([143_771], "h200")],
)
def test_profile_by_gpu_memory(monkeypatch, mebibytes, profile):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [{"name": "x", "memory_bytes": size * 2**20} for size in mebibytes]
    monkeypatch.setattr(hardware, "gpus", lambda: found)
    assert hardware.gpu_profile() == profile
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpu_profile() == "cpu"


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    listing = "NVIDIA H100 80GB HBM3, 81559\nOdd, name, 1024\nbroken\n"
    monkeypatch.setattr(hardware, "_run", lambda command: listing)
    assert hardware.gpus() == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 * 2**20},
        {"name": "Odd, name", "memory_bytes": 2**30},
    ]
    monkeypatch.setattr(hardware, "_run", lambda command: None)
    assert hardware.gpus() == []
