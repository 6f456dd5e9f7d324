"""One mesh from 1 to 8 devices: the same loss curve. Simulated CPU devices, each run in its own process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from megacontext_jax import mesh as meshes
from megacontext_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def start(devices: int, *args: object) -> subprocess.Popen:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.train.mesh_program", *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def single():
    return {name: finish(start(1, 1, 1, 1, name)) for name in ("adamw", "muon", "latest", "gist")}


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "optimizer"),
    [
        (8, 1, 1, "muon"),
        (1, 8, 1, "muon"),
        (2, 4, 1, "adamw"),
        (2, 2, 2, "muon"),
        (2, 2, 2, "latest"),
        (2, 2, 2, "gist"),
    ],
)
def test_eight_devices_give_the_single_device_curve(single, data, fsdp, tensor, optimizer):
    run = finish(start(8, data, fsdp, tensor, optimizer))
    wanted = single[optimizer]
    assert run["devices"] == 8
    assert len(run["losses"]) == 20
    assert wanted["losses"][-1] < 0.95 * wanted["losses"][0]
    np.testing.assert_allclose(run["losses"], wanted["losses"], rtol=1e-5)
    # fsdp and tensor split the parameters; the optimiser state is split over data as well
    # gates, scales and GistNet's head are small and whole everywhere
    params, opt = {"latest": (1.1, 1.15), "gist": (1.3, 2.0)}.get(optimizer, (1.1, 1.1))
    assert run["shares"]["params"] < params / (fsdp * tensor)
    assert run["shares"]["opt"] < opt / (data * fsdp * tensor)


def test_two_processes_give_the_single_device_curve(single):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    runs = [start(1, 2, 1, 1, "adamw", 20, address, 2, i) for i in range(2)]
    for run in map(finish, runs):
        assert run["devices"] == 2
        np.testing.assert_allclose(run["losses"], single["adamw"]["losses"], rtol=1e-5)


def test_meshes_that_do_not_fit_are_refused():
    n = jax.device_count()
    for axes in [(n + 1, 1, 1), (-1, n + 1, 1), (-1, -1, 1), (0, 1, 1)]:
        with pytest.raises(UserError, match=r"axis|xes"):
            meshes.make_mesh(*axes)
    with pytest.raises(UserError, match="--process-id"):
        meshes.start_distributed("127.0.0.1:1", 2, 2)
