"""Next-token prediction with one choice of attention, dtype and recomputation, fixed before `jit`."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from megacontext_jax import mesh as meshes
from megacontext_jax.model import gpt, loss
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import Choice, select_attention


@dataclass(frozen=True)
class Objective:
    """The functions of a model that training and evaluation call."""

    cfg: GPTConfig
    attention: Choice
    dtype: jnp.dtype
    remat: str = "none"
    mesh: Mesh | None = None

    @property
    def flops_per_token(self) -> float:
        return self.cfg.flops_per_token()

    @property
    def platform(self) -> str:
        """Of the devices that run it, or that it is compiled for."""
        return self.mesh.devices.flat[0].platform if self.mesh is not None else jax.default_backend()

    def init(self, key) -> dict:
        return gpt.init_params(self.cfg, key)

    def place(self, x, *axes):
        """Puts an array on the mesh; the batch axis is the first unless axes are given."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        axes = axes or (meshes.BATCH, *(None,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def trunk(self, params, entries: gpt.Entries, attention=None, watch=None):
        """Final normed activations [B, T, C]; with `watch` as in `gpt.run_trunk`."""
        return gpt.run_trunk(
            params,
            self.cfg,
            entries,
            attention=attention or self.attention.fn,
            remat=self.remat,
            unroll=self.platform == "cpu",  # faster steps, slower to compile
            place=self.place,
            watch=watch,
        )

    def hidden(self, params, ids_BT):
        return self.trunk(params, gpt.token_entries(params, self.cfg, ids_BT, self.dtype, self.place))

    def loss(self, params, batch, key):
        """Summed nats of a batch {"inputs", "targets"} [B, T], and (number of targets, no statistics)."""
        del key
        weight = (batch["targets"] >= 0).sum().astype(jnp.float32)
        x_BTC = self.hidden(params, batch["inputs"])
        return self.nats(loss.nll_sum, params, x_BTC, batch["targets"]), (weight, {})

    def summarise(self, stats) -> dict:
        """Metrics of a step from the statistics of its micro-batches: none."""
        del stats
        return {}

    def nll(self, params, batch):
        """Nats [B, T], 0 at ignored targets."""
        x_BTC = self.hidden(params, batch["inputs"])
        return self.nats(loss.chunked_nll, params, x_BTC, batch["targets"])

    def nats(self, fn, params, x_BTC, *labels):
        """`fn` of model.loss with this model's head, soft cap and slices."""
        (rows, T), cfg = x_BTC.shape[:2], self.cfg
        head_VC = self.place(params["lm_head"], "tensor", None)  # gathered once, not slice by slice
        if self.mesh is not None:
            rows = max(1, rows // meshes.batch_shards(self.mesh))
        slices = loss.num_slices(rows, T, cfg.vocab_size)
        return fn(x_BTC, head_VC, *labels, cfg.logit_cap, cfg.vocab_size, slices)


class Phase(NamedTuple):
    """From `first_step` on training has this objective; its step is compiled once, when it begins."""

    first_step: int
    objective: object  # loss, summarise, flops_per_token


def make_objective(
    cfg: GPTConfig, *, attention_impl: str, dtype, remat: str = "none", mesh: Mesh | None = None
) -> Objective:
    platform = jax.default_backend()
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    attention = select_attention(
        attention_impl,
        platform=platform,
        dtype=dtype,
        head_dim=cfg.head_dim,
        capability=capability and float(capability),
    )
    return Objective(cfg, attention, jnp.dtype(dtype), remat, mesh)


def abstract_params(cfg: GPTConfig):
    """Shapes of the parameters, without making them."""
    return jax.eval_shape(partial(gpt.init_params, cfg), jax.random.key(0))
