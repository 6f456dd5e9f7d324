"""The training loop of every stage.

What differs between base, mid and SFT, and later between vanilla and MegaContext training, is the data, the
loss function and the horizon; a `Setup` carries those in, the loop asks no further.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes
from megacontext_jax.checkpoints.contents import save_tokenizer
from megacontext_jax.checkpoints.writer import Checkpoints
from megacontext_jax.config import Config
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.eval.bpb import bits_per_byte, make_bpb_step
from megacontext_jax.eval.working_contexts import Probe
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Phase
from megacontext_jax.runtime import print0
from megacontext_jax.telemetry import hardware, report
from megacontext_jax.telemetry.progress import StepMeter, StepPrinter, format_quantity
from megacontext_jax.telemetry.sinks import open_metrics
from megacontext_jax.train.step import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    state_from,
)
from megacontext_jax.train.stop import Stopper


@dataclass
class Setup:
    """One training run, decided before any long work."""

    stage: str
    tag: str
    folder: Path
    config: Config
    gpt: GPTConfig
    mesh: Mesh
    num_iterations: int
    accumulation: int
    phases: list[Phase]
    stream: object  # iterator of {"inputs", "targets"} [rows, T] with get_state / set_state
    init: Callable[[jax.Array], dict]
    optimizer: object
    rate: Callable  # step -> multiplier of the learning rates
    nll_fn: Callable
    tokenizer: Tokenizer
    validation: dict[str, Iterable[dict]]  # metric name -> batches of [rows, T], the same each time
    identity: dict  # what a resumed run must share with its checkpoint
    identity_defaults: dict  # values of options that older checkpoints do not know
    description: dict  # model config, tokenizer digest: what a reader of the checkpoint needs
    start_params: Callable[[object], dict] | None = None  # template -> parameters of the stage before
    probe: Probe | None = None  # further metrics at every validation
    sample: Callable[[dict], list[dict]] | None = None  # params -> [{"prompt", "completion"}]
    facts: dict = field(default_factory=dict)  # for the report

    @property
    def options(self):
        return getattr(self.config, self.stage)


class TrainingStopped(UserError):
    """The loss is no longer a number."""


class StepLog:
    """Metrics of dispatched steps, read one step late so that the host never waits for the newest."""

    def __init__(self, opts, meter: StepMeter, multiplier, metrics, describe: bool = False):
        self._opts = opts
        self._describe = describe
        self._meter = meter
        self._multiplier = multiplier
        self._metrics = metrics
        self._printer = StepPrinter()
        self._waiting: list[tuple[int, dict]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Call after anything that is not training."""
        self._clock = time.monotonic()

    def dispatched(self, step: int, values: dict) -> None:
        self._waiting.append((step, values))

    def take(self, keep: int = 0) -> None:
        """Read and log all but the newest `keep` steps."""
        ready, self._waiting = (
            self._waiting[: len(self._waiting) - keep],
            self._waiting[len(self._waiting) - keep :],
        )
        if not ready:
            return
        ready = [(step, {name: float(x) for name, x in values.items()}) for step, values in ready]
        now = time.monotonic()
        seconds, self._clock = (now - self._clock) / len(ready), now
        for step, values in ready:
            self._log(step, values, seconds)

    def _log(self, step: int, values: dict, seconds: float) -> None:
        own = {name: value for name, value in values.items() if "/" in name and not math.isnan(value)}
        values = {name: value for name, value in values.items() if "/" not in name}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingStopped(
                f"Not a number at step {step}: {', '.join(bad)}; start again with lower learning rates (--fresh "
                "--matrix-lr ...), or look at the data read there. Checkpoints saved so far are intact."
            )
        lrm = float(self._multiplier(step)) * self._opts.init_lr_frac
        report_ = self._meter.update(step, values["loss"], seconds, lrm=lrm, grad_norm=values["grad_norm"])
        if jax.process_index() == 0:
            self._printer.show(report_)
        if step % self._opts.log_every == 0 or step + 1 == self._meter.total_steps:
            self._tell_contexts(step, own)
            extra = {f"train/{name}": values[name] for name in ("param_norm", "update_norm", "weight")}
            self._metrics.log(
                report_.metrics() | extra | {"train/loss_step": values["loss"]} | own, step=step
            )

    def _tell_contexts(self, step: int, values: dict) -> None:
        """The working contexts of a step as events and, where asked for, as a line."""
        for kind, prefix, what in (
            ("lod_metrics", "mc/lod_loss/", "loss"),
            ("lod_counts", "mc/lod_count/", "count"),
        ):
            fields = {
                f"lod_{name.removeprefix(prefix)}_{what}": value
                for name, value in values.items()
                if name.startswith(prefix)
            }
            if fields:
                self._metrics.event(kind, fields, f"train_step_{step}")
        if "mc/variants_mean" not in values:
            return
        each = values["mc/variants_mean"]  # every sequence has as many
        fields = {"variants_total": values["mc/variants_total"]}
        fields |= {f"variants_{name}": each for name in ("mean", "max", "min")}
        self._metrics.event("mc_batch_stats", fields, f"train_step_{step}")
        if self._describe:
            words = ", ".join(
                f"{name.removeprefix('mc/')} {value:.4g}"
                for name, value in values.items()
                if name.startswith(
                    ("mc/delta_nll", "mc/lod_delta", "mc/lens_loss", "mc/preference_agreement")
                )
            )
            print0(f"Step {step:05d} | working contexts: {words}")


def train(setup: Setup) -> int:
    """Run a stage to its end; returns the exit status (0, or 128 + signal after a requested stop)."""
    with Checkpoints(setup.folder, keep=setup.options.keep) as checkpoints:
        return _train(setup, checkpoints)


def _train(setup: Setup, checkpoints: Checkpoints) -> int:
    opts, mesh, n_steps = setup.options, setup.mesh, setup.num_iterations
    key = jax.random.key(setup.config.run.seed)
    asked = micro_batches(setup)

    # --- A new run, one that goes on, or one that is done ------------------------------------------------
    template = abstract_state(mesh, setup.init, setup.optimizer, key)
    resume_step = checkpoints.latest_step()
    loop_state: dict = {}
    if resume_step is not None:
        meta = checkpoints.read_meta(resume_step)
        known = meta["identity"]
        ours = {k: v for k, v in setup.identity.items() if k in known or not meta.get("partial_identity")}
        checkpoints.check_compatible(known, ours, setup.identity_defaults)
        if resume_step >= n_steps and report.has_section(section_slug(setup.stage), run=run_name(setup)):
            print0(f"{setup.folder.name} is finished ({n_steps} steps); nothing to do.")
            return 0
        restored = checkpoints.restore(resume_step, params_like=template.params, opt_like=template.opt_state)
        step_array = jax.device_put(np.int32(resume_step), template.step.sharding)
        state = TrainState(restored.params, restored.opt_state, step_array)
        setup.stream.set_state(restored.data_state)
        loop_state = meta["loop_state"]
        resume_micro_batches(setup, loop_state)
        print0(f"Continuing {setup.folder.name} at step {resume_step} of {n_steps}.")
    else:
        if setup.start_params is not None:
            state = state_from(setup.start_params(template.params), template, setup.optimizer)
        else:
            state = init_state(mesh, setup.init, setup.optimizer, key)
    if jax.process_index() == 0:
        save_tokenizer(setup.tokenizer, setup.folder)

    # --- Compile each phase once, ahead of time: no step can recompile ------------------------------------
    shardings = jax.tree.map(lambda x: x.sharding, template)
    position = setup.stream.get_state()
    rows, waited = timed_next(setup.stream)
    phase = phase_at(setup, int(resume_step or 0))
    train_step, batch = compile_step(setup, phase, state, rows, shardings)
    tokens_per_step = math.prod(batch["inputs"].shape)
    bpb_step = make_bpb_step(setup.nll_fn, setup.tokenizer.token_bytes(), mesh)

    meter = StepMeter(
        n_steps,
        tokens_per_step,
        flops_per_token=phase.objective.flops_per_token,
        peak_flops=hardware.total_peak_flops(setup.facts.get("compute dtype", "float32")),
    )
    if "meter" in loop_state:
        meter.set_state(loop_state["meter"])
    best = loop_state.get("best", math.inf)
    metrics = open_metrics(
        setup.folder,
        stage=setup.stage,
        run_name=setup.config.run.run,
        config=setup.config.to_dict() | setup.description,
        resume_step=resume_step,
        primary=jax.process_index() == 0,
    )
    print0(metrics.describe())
    log = StepLog(opts, meter, setup.rate, metrics, setup.config.mc.mc_train_report)
    simulated = jax.default_backend() == "cpu" and mesh.size > 1
    results: dict[str, float] = dict(loop_state.get("results", {}))

    def save(step: int, blocking: bool) -> None:
        log.take()
        meta = {
            "stage": setup.stage,
            "tag": setup.tag,
            "num_iterations": n_steps,
            "identity": setup.identity,
            "config": setup.config.to_dict(),
            "loop_state": {
                "meter": meter.get_state(),
                "best": best,
                "results": results,
                "micro_batches": {"asked": asked, "accumulation": setup.accumulation},
            },
            **setup.description,
        }
        checkpoints.save(
            step,
            params=state.params,
            opt_state=state.opt_state,
            data_state=position,
            meta=meta,
            blocking=blocking,
        )
        log.restart_clock()

    def validate(step: int) -> None:
        nonlocal best
        for name, batches in setup.validation.items():
            results[name] = bits_per_byte(bpb_step, state.params, batches, mesh)
        best = min(best, results["val/bpb"])
        bits = {name.split("/", 1)[1]: results[name] for name in setup.validation}
        print0(f"Step {step:05d} | " + " | ".join(f"{name}: {value:.6f}" for name, value in bits.items()))
        more = setup.probe(state.params) if setup.probe else {}
        results.update({name: value for name, value in more.items() if name.startswith("val/")})
        if more:
            for line in (*setup.probe.lines(more), setup.probe.training_line(phase.objective, step)):
                if line:
                    print0(f"Step {step:05d} | {line}")
            for kind, fields in setup.probe.events(more):
                metrics.event(kind, fields, f"validation_step_{step}")
        metrics.log(results | more, step=step)
        log.restart_clock()

    def show_samples() -> list[dict]:
        samples = setup.sample(state.params) if setup.sample else []
        for s in samples:
            print0(f"  {s['prompt']!r} -> {s['completion']!r}")
        log.restart_clock()
        return samples

    # --- The loop ----------------------------------------------------------------------------------------
    step = int(resume_step or 0)
    saved = step if resume_step is not None else -1
    with metrics, Stopper() as stopper:
        while True:
            last_step = step >= n_steps

            # stop here if a signal asks for it
            stop_signal = stopper.requested(step)
            if stop_signal:
                if saved != step:
                    save(step, blocking=True)
                print0(f"Saved step {step} of {n_steps}; run the same command to continue.")
                return 128 + stop_signal

            # once in a while, and before anything that comes after the last step: save
            if (
                saved != step
                and step > 0
                and (last_step or (opts.save_every > 0 and step % opts.save_every == 0))
            ):
                save(step, blocking=last_step)
                saved = step

            # once in a while: bits per byte on held-out text
            if last_step or (opts.eval_every > 0 and step % opts.eval_every == 0):
                log.take()
                validate(step)

            # once in a while: let it speak
            samples = []
            if last_step or (opts.sample_every > 0 and step > 0 and step % opts.sample_every == 0):
                samples = show_samples()
            if last_step:
                break

            # where the objective changes, its step is compiled
            if phase_at(setup, step) is not phase:
                log.take()
                phase = phase_at(setup, step)
                meter.flops_per_token = phase.objective.flops_per_token
                train_step, batch = compile_step(setup, phase, state, rows, shardings)
                log.restart_clock()

            # a single training step; the next batch is read while the device is busy
            state, values = train_step(state, batch)
            log.dispatched(step, values | about_batch(setup, tokens_per_step, waited, values))
            step += 1
            if step < n_steps:
                position = setup.stream.get_state()
                rows, waited = timed_next(setup.stream)
                batch = place(setup, rows)
            if simulated:
                jax.block_until_ready(values)  # simulated devices deadlock on queued collectives
            log.take(keep=1)
            checkpoints.check()

        # a stop asked for during the last evaluation: no report, so that the same command evaluates again
        if stopper.signal:
            return 128 + stopper.signal

    if jax.process_index() == 0:
        write_report(setup, meter, results, best, samples)
    return 0


def timed_next(stream) -> tuple[dict, float]:
    """The next rows, and the seconds until they were there."""
    started = time.perf_counter()
    rows = next(stream)
    return rows, time.perf_counter() - started


def about_batch(setup: Setup, tokens: int, waited: float, values: dict) -> dict[str, float]:
    """What the host knows of a step's batch, as metrics."""
    found = {
        "train/tokens_per_step": tokens,
        "train/grad_accum_steps": setup.accumulation,
        "time/dataloader_ms": 1e3 * waited,
    }
    if "mc/variants_mean" in values:
        found["mc/grad_accum_steps"] = setup.accumulation
    return found


def phase_at(setup: Setup, step: int) -> Phase:
    return [phase for phase in setup.phases if phase.first_step <= step or phase is setup.phases[0]][-1]


def place(setup: Setup, rows: dict) -> dict:
    """A step's rows of this process on the mesh as [accumulation, rows, tokens]."""
    A = setup.accumulation
    return {
        name: meshes.global_batch(setup.mesh, rows[name].reshape(A, -1, rows[name].shape[-1]))
        for name in ("inputs", "targets")
    }


def micro_batches(setup: Setup) -> dict[str, int]:
    """How a step's rows are dealt out."""
    return {"accumulation": setup.accumulation, "shards": meshes.batch_shards(setup.mesh)}


def resume_micro_batches(setup: Setup, loop_state: dict) -> None:
    """Goes on with the accumulation of the checkpoint, which an earlier phase may have raised.

    Randomness derives from the number of the micro-batch, so another accumulation draws other working contexts. A run
    whose flags or devices deal the rows out in another way begins as these say.
    """
    saved = loop_state.get("micro_batches")  # older checkpoints do not have it
    if saved and saved["asked"] == micro_batches(setup):
        setup.accumulation = saved["accumulation"]


def compile_step(setup: Setup, phase: Phase, state: TrainState, rows: dict, shardings: TrainState):
    """(compiled step, batch) of a phase.

    With `mc_auto_batch` micro-batches are halved, and the accumulation of the run doubled, until what the
    compiled step asks for fits the device.
    """
    objective, mesh, opts = phase.objective, setup.mesh, setup.config.mc
    jitted = make_train_step(
        objective.loss,
        setup.optimizer,
        shardings,
        mesh,
        seed=setup.config.run.seed,
        summarise=objective.summarise,
    )
    limit = hardware.memory_bytes() / max(1.0, opts.mc_auto_batch_safety) if opts.mc_auto_batch else math.inf
    if jax.default_backend() == "cpu":
        limit /= mesh.size  # simulated devices share the machine's memory
    while True:
        batch = place(setup, rows)
        started = time.monotonic()
        compiled = jitted.lower(state, batch).compile()
        needed = hardware.compiled_memory(compiled)
        print0(
            f"Compiled the training step in {time.monotonic() - started:.1f} s: {batch['inputs'].shape[1]} rows in "
            f"{setup.accumulation} micro-batch(es), {format_quantity(needed, 'B')} per device."
        )
        if needed <= limit:
            return compiled, batch
        micro = batch["inputs"].shape[1] // meshes.batch_shards(mesh)
        if micro < 2:
            raise UserError(
                f"One row per device needs {format_quantity(needed, 'B')} and the device has "
                f"{format_quantity(limit, 'B')} for it (--mc-auto-batch-safety {opts.mc_auto_batch_safety}); use "
                "--remat full, --fsdp-axis, a smaller --depth or --max-seq-len."
            )
        factor = next(f for f in range(2, micro + 1) if micro % f == 0)
        setup.accumulation *= factor
        print0(f"That is more than {format_quantity(limit, 'B')}: micro-batches of {micro // factor} rows.")


def section_slug(stage: str) -> str:
    return {"base": "base-model-training", "mid": "midtraining", "sft": "chat-sft"}[stage]


def run_name(setup: Setup) -> str:
    return f"{setup.folder.name}/{setup.num_iterations}"


def write_report(setup: Setup, meter: StepMeter, results: dict, best: float, samples: list[dict]) -> None:
    title = {"base": "Base model training", "mid": "Midtraining", "sft": "Chat SFT"}[setup.stage]
    state = meter.get_state()
    facts = {
        "run": run_name(setup),
        **setup.facts,
        "Minimum validation bpb": best,
        **{f"Final {name}": value for name, value in results.items()},
        "Training tokens": state["total_tokens"],
        "Total training time (s)": state["total_seconds"],
        "Peak memory of the process (GB)": hardware.peak_rss() / 1e9,
        **(
            {}
            if jax.default_backend() == "cpu"
            else {"Peak memory per device (GB)": hardware.peak_memory() / 1e9}
        ),
    }
    report.write_section(
        section_slug(setup.stage),
        title,
        facts,
        run=run_name(setup),
        metrics=setup.folder / "metrics.jsonl",
        samples=samples,
    )
