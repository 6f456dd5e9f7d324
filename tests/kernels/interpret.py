"""Mosaic GPU's interpret mode on CPUs, each kernel body compiled once.

JAX 0.10 compiles the body again for every point of the grid and every warpgroup, which takes minutes for what runs
in milliseconds. Its private function is replaced by one that keeps the program; later versions are left alone if
that function is not there.
"""

import threading

import jax
from jax._src import core
from jax._src.pallas.mosaic.interpret import thread_map

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # before 0.11
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

_programs: dict = {}
_lock = threading.Lock()


def _run_once_compiled(jaxpr, consts, *args):
    def run(consts, *args):
        core.eval_jaxpr(getattr(jaxpr, "jaxpr", jaxpr), consts, *args)

    key = id(jaxpr), tuple((getattr(x, "shape", ()), str(getattr(x, "dtype", type(x)))) for x in args)
    with _lock:
        if key not in _programs:
            program = jax.jit(run).lower(consts, *args).compile()
            _programs[key] = program, jaxpr  # alive, so that its id stays its own
    _programs[key][0](consts, *args)


if hasattr(thread_map, "_run_jaxpr"):
    thread_map._run_jaxpr = _run_once_compiled


def interpreted(**options):
    return InterpretGPUParams(**options)
