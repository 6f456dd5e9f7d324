"""Next-token prediction with one choice of attention, dtype and recomputation, fixed before `jit`."""

from dataclasses import dataclass
from functools import partial

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

    def init(self, key) -> dict:
        return gpt.init_params(self.cfg, key)

    def hidden(self, params, ids_BT):
        return gpt.hidden_states(
            params,
            self.cfg,
            ids_BT,
            attention=self.attention.fn,
            dtype=self.dtype,
            remat=self.remat,
            unroll=jax.default_backend() == "cpu",  # faster steps, slower to compile
            place=lambda x_BTC: self._place(x_BTC, meshes.BATCH, None, None),
        )

    def _place(self, x, *axes):
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def loss(self, params, batch, key):
        """(summed nats, number of targets) of a batch {"inputs", "targets"} [B, T]; differentiable."""
        del key
        weight = (batch["targets"] >= 0).sum().astype(jnp.float32)
        return self._nats(loss.nll_sum, params, batch), weight

    def nll(self, params, batch):
        """Nats [B, T], 0 at ignored targets."""
        return self._nats(loss.chunked_nll, params, batch)

    def _nats(self, fn, params, batch):
        x_BTC = self.hidden(params, batch["inputs"])
        (rows, T), cfg, head_VC = batch["inputs"].shape, self.cfg, params["lm_head"]
        head_VC = self._place(head_VC, "tensor", None)  # gathered once, not slice by slice
        if self.mesh is not None:
            rows = max(1, rows // meshes.batch_shards(self.mesh))
        slices = loss.num_slices(rows, T, cfg.vocab_size)
        return fn(x_BTC, head_VC, batch["targets"], cfg.logit_cap, cfg.vocab_size, slices)


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
