"""Waterfalls, budget lines and nearness to dense on the page, against the rows they were made from."""

import math

import pytest
from report_pages import Page, row

from saccade.core.errors import FileError
from saccade.evaluate.report.budgets import Spent, budgets, parted
from saccade.evaluate.report.folder import read_folders
from saccade.evaluate.report.pictures import (
    MAPS,
    budget_pictures,
    head_pictures,
    look_of,
    pareto_pictures,
    stack_pictures,
)
from saccade.evaluate.report.report import write_report
from saccade.evaluate.report.stack import PARTS, WIDTH


def rects(drawing):
    return [shape for shape in drawing.shapes if shape[0] == "rect"]


def waterfall(*seconds):
    return {"prefill": dict(zip(PARTS, seconds, strict=True)), "decode": {"select": 0.0, "attend": 0.001, "rest": 0.01}}


def test_a_waterfall_is_as_long_as_its_seconds(evaluation, tmp_path):
    rows = [
        row("dense", 1.0, waterfall=waterfall(0.0, 3.0, 0.2, 0.8)),
        row("dense", 1.0, task="kv", waterfall=waterfall(0.0, 5.0, 0.2, 0.8)),
        row("minference", 1.0, waterfall=waterfall(0.3, 0.5, 0.2, 1.0)),
        row("duo", 1.0),
        row("h2o", 1.0, waterfall={"prefill": "long", "decode": None}),
    ]
    (folder,) = read_folders([evaluation(tmp_path / "a", rows)])
    prefill, decode = stack_pictures(folder)
    assert [x.group for x in (prefill, decode)] == ["4,096 tokens"] * 2
    legend, bars = rects(prefill.drawing)[:4], rects(prefill.drawing)[4:]
    assert len(legend) == 4 and len(bars) == 8  # two methods of four parts; duo and h2o have none
    # dense: the mean over its two tasks, 0 + 4 + 0.2 + 0.8, is the longest
    wide = [bar[3] for bar in bars]
    assert wide[:4] == pytest.approx([WIDTH * part / 5 for part in (0, 4, 0.2, 0.8)])
    assert wide[4:] == pytest.approx([WIDTH * part / 5 for part in (0.3, 0.5, 0.2, 1.0)])
    # each part begins where the last one ends
    assert [bar[1] for bar in bars[4:]] == pytest.approx([sum(wide[4 : 4 + at]) for at in range(4)])
    svg = prefill.svg()
    assert svg.count("not measured") == 2 and "5.00 s, attention 80%" in svg and "2.00 s, attention 25%" in svg
    # a part that a row leaves out is nothing
    assert "11 ms, attention 9.1%" in decode.svg()


def test_a_budget_line_joins_the_shares_of_one_method_and_dense(evaluation, tmp_path):
    rows = [
        row(f"quest@{share}", score, density=share * 1.25) for share, score in ((0.2, 1.0), (0.05, 0.4), (0.1, 0.8))
    ]
    rows += [row("streaming@0.1", 0.1, density=0.11), row("minference", 1.0, density=0.1), row("odd@name", 0.5)]
    rows += [row("dense", 0.9, density=1.0)]
    (folder,) = read_folders([evaluation(tmp_path / "a", rows)])
    (picture,) = budget_pictures(folder)
    (line,) = [x[1] for x in picture.drawing.shapes if x[0] == "line" and x[3] == 1.6 and len(x[1]) == 4]
    xs, ys = zip(*line, strict=True)
    assert list(xs) == sorted(xs) and list(ys[:3]) == sorted(ys[:3], reverse=True)
    # equal factors are equal steps: 0.0625, 0.125, 0.25, 1
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1]) == pytest.approx((xs[3] - xs[2]) / 2)
    hints = [shape[5] for shape in picture.drawing.shapes if shape[0] == "dot"]
    assert "quest: 0.80 reading 12%" in hints and "quest: 0.90 reading 100%" in hints and len(hints) == 6
    assert not any("minference" in hint or "odd" in hint for hint in hints)
    assert {shape[4] for shape in picture.drawing.shapes if shape[0] == "dot"} == {"method", "control"}
    # by hand, trapezia over the doublings: (0.6 + 0.9 + 2 * 0.95) / 4
    assert "quest 0.85" in picture.caption


def test_no_shares_no_line(evaluation, tmp_path):
    (folder,) = read_folders([evaluation(tmp_path / "a", [row("dense", 1.0), row("quest", 1.0)])])
    assert not list(budget_pictures(folder)) and not list(stack_pictures(folder))
    assert look_of("streaming@0.1") == look_of("random") == "control" and look_of("quest@0.1") == "method"
    assert parted("a/b@c.json") == ("a/b@c.json", None) and parted("@0.5") == ("@0.5", None)


def test_one_point_is_drawn_too():
    drawing = budgets({"quest": [Spent(0.1, 1.0)]}, {"quest": "method"}, "one")
    assert all(math.isfinite(value) for shape in drawing.shapes for value in shape[1:3] if isinstance(value, float))


def test_nearness_is_the_mean_over_tasks(evaluation, tmp_path):
    near = {"output_error": 0.02, "kl_answer": 0.001, "kl_other": 0.2, "agree_answer": 1.0, "agree_other": 0.9}
    near |= {"mass_low": 0.5, "estimate": 0.01, "read_bytes": 2_000_000, "peak_bytes": None, "ceiling": 3.0}
    rows = [
        row("dense", 1.0, ttft=4.0, density=1.0, mass=1.0),
        row("dense", 1.0, task="kv", ttft=4.0, density=1.0, mass=1.0),
        row("quest", 1.0, ttft=2.0, **near),
        row("quest", 1.0, task="kv", ttft=1.0, **(near | {"output_error": 0.04, "kl_answer": None})),
    ]
    page = Page(write_report(tmp_path / "out" / "r.html", [evaluation(tmp_path / "a", rows)]).page)
    dense, quest = page.tables["nearness"][1:]
    assert dense[:4] == ["dense", "4,096", "100%", "100%"] and set(dense[4:]) == {"-"}
    assert quest == [
        *("quest", "4,096", "10%|1.0% choosing", "90%|50% 5th percentile", "3.0%", "0.001|0.2 elsewhere"),
        # the geometric mean of 2 and 4
        *("100%|90% elsewhere", "2 MB", "-", "3.00x|2.83x reached"),
    ]
    old = Page(write_report(tmp_path / "out" / "old.html", [evaluation(tmp_path / "b", rows[:2])]).page)
    assert "nearness" not in old.tables and "How near to dense" not in old.text


def test_many_maps_of_heads_are_thinned(evaluation, tmp_path):
    def grid(method, task, length):
        cells = {"density": [[0.1, 0.2]], "mass": [[0.5, 0.6]]}
        return {"method": method, "task": task, "length": length, "phase": "prefill", **cells}

    every = [grid(f"m{i}", task, length) for i in range(5) for task in ("needle", "kv") for length in (4096, 8192)]
    (few,) = read_folders([evaluation(tmp_path / "few", [row("m0", 1.0)], heads=every)])
    assert len(every) <= MAPS and len(list(head_pictures(few))) == len(every)
    every = [grid(f"m{i}", task, length) for i in range(15) for task in ("needle", "kv") for length in (4096, 8192)]
    (many,) = read_folders([evaluation(tmp_path / "many", [row("m0", 1.0)], heads=every)])
    shown = [picture.stem for picture in head_pictures(many)]
    assert len(shown) == 15 and all("needle-8192" in stem for stem in shown)


def test_it_pays_from_where_the_times_cross(evaluation, tmp_path):
    def at(method, length, ttft, tpot):
        return row(method, 1.0, length=length, ttft=ttft, tpot=tpot)

    rows = [at("dense", 1024, 1.0, 0.01), at("dense", 4096, 4.0, 0.02), at("dense", 16384, 32.0, 0.04)]
    rows += [at("quest", 1024, 2.0, 0.02), at("quest", 4096, 2.0, 0.03), at("quest", 16384, 4.0, 0.05)]
    rows += [at("duo", 1024, 0.5, 0.01), at("duo", 4096, 1.0, 0.01), at("duo", 16384, 4.0, 0.01)]
    page = Page(write_report(tmp_path / "r.html", [evaluation(tmp_path / "a", rows)]).page)
    quest, duo = page.tables["pays"][1:]
    # half as fast at 1k, twice as fast at 4k: even in the middle of their logarithms
    assert quest == ["quest", "2,048", "not up to 16,384"] and duo[:2] == ["duo", "1,024 or less"]
    short = Page(write_report(tmp_path / "s.html", [evaluation(tmp_path / "b", rows[:1] + rows[3:4])]).page)
    assert "pays" not in short.tables


def test_times_of_another_run_fill_what_is_missing(evaluation, tmp_path):
    bare = {"ttft": None, "tpot": None, "waterfall": None}
    rows = [row("dense", 1.0, **bare), row("quest", 1.0, **bare), row("quest", 1.0, task="kv", **bare)]
    rows += [row("duo", 1.0, ttft=0.7)]
    timed = [
        row("dense", 0.0, ttft=2.0, waterfall=waterfall(0, 1, 0, 1)),
        row("quest", 0.0, ttft=1.0),
        row("duo", 0, ttft=9.0),
    ]
    scores, times = evaluation(tmp_path / "a", rows), evaluation(tmp_path / "b", timed)
    found = write_report(tmp_path / "r.html", [scores], times)
    table = {tuple(line[:2]): line for line in Page(found.page).tables["rows"][1:]}
    assert table["quest", "needle"][4].startswith("1.00") and table["quest", "needle"][6] == "1.00 s|2.00x"
    # nothing is made up for another task, and nothing is replaced
    assert table["quest", "kv"][6] == "-" and table["duo", "needle"][6].startswith("700 ms")
    assert "Where the time goes" in Page(found.page).text
    with pytest.raises(FileError, match="dtype bfloat16"):
        write_report(tmp_path / "no.html", [scores], evaluation(tmp_path / "c", timed, dtype="bfloat16"))
    assert not (tmp_path / "no.html").exists()


def test_a_task_that_few_finished_does_not_empty_the_picture(evaluation, tmp_path):
    rows = [row(name, 1.0) for name in ("dense", "quest", "duo", "tidal")] + [row("dense", 0.5, task="kv")]
    (folder,) = read_folders([evaluation(tmp_path / "a", rows)])
    picture = next(pareto_pictures(folder))
    hints = [shape[5] for shape in picture.drawing.shapes if shape[0] == "dot"]
    assert [hint.split(":")[0] for hint in hints] == ["dense", "quest", "duo", "tidal"] and "dense: 1.00" in hints[0]
    assert "kv (few did it)" in picture.caption
