"""A crew: workers that each hold the model and measure one cell at a time, here as processes of this machine.

Whoever spreads work sees `Crew` only. A worker that ends, killed for its memory or by a fault of a driver, costs the
cell that it was at; another one takes its place.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

from saccade.core.errors import SaccadeError
from saccade.core.machine import cpus
from saccade.evaluate.model import Loaded, check_device, load

READY = "ready"


class CrewError(SaccadeError):
    """Workers cannot be had."""


@dataclass(frozen=True)
class Setup:
    """What a worker needs to load the model: as `saccade.evaluate.model.load`, and threads of torch (None: its own)."""

    model: str
    dtype: str
    device: str
    threads: int | None = None

    def load(self) -> Loaded:
        """The model, loaded without a word on stdout or stderr; a GPU that is named is the process's current one."""
        import torch
        from transformers.utils import logging

        if self.threads:
            torch.set_num_threads(self.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        device = torch.device(check_device(self.device))
        if device.type == "cuda" and device.index is not None:
            # the first GPU, which other workers have, is then not touched: a context alone takes some of its memory
            torch.cuda.set_device(device)
        return load(self.model, self.dtype, self.device)


@dataclass(frozen=True)
class Outcome:
    """What a worker gave back.

    Args:
        worker: which one.
        value: what the function returned.
        error: what went wrong instead, in words.
        ended: the worker itself is gone; another one has its place.
    """

    worker: int
    value: Any = None
    error: str | None = None
    ended: bool = False


class Crew(Protocol):
    """Workers that run `function(loaded, *arguments)`, one call each at a time; a context manager."""

    def idle(self) -> list[int]:
        """Workers that are ready for work."""
        ...

    def give(self, worker: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Start an idle worker on a call; function and arguments are pickled."""
        ...

    def wait(self) -> Outcome | None:
        """Wait until a call has ended, or until a worker became ready (None).

        Raises:
            CrewError: a worker could not be started.
        """
        ...

    def __len__(self) -> int: ...

    def __enter__(self) -> Crew: ...

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None: ...


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    ready: bool = False
    busy: bool = False


class Processes:
    """Workers as processes of this machine; each starts from nothing (spawn), because a GPU does not survive a fork.

    Args:
        setups: one for each worker. Several may name the same device.

    Example:
        >>> Processes([]).idle()
        []
    """

    def __init__(self, setups: Sequence[Setup]) -> None:
        self._setups = list(setups)
        self._workers: list[_Worker] = []

    def __len__(self) -> int:
        return len(self._setups)

    def __enter__(self) -> Processes:
        self._workers = [self._start(setup) for setup in self._setups]
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            worker.process.close()
        self._workers = []

    def idle(self) -> list[int]:
        return [at for at, worker in enumerate(self._workers) if worker.ready and not worker.busy]

    def give(self, worker: int, function: Callable[..., Any], *arguments: Any) -> None:
        own = self._workers[worker]
        own.busy = True
        # one that ended while it was idle: `wait` finds that out and says so
        with suppress(BrokenPipeError, ConnectionResetError):
            own.pipe.send((function, arguments))

    def wait(self) -> Outcome | None:
        pipes = {worker.pipe: at for at, worker in enumerate(self._workers)}
        at = pipes[wait(list(pipes))[0]]
        own = self._workers[at]
        try:
            value, error = own.pipe.recv()
        except (EOFError, ConnectionResetError):
            return self._ended(at)
        if not own.ready:
            if error is not None:
                raise CrewError(f"a worker could not load the model: {error}")
            own.ready = True
            return None
        own.busy = False
        return Outcome(at, value, error)

    def _ended(self, at: int) -> Outcome | None:
        own = self._workers[at]
        own.process.join()
        code = own.process.exitcode
        if not own.ready:
            raise CrewError(f"a worker ended while it was starting (exit code {code})")
        own.pipe.close()
        own.process.close()
        self._workers[at] = self._start(self._setups[at])
        said = f"WorkerEnded: the process that ran it ended (exit code {code})"
        return Outcome(at, None, said, ended=True) if own.busy else None

    def _start(self, setup: Setup) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, setup), daemon=True)
        process.start()
        # the worker's end must be held by the worker alone, or its death would not be heard
        theirs.close()
        return _Worker(process, ours)


def serve(pipe: Connection, setup: Setup) -> None:
    """What a process does: load, then one call after the other until the pipe is closed."""
    # Ctrl-C reaches all processes of a terminal; the one that started this one decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loaded = setup.load()
    except Exception as error:
        pipe.send((None, told(error)))
        return
    # whoever started this process may have ended without a word: so does this one
    with suppress(EOFError, ConnectionError):
        pipe.send((READY, None))
        while True:
            function, arguments = pipe.recv()
            pipe.send(called(loaded, function, arguments))


def called(loaded: Loaded, function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, str | None]:
    """(what a function returned, None), or (None, what went wrong)."""
    try:
        return function(loaded, *arguments), None
    except Exception as error:  # a cell that fails must not take the others with it
        return None, told(error)
    finally:
        give_memory_back(loaded)


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"


def give_memory_back(loaded: Loaded) -> None:
    """Let other processes of the GPU have what this one does not use at the moment."""
    if loaded.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def setups(loaded: Loaded, jobs: int, device: str | None, threads: int | None) -> list[Setup]:
    """A setup for each of so many workers: on the device that was named, else on all GPUs in turn.

    Args:
        loaded: the model that they will load, as it is here.
        jobs: workers.
        device: as it was asked for; None or "cuda" = all visible GPUs.
        threads: of each worker; None = its part of the CPUs.
    """
    import torch

    count = torch.cuda.device_count() if loaded.device.type == "cuda" and device in (None, "cuda") else 0
    places = [f"cuda:{at}" for at in range(count)] or [str(loaded.device)]
    threads = threads or max(1, cpus() // jobs)
    return [Setup(loaded.name, loaded.dtype, places[at % len(places)], threads) for at in range(jobs)]
