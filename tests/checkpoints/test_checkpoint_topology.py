"""A checkpoint belongs to no set of devices: saved on 8 it restores on 1 and 2, and by several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start(base: Path, devices: int, *args: str) -> subprocess.Popen:
    env = os.environ | {
        "NANOCHAT_BASE_DIR": str(base),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(HERE.parent.parent),
    }
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, str(HERE / "checkpoint_topology.py"), *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


def test_saved_on_8_devices(tmp_path):
    folder = tmp_path / "megacontext_base_d8"
    found = result(start(tmp_path, 8, "save", str(folder)))
    assert found == {"devices": 8, "step": 3, "position": 300}
    for devices in (1, 2):
        found = result(start(tmp_path, devices, "check", str(folder)))
        assert found == {"devices": devices, "step": 3, "position": 300}


def test_saved_by_two_processes(tmp_path):
    folder = tmp_path / "megacontext_base_p2"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    pair = [start(tmp_path, 1, "save", str(folder), coordinator, "2", str(i)) for i in range(2)]
    found = [result(process) for process in pair]
    assert [r["position"] for r in found] == [300, 301]
    assert {r["devices"] for r in found} == {2}
    alone = result(start(tmp_path, 1, "check", str(folder)))
    assert "saved by 2 processes and 1 resume it" in alone["position"]
