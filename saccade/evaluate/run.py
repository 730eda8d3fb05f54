"""The evaluation runner: every method on the same samples of every task and length, a row on disk per cell.

A cell is (method, task, length). Rows go to `rows.jsonl` one by one, so that a run that was cut off goes on where it
stopped; `config.json` beside it says what was asked for, and a run that asks for something else is refused. A crew of
workers gives the same scores as this process alone; times are then taken afterwards, when all is quiet.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saccade.core.errors import FileError, InputError, SaccadeError
from saccade.core.files import write_whole
from saccade.core.plan import Plan
from saccade.evaluate import headmap
from saccade.evaluate.cells import (
    FIELDS,
    KEY,
    TIMED,
    Drawn,
    Found,
    Job,
    batch_of,
    clock,
    draw,
    draw_packed,
    get_task,
    measure,
    measure_packed,
)
from saccade.evaluate.crew import Crew, told
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import resolve
from saccade.evaluate.samples import Cell
from saccade.evaluate.samples import append as append_lines
from saccade.hf.attach import attach

Group = tuple[str, int]  # task and length: all methods get the same samples of it
Tell = Callable[[dict[str, Any], int, int], None]


@dataclass(frozen=True)
class Ask:
    """What an evaluation is asked for; two runs in one folder must agree on all of it.

    Args:
        model: name or folder of the model.
        methods: names of presets, or plan files.
        tasks: names of tasks.
        lengths: tokens of prompt and answer together.
        samples: samples per cell.
        seed: of the samples.
        dtype, device: of the model.
        plan_files: digest of each plan file among the methods, so that an edited one is noticed.
    """

    model: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int = 10
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    plan_files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.methods and self.tasks and self.lengths):
            raise InputError("eval: needs at least one method or plan, one task and one length")
        if self.samples < 1 or min(self.lengths) < 1:
            raise InputError(f"eval: samples and lengths must be >= 1, got {self.samples} and {list(self.lengths)}")

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """All (method, task, length), short ones first so that something is there soon."""
        for length in self.lengths:
            for task in self.tasks:
                for method in self.methods:
                    yield method, task, length


@dataclass
class Store:
    """The folder of an evaluation: config.json and rows.jsonl.

    Args:
        folder: made where it is missing.
    """

    folder: Path
    by_cell: dict[Cell, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], ask: Ask) -> Store:
        """Open or start; rows that were cut off or failed are taken out, to be done again.

        Raises:
            FileError: the folder holds an evaluation with other arguments, or a file that is none of ours.
        """
        store = cls(Path(folder))
        store.folder.mkdir(parents=True, exist_ok=True)
        config = store.folder / "config.json"
        wanted = json.loads(json.dumps(asdict(ask)))
        if config.exists():
            _same(_read(config), wanted, config)
        elif store.path.exists() and store.path.stat().st_size:
            raise FileError(f"{store.path}: there are rows but no config.json; choose another --out")
        else:
            write_whole(config, json.dumps(wanted, indent=1) + "\n")
        store._load(ask)
        return store

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return self.folder / "rows.jsonl"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The last row of each cell, failed ones included."""
        return list(self.by_cell.values())

    def has(self, cell: Cell) -> bool:
        """Is this cell finished?"""
        return cell in self.by_cell

    def append(self, row: dict[str, Any]) -> None:
        """Add a row: one write at the end of the file, on the disk before this returns.

        Of rows of the same cell the last one counts.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        self.by_cell[cell_of(row)] = row

    def finish(self, cell: Cell, found: Found | str) -> dict[str, Any]:
        """Put away what came of a cell, its samples and maps before its row; a text is what went wrong."""
        row: dict[str, Any] = dict.fromkeys(FIELDS) | dict(zip(KEY, cell, strict=True))
        if isinstance(found, str):
            row["error"] = found
        else:
            append_lines(self.folder, found.lines)
            append_lines(self.folder, found.maps, headmap.FILE)
            row |= found.row
        self.append(row)
        return row

    def _load(self, ask: Ask) -> None:
        if not self.path.exists():
            return
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        lines = text.split("\n")
        known = set(ask.cells())
        for at, line in enumerate(lines):
            if not line:
                continue
            try:
                row = json.loads(line)
                cell = cell_of(row)
            except (ValueError, KeyError, TypeError):
                # a crash cuts the last line and no other
                if at == len(lines) - 1:
                    continue
                raise FileError(f"{self.path}: line {at + 1} is not a row of an evaluation") from None
            if at < len(lines) - 1 and cell in known and row.get("error") is None:
                self.by_cell[cell] = row
        clean = "".join(json.dumps(row) + "\n" for row in self.rows)
        if clean != text:
            write_whole(self.path, clean)


def run(
    loaded: Loaded,
    ask: Ask,
    folder: str | os.PathLike[str],
    progress: Tell | None = None,
    *,
    batch: int | None = None,
    crew: Callable[[], AbstractContextManager[Crew]] | None = None,
) -> list[dict[str, Any]]:
    """Run an evaluation, or what is left of it.

    Args:
        loaded: the model that `ask` names.
        ask: what to run.
        folder: where rows.jsonl and config.json go.
        progress: called with (row, finished cells, all cells) after each cell that was run, and once more when its
            times were taken afterwards.
        batch: prompts that are read together; None = as `saccade.evaluate.cells.batch_of` says.
        crew: makes the workers that measure (`saccade.evaluate.crew.Processes`, `crew_ray.Actors`), which load the
            model that `ask` names for themselves; None = this process does.

    Returns:
        All rows of the folder, in the order of `ask.cells()`.

    Raises:
        PlanError, InputError, UnsupportedError: an unknown method, plan file or task, or a plan that this model cannot
            have, before anything is run.
        FileError: the folder holds another evaluation.
        CrewError: workers cannot be had.
    """
    for name in ask.tasks:
        get_task(name)
    plans = {(m, length): resolve(m, loaded, length) for m in ask.methods for length in ask.lengths}
    for (name, _), plan in plans.items():
        if plan is not None:
            _try_on(loaded, name, plan)
    store = Store.open(folder, ask)
    cells = list(ask.cells())

    def tell(row: dict[str, Any]) -> None:
        if progress is not None:
            progress(row, len(store.by_cell), len(cells))

    def job(cell: Cell, alone: bool = True) -> Job:
        method, _, length = cell
        own = batch or batch_of(loaded, length)
        return Job(cell, plans[method, length], min(own, ask.samples), alone)

    left = [cell for cell in cells if not store.has(cell)]
    if crew is None:
        _here(loaded, ask, [job(cell) for cell in left], store, tell)
    elif left:
        with crew() as workers:
            _spread(workers, ask, [job(cell, alone=False) for cell in left], store, tell)
    _take_times(loaded, ask, [job(cell) for cell in untimed(ask, store)], store, tell)
    order = {cell: at for at, cell in enumerate(cells)}
    return sorted(store.rows, key=lambda row: order[cell_of(row)])


def untimed(ask: Ask, store: Store) -> list[Cell]:
    """Finished cells whose times are still to be taken: a task per method and length is enough.

    The first task that is a prompt and its answer; where there is none, the first task.
    """
    first = next((name for name in ask.tasks if not hasattr(get_task(name), "run")), ask.tasks[0])
    rows = (store.by_cell.get(cell) for cell in ask.cells() if cell[1] == first)
    return [cell_of(row) for row in rows if row and row.get("error") is None and row.get("ttft_s") is None]


def cell_of(row: dict[str, Any]) -> Cell:
    """Method, task and length of a row."""
    return row["method"], row["task"], row["length"]


def _try_on(loaded: Loaded, name: str, plan: Plan) -> None:
    """Raise now what attaching the plan would raise in every cell."""
    try:
        attach(loaded.model, plan).detach()
    except SaccadeError as error:
        raise type(error)(f"{name}: {error}") from None


def _here(loaded: Loaded, ask: Ask, jobs: list[Job], store: Store, tell: Callable[[dict[str, Any]], None]) -> None:
    """Cell by cell in this process; one set of samples at a time, as all methods of a task and length follow."""
    group: Group | None = None
    drawn: Drawn | None = None
    for job in jobs:
        found: Found | str
        try:
            if drawn is None or group != job.cell[1:]:
                group, drawn = job.cell[1:], None
                drawn = draw(loaded, *group, ask.samples, ask.seed)
            found = measure(loaded, job, drawn)
        except Exception as error:  # a cell that fails must not take the others with it
            found = told(error)
        tell(store.finish(job.cell, found))


def _spread(crew: Crew, ask: Ask, jobs: list[Job], store: Store, tell: Callable[[dict[str, Any]], None]) -> None:
    """Cells over a crew: samples are drawn once by some worker, then go to whoever takes a cell of theirs."""
    waiting: dict[Group, list[Job]] = {}
    for job in jobs:
        waiting.setdefault(job.cell[1:], []).append(job)
    undrawn, ready = deque(waiting), deque[Job]()
    packed: dict[Group, bytes] = {}
    left = {group: len(mine) for group, mine in waiting.items()}
    busy: dict[int, Group | Job] = {}
    lost: set[Group] = set()

    def finish(job: Job, found: Found | str) -> None:
        group = job.cell[1:]
        left[group] -= 1
        if not left[group]:
            packed.pop(group, None)
        tell(store.finish(job.cell, found))

    while undrawn or ready or busy:
        for worker in crew.idle():
            # samples are drawn ahead, so that no worker has to wait for another's
            if undrawn and len(ready) < len(crew):
                busy[worker] = group = undrawn.popleft()
                crew.give(worker, draw_packed, *group, ask.samples, ask.seed)
            elif ready:
                busy[worker] = job = ready.popleft()
                crew.give(worker, measure_packed, job, packed[job.cell[1:]])
        outcome = crew.wait()
        if outcome is None:
            continue
        work = busy.pop(outcome.worker)
        if isinstance(work, Job):
            finish(work, outcome.value if outcome.error is None else outcome.error)
        elif outcome.error is None:
            packed[work] = outcome.value
            ready.extend(waiting[work])
        elif outcome.ended and work not in lost:
            # many cells hang on these samples: they are worth another try
            lost.add(work)
            undrawn.appendleft(work)
        else:
            for job in waiting[work]:
                finish(job, outcome.error)


def _take_times(
    loaded: Loaded, ask: Ask, jobs: list[Job], store: Store, tell: Callable[[dict[str, Any]], None]
) -> None:
    """The quiet pass: rows whose scores are known are written once more, with their times."""
    group: Group | None = None
    drawn: Drawn | None = None
    for job in jobs:
        try:
            if drawn is None or group != job.cell[1:]:
                group, drawn = job.cell[1:], None
                drawn = draw(loaded, *group, min(TIMED, ask.samples), ask.seed)
            row = store.by_cell[job.cell] | clock(loaded, job, drawn)
        except Exception:
            # the score stays without times, and the next run of this folder tries again
            continue
        store.append(row)
        tell(row)


def _same(stored: Any, wanted: dict[str, Any], config: Path) -> None:
    if not isinstance(stored, dict):
        raise FileError(f"{config}: not the config of an evaluation")
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise FileError(
                f"{config.parent} holds an evaluation with {key} {stored.get(key)!r}, not {value!r}: "
                "choose another --out, or the same arguments"
            )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not readable as JSON ({error})") from None
