"""Save and check, or only check, a small state on the devices of this process (several processes with COORDINATOR).

python checkpoint_topology.py save|check FOLDER [COORDINATOR N_PROCESSES PROCESS]
"""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megacontext_jax.checkpoints.restore import load_params, restore
from megacontext_jax.checkpoints.writer import Checkpoints
from megacontext_jax.errors import UserError

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def host_state() -> tuple:
    params = {
        "wte": np.arange(16 * 6, dtype=np.float32).reshape(16, 6) / 7,
        "h": {"c_q": jnp.arange(3 * 8 * 4, dtype=jnp.bfloat16).reshape(3, 8, 4) / 3},
    }
    state = OPTIMIZER.init(params)
    return params, jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), state)


def sharding_of(mesh: Mesh, x) -> NamedSharding:
    axes = ["data" if size % mesh.size == 0 and size > 1 else None for size in x.shape]
    first = axes.index("data") if "data" in axes else -1
    return NamedSharding(mesh, PartitionSpec(*[a if i == first else None for i, a in enumerate(axes)]))


def placed(tree, mesh: Mesh):
    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding_of(mesh, x), lambda index: x[index])

    return jax.block_until_ready(jax.tree.map(put, tree))


def template(tree, mesh: Mesh):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(mesh, x)), tree)


def require_equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        for shard in a.addressable_shards:
            assert (np.asarray(shard.data) == np.asarray(b)[shard.index]).all()


def save(folder: Path) -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params, opt_state = placed(host_state(), mesh)
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            position = {"next": 100 * step + jax.process_index(), "note": "x" * (1 + 5 * jax.process_index())}
            meta = {"stage": "base"}
            checkpoints.save(step, params=params, opt_state=opt_state, data_state=position, meta=meta)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        # only process 0 looks at the folder, all of them are told
        expected = "exists and is not overwritten" if jax.process_index() == 0 else "Process 0 stopped"
        with pytest.raises(UserError, match=expected):
            checkpoints.save(3, params=params, opt_state=opt_state, data_state={}, meta={})


def check(folder: Path) -> dict:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params, opt_state = host_state()
    restored = restore(folder, params_like=template(params, mesh), opt_like=template(opt_state, mesh))
    require_equal(restored.params, params)
    require_equal(restored.opt_state, opt_state)
    assert restored.params["wte"].sharding.is_equivalent_to(sharding_of(mesh, params["wte"]), 2)
    require_equal(load_params(folder, 2, template(params, mesh)), params)
    try:
        position = restored.data_state["next"]
    except UserError as error:
        position = str(error)
    return {"devices": jax.device_count(), "step": restored.step, "position": position}


def main(action: str, folder: str, coordinator: str = "", count: str = "1", index: str = "0") -> None:
    if coordinator:
        jax.distributed.initialize(coordinator, int(count), int(index))
    if action == "save":
        save(Path(folder))
    print(json.dumps(check(Path(folder))), flush=True)
    if coordinator:
        jax.distributed.shutdown()


if __name__ == "__main__":
    assert os.environ.get("JAX_PLATFORMS") == "cpu"
    main(*sys.argv[1:])
