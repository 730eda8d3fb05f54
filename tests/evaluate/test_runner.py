import json
from dataclasses import replace

import pytest

from saccade.core.errors import FileError, InputError, PlanError
from saccade.core.plan import Plan
from saccade.evaluate import cells
from saccade.evaluate.run import FIELDS, Ask, run

ASK = Ask("tiny", ("dense", "streaming", "trishape"), ("needle",), (400,), samples=2)


def rows_in(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def counted(monkeypatch, stop_at=None, error=KeyboardInterrupt):
    """Counts the cells that are really run; raises in the one with this number."""
    done = []
    real = cells.answers

    def answers(loaded, plan, prompts, **kwargs):
        done.append([list(ids) for ids in prompts])
        if len(done) == stop_at:
            raise error("stop")
        return real(loaded, plan, prompts, **kwargs)

    monkeypatch.setattr(cells, "answers", answers)
    return done


def test_rows_have_the_promised_fields(tiny, tmp_path):
    told = []
    rows = run(tiny, ASK, tmp_path, lambda row, done, total: told.append((row["method"], done, total)))
    assert rows == rows_in(tmp_path)
    assert all(tuple(row) == FIELDS for row in rows)
    assert told == [("dense", 1, 3), ("streaming", 2, 3), ("trishape", 3, 3)]
    assert rows[0]["density"] == 1.0 and 0 < rows[1]["density"] < 1
    assert all(row["n"] == 2 and row["low"] <= row["score"] <= row["high"] for row in rows)


def test_all_methods_get_the_same_samples(tiny, tmp_path, monkeypatch):
    prompts = counted(monkeypatch)
    run(tiny, ASK, tmp_path)
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0][0] != prompts[0][1]


def test_goes_on_after_an_interrupt(tiny, tmp_path, monkeypatch):
    counted(monkeypatch, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, ASK, tmp_path)
    assert [row["method"] for row in rows_in(tmp_path)] == ["dense"]
    before = (tmp_path / "rows.jsonl").read_text()
    monkeypatch.undo()
    again = counted(monkeypatch)
    rows = run(tiny, ASK, tmp_path)
    assert len(again) == 2
    assert [row["method"] for row in rows] == ["dense", "streaming", "trishape"]
    assert (tmp_path / "rows.jsonl").read_text().startswith(before)
    assert run(tiny, ASK, tmp_path) == rows and len(again) == 2


@pytest.mark.parametrize("left", [5, -1])
def test_a_cut_last_line_is_done_again(tiny, tmp_path, monkeypatch, left):
    run(tiny, ASK, tmp_path)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # -1: all of the row is there but not its newline
    file.write_text("".join(lines[:2]) + lines[2][:left])
    again = counted(monkeypatch)
    rows = run(tiny, ASK, tmp_path)
    assert len(again) == 1
    assert [row["method"] for row in rows] == [row["method"] for row in rows_in(tmp_path)]
    assert len(rows) == 3


def test_damage_elsewhere_is_an_error(tiny, tmp_path):
    run(tiny, replace(ASK, methods=("dense", "streaming")), tmp_path)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("nonsense\n" + lines[1])
    with pytest.raises(FileError, match="line 1"):
        run(tiny, replace(ASK, methods=("dense", "streaming")), tmp_path)


@pytest.mark.parametrize("change", [{"samples": 3}, {"lengths": (400, 500)}, {"seed": 1}, {"plan_files": {"a": "b"}}])
def test_another_evaluation_is_refused_by_name(tiny, tmp_path, change):
    ask = replace(ASK, methods=("dense",))
    run(tiny, ask, tmp_path)
    with pytest.raises(FileError, match=next(iter(change))):
        run(tiny, replace(ask, **change), tmp_path)


def test_a_failing_cell_is_kept_and_tried_again(tiny, tmp_path, monkeypatch):
    counted(monkeypatch, stop_at=2, error=RuntimeError)
    rows = run(tiny, ASK, tmp_path)
    assert rows[1]["error"] == "RuntimeError: stop" and rows[1]["score"] is None
    assert rows[2]["score"] is not None
    monkeypatch.undo()
    again = counted(monkeypatch)
    rows = run(tiny, ASK, tmp_path)
    assert len(again) == 1
    assert not any("error" in row for row in rows) and len(rows_in(tmp_path)) == 3


def test_a_plan_that_cannot_be_attached_is_refused_before_any_work(tiny, tmp_path):
    """Not as a failed cell behind those of the methods before it."""
    plan = Plan.uniform(tiny.model, decode="tidal", cache=("duo", {"sink": 4, "recent": 16}))
    plan.save(tmp_path / "both.json")
    with pytest.raises(PlanError, match=r"both\.json: TidalDecode needs every token"):
        run(tiny, replace(ASK, methods=("dense", str(tmp_path / "both.json"))), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert [row["method"] for row in run(tiny, replace(ASK, methods=("dense",)), tmp_path / "a")] == ["dense"]


def test_mistakes_are_found_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(InputError, match="did you mean 'needle'"):
        run(tiny, replace(ASK, tasks=("neddle",)), tmp_path / "a")
    with pytest.raises(PlanError, match="did you mean 'trishape'"):
        run(tiny, replace(ASK, methods=("trishap",)), tmp_path / "a")
    with pytest.raises(InputError, match="at least one"):
        Ask("tiny", (), ("needle",), (400,))
    assert not (tmp_path / "a").exists()
