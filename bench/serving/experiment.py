"""Serve loads under policies: in real time, then simulated from the same calibration. Finished cells are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.config import hash_of
from bench.errors import ConfigError
from bench.provenance import collect
from bench.results import Provenance
from bench.serving import words
from bench.serving.calibrate import calibrate
from bench.serving.engine import Engine
from bench.serving.loads import Load, Replay
from bench.serving.policies import Policy, Static
from bench.serving.queueing import Queue, Requests
from bench.serving.records import Calibration, Mode, Served, ServingCell, ServingStore, ServingStudy
from bench.serving.server import serve
from bench.serving.simulation import simulate
from bench.serving.times import ServiceTimes


@dataclass(frozen=True)
class Setup:
    """What is served, and how.

    Attributes
    ----------
    loads, policies
        Every pair of them is a cell.
    load_seeds
        Seeds of the arrivals; the same seed gives every policy and engine the same requests.
    seconds
        How long requests arrive.
    max_batch
        Most requests of a batch.
    deadline
        Seconds from arrival within which an answer is in time; ``None`` for twice what the dense model takes for a full
        batch of the longest dev example.
    real
        Whether each cell with the first load seed is also served in real time.
    replicas
        Numbers of replicas that are simulated, each with its load multiplied by ``times``.
    times
        Factors of the load that belong to ``replicas``.
    """

    loads: Sequence[Load]
    policies: Sequence[Policy]
    load_seeds: Sequence[int] = (0, 1, 2)
    seconds: float = 60.0
    max_batch: int = 16
    deadline: float | None = None
    real: bool = True
    replicas: Sequence[int] = (1,)
    times: Sequence[float] = (1.0,)


@dataclass(frozen=True)
class Pending:
    """A cell that is still to be served."""

    engine: Engine
    policy: Policy
    load: Load
    seed: int
    mode: Mode
    replicas: int
    times: float

    @property
    def label(self) -> str:
        """What it is, in a line."""
        scale = f" · {self.replicas} replicas, load × {self.times:g}" if self.mode == "simulated" else ""
        chosen = f"{self.engine.name} · {name_of(self.policy)} · {name_of(self.load)}"
        return f"{chosen} · seed {self.seed} · {self.mode}{scale}"


def name_of(choice: Load | Policy) -> str:
    """Return the text that chooses it."""
    return words.written(choice.name, choice)


class Experiment:
    """A study of serving.

    Parameters
    ----------
    engines
        All of one task, backbone and seed.
    setup
        What is served.
    store
        Where results go; what is finished there is not served again.
    command
        What a person typed.
    progress
        Says one line.

    Raises
    ------
    ConfigError
        If the store holds a study of other models, another machine, or another setup; if a static policy has a k that
        no engine has, or a load cannot be read.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        setup: Setup,
        store: ServingStore,
        command: list[str],
        progress: Callable[[str], None],
    ) -> None:
        self.engines, self.setup, self.store = {engine.name: engine for engine in engines}, setup, store
        self._check_setup()  # before an hour of calibrating and serving, and not after
        self.study = self._study(command, progress)
        self.times = {c.engine: ServiceTimes(c) for c in self.study.calibrations}

    def cells(self) -> Iterator[Pending]:
        """Yield what is not finished, what is served in real time first."""
        setup = self.setup
        scales = list(zip(setup.replicas, setup.times, strict=True))
        real: list[tuple[Mode, int, tuple[int, float]]]
        real = [("real", seed, (1, 1.0)) for seed in setup.load_seeds[:1]] if setup.real else []
        for mode, seed, (replicas, times) in [
            *real,
            *(("simulated", seed, scale) for scale in scales for seed in setup.load_seeds),
        ]:
            for load in dict.fromkeys(setup.loads):
                for engine in self.engines.values():
                    for policy in dict.fromkeys(setup.policies):
                        if isinstance(policy, Static) and policy.k not in engine.ks:
                            continue  # another engine has it
                        pending = Pending(engine, policy, load, seed, mode, replicas, times)
                        if self.store.cell(self._id(pending)) is None:
                            yield pending

    def run(self, pending: Pending, progress: Callable[[int], None] = lambda answered: None) -> ServingCell:
        """Serve a cell and store what came of it."""
        study, setup = self.study, self.setup
        requests = self._requests(pending)
        queue = Queue(
            requests,
            pending.policy,
            self.times[pending.engine.name],
            study.max_batch,
            study.deadline_seconds,
            pending.replicas,
        )
        served: Served
        if pending.mode == "real":
            served = serve(queue, pending.engine.run, progress)
        else:
            calibration = self._calibration(pending.engine.name)
            scores = {
                model.k: np.array(row, np.float32)
                for model, row in zip(calibration.models, calibration.scores, strict=True)
            }
            served = simulate(queue, scores, np.random.default_rng([pending.seed, 1]))
            progress(len(requests.arrived))
        cell_id = self._id(pending)
        cell = ServingCell(
            cell_id=cell_id,
            engine=pending.engine.name,
            policy=name_of(pending.policy),
            load=_with_content(pending.load),
            load_seed=pending.seed,
            mode=pending.mode,
            replicas=pending.replicas,
            times=pending.times,
            seconds=setup.seconds,
            offered=len(requests.arrived) / setup.seconds,
            summary=served.summary(study.deadline_seconds),
            requests=f"requests/{cell_id}.parquet" if pending.mode == "real" else None,
        )
        examples = len(self._calibration(pending.engine.name).examples)
        self.store.add(cell, served, served.tally(examples, study.deadline_seconds))
        return cell

    def count(self, pending: Pending) -> int:
        """Return how many requests a cell has."""
        return len(self._requests(pending).arrived)

    def _requests(self, pending: Pending) -> Requests:
        study = self.study
        rng = np.random.default_rng([pending.seed, 0])
        arrived = pending.load.arrivals(study.capacity * pending.times, self.setup.seconds, rng)
        if not len(arrived):
            raise ConfigError(
                f"no request arrives within {self.setup.seconds:g} s of {name_of(pending.load)}; serve longer, or more"
            )
        lengths = np.array(self._calibration(pending.engine.name).examples)
        example = rng.integers(len(lengths), size=len(arrived), dtype=np.int32)
        return Requests(arrived, example, lengths[example])

    def _calibration(self, engine: str) -> Calibration:
        return next(c for c in self.study.calibrations if c.engine == engine)

    def _id(self, pending: Pending) -> str:
        return hash_of(
            {
                "engine": pending.engine.name,
                "models": [model.source for model in pending.engine.models],
                "policy": name_of(pending.policy),
                "load": _with_content(pending.load),
                "seed": pending.seed,
                "mode": pending.mode,
                "scale": [pending.replicas, pending.times],
                "seconds": self.setup.seconds,
            }
        )[:16]

    def _study(self, command: list[str], progress: Callable[[str], None]) -> ServingStudy:
        """Return what the store holds, with every engine calibrated; capacity and deadline are set once."""
        found, setup = self.store.read(), self.setup
        first = next(iter(self.engines.values()))
        config = first.ctx.config
        if found:
            self._check(found, first)
        calibrations = {c.engine: c for c in found.calibrations} if found else {}
        new = [engine for engine in self.engines.values() if engine.name not in calibrations]
        if new:
            each = [f"{engine.name} at k = {', '.join(map(str, engine.ks))}" for engine in new]
            progress(f"calibrating {'; '.join(each)}")
            calibrations |= {made.engine: made for made in calibrate(new, setup.max_batch)}
        for engine in self.engines.values():
            held = calibrations[engine.name]
            if [m.source for m in held.models] != [m.source for m in engine.models]:
                raise ConfigError(
                    f"{self.store.folder} holds {engine.name} with the models of other runs; choose another --study"
                )
        times = ServiceTimes(calibrations[first.name])
        lengths = np.array(calibrations[first.name].examples)
        slowest = times(1, np.array([setup.max_batch]), lengths.max(keepdims=True))[0]
        study = ServingStudy(
            study=self.store.folder.name,
            task=first.ctx.task.name,
            backbone=first.ctx.spec.name,
            seed=config.seed,
            deadline_seconds=found.deadline_seconds if found else setup.deadline or round(2 * float(slowest), 3),
            max_batch=setup.max_batch,
            capacity=found.capacity if found else times.capacity(1, lengths),
            provenance=found.provenance if found else self._provenance(command, first),
            calibrations=list(calibrations.values()),
        )
        self.store.write(study)
        return study

    def _check_setup(self) -> None:
        ks = {k for engine in self.engines.values() for k in engine.ks}
        for policy in self.setup.policies:
            if isinstance(policy, Static) and policy.k not in ks:
                raise ConfigError(f"policy static:{policy.k}: the models serve k = {', '.join(map(str, sorted(ks)))}")
        for load in self.setup.loads:
            load.arrivals(1.0, self.setup.seconds, np.random.default_rng(0))

    def _check(self, found: ServingStudy, engine: Engine) -> None:
        here, there = self._provenance([], engine), found.provenance
        wanted = {
            "task": (found.task, engine.ctx.task.name),
            "backbone": (found.backbone, engine.ctx.spec.name),
            "seed": (found.seed, engine.ctx.config.seed),
            "--dev-examples": (len(found.calibrations[0].examples), len(engine.examples)),
            "--max-batch": (found.max_batch, self.setup.max_batch),
            "--deadline": (found.deadline_seconds, self.setup.deadline or found.deadline_seconds),
            "hardware": (there.hardware, here.hardware),
            "device": (there.device, here.device),
            "threads": (there.threads, here.threads),
        }
        wrong = [f"{name} {was} and not {now}" for name, (was, now) in wanted.items() if was != now]
        if not wrong and found.calibrations[0].models[0].source != engine.models[0].source:
            wrong = ["another teacher"]
        if wrong:
            raise ConfigError(f"{self.store.folder} holds a study with {', '.join(wrong)}; choose another --study")

    @staticmethod
    def _provenance(command: list[str], engine: Engine) -> Provenance:
        import torch

        device = engine.ctx.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        found = collect(command)
        found.device, found.threads = name, torch.get_num_threads()
        found.data_digest = engine.ctx.revisions["data"]
        found.model_digest = engine.ctx.revisions["model"]
        return found


def _with_content(load: Load) -> str:
    """Return what a load is called in results: a file that holds something else is another load."""
    text = name_of(load)
    return f"{text}@{hash_of({'content': load.file.read_text('utf-8')})[:8]}" if isinstance(load, Replay) else text


def all_statics(policies: Sequence[Policy], engines: Sequence[Engine]) -> list[Policy]:
    """Return the policies, and a static one for every k that an engine has."""
    ks = sorted({k for engine in engines for k in engine.ks})
    return [*(Static(k) for k in ks), *(p for p in policies if not isinstance(p, Static))]
