"""A crew of Ray actors (docs.ray.io): several GPUs, or several machines that see the same model under the same name."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

from saccade.core.errors import UnsupportedError
from saccade.evaluate.crew import CrewError, Outcome, Setup, called
from saccade.evaluate.model import Loaded


class Hand:
    """A worker, as an actor."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.loaded: Loaded | None = None

    def load(self) -> None:
        """Load the model."""
        self.loaded = self.setup.load()

    def call(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        """One call."""
        assert self.loaded is not None
        return called(self.loaded, function, arguments)


class Actors:
    """Workers as Ray actors; joins the cluster that RAY_ADDRESS names, else starts Ray on this machine.

    Args:
        setup: of each worker; its device is "cpu" or "cuda", Ray deals out the GPUs.
        jobs: workers; None = one per GPU, without GPUs one per two CPUs.

    Raises:
        UnsupportedError: Ray is not installed.
    """

    def __init__(self, setup: Setup, jobs: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UnsupportedError("ray is not installed; `pip install 'saccade[ray]'`, or use --jobs") from None
        self._ray, self._setup, self._jobs = ray, setup, jobs
        self._mine = False
        self._actors: list[Any] = []
        self._running: dict[Any, int] = {}
        self._starting: dict[Any, int] = {}
        self._idle: set[int] = set()

    def __len__(self) -> int:
        return len(self._actors)

    def __enter__(self) -> Actors:
        ray = self._ray
        if not ray.is_initialized():
            # nothing of an evaluation is anybody else's business
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            ray.init(logging_level="ERROR", log_to_driver=False, **local)
            self._mine = True
        has = ray.cluster_resources()
        cuda = self._setup.device.startswith("cuda")
        gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 1))
        if cuda and not gpus:
            raise CrewError("the Ray cluster has no GPUs; use --device cpu")
        count = self._jobs or (gpus if cuda else max(1, cpus // 2))
        # Ray puts no actor on more than one GPU as long as its share is one over a whole number
        self._options = {
            "num_gpus": 1 / -(-count // gpus) if cuda else 0,
            "num_cpus": min(1, cpus / count),
            "max_restarts": 0,
        }
        self._actors = [None] * count
        for at in range(count):
            self._start(at)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._mine:
            self._ray.shutdown()

    def idle(self) -> list[int]:
        return sorted(self._idle)

    def give(self, worker: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._idle.discard(worker)
        self._running[self._actors[worker].call.remote(function, *arguments)] = worker

    def wait(self) -> Outcome | None:
        (ref,), _ = self._ray.wait([*self._running, *self._starting], num_returns=1)
        starting = ref in self._starting
        at = (self._starting if starting else self._running).pop(ref)
        try:
            found = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if starting:
                raise CrewError(f"a worker could not load the model: {str(error).strip().splitlines()[-1]}") from None
            self._start(at)
            return Outcome(at, None, f"WorkerEnded: the actor that ran it ended ({type(error).__name__})", ended=True)
        self._idle.add(at)
        return None if starting else Outcome(at, *found)

    def _start(self, at: int) -> None:
        self._actors[at] = self._ray.remote(**self._options)(Hand).remote(self._setup)
        self._starting[self._actors[at].load.remote()] = at
