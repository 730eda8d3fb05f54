"""The report's page against the rows it was made from."""

import json
import math
import re

import pytest
from report_pages import Page, failed, lines, row

from saccade.core.errors import FileError
from saccade.evaluate.report import plot
from saccade.evaluate.report.facts import Side, difference
from saccade.evaluate.report.folder import read_folders
from saccade.evaluate.report.heat import depth_bands, heat_map
from saccade.evaluate.report.pareto import Point, front
from saccade.evaluate.report.report import write_report
from saccade.evaluate.report.summary import summarize

EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture
def no_png(monkeypatch):
    """As without matplotlib: PNG files are not what most tests are about."""

    def new_figure(size, free=False):
        raise plot.UnsupportedError("no matplotlib")

    monkeypatch.setattr("saccade.evaluate.report.pictures.new_figure", new_figure)
    monkeypatch.setattr(plot, "new_figure", new_figure)


@pytest.fixture
def page_of(tmp_path, no_png):
    def make(*folders):
        found = write_report(tmp_path / "out" / "report.html", folders)
        return found, Page(found.page)

    return make


def test_numbers_of_the_table_are_those_of_the_rows(evaluation, page_of, tmp_path):
    rows = [
        row("dense", 0.9, ttft=31.2951, tpot=0.04734, kv=268_304_384, density=1.0, mass=1.0),
        row("streaming", 0.2, ttft=4.0, tpot=0.01, kv=2_683_044),
        row("minference", 0.5, ttft=9.6591, tpot=0.02968, kv=268_304_384, density=0.0275, mass=0.7502),
    ]
    found, page = page_of(evaluation(tmp_path / "a", rows))
    dense, _, minference = page.tables["rows"][1:]
    assert dense[:4] == ["dense", "needle", "4,096", "10"] and dense[5] == "-"
    assert dense[4] == "0.90|0.60 to 0.98" and dense[6:] == ["31.3 s", "47 ms", "268 MB", "100%", "100%"]
    # by hand: 31.2951 / 9.6591, 0.04734 / 0.02968
    assert minference[6:] == ["9.66 s|3.24x", "30 ms|1.60x", "268 MB|100% of dense", "2.8%", "75%"]
    # square-and-add by hand from the ends 0.5958..0.9821 and 0.2366..0.7634
    low = -0.4 - math.hypot(0.5 - 0.2366, 0.9821 - 0.9)
    high = -0.4 + math.hypot(0.7634 - 0.5, 0.9 - 0.5958)
    assert minference[5].startswith(f"\N{MINUS SIGN}0.40|\N{MINUS SIGN}{-low:.2f} to ") and high > 0
    assert "within the interval" in minference[5]
    summary = found.summaries["a"]
    assert any(
        "minference at 4,096 tokens: first token 3.2 times as fast, 100% of the bytes" in x for x in summary.gain
    )
    assert any(x.startswith("minference 0.50 against 0.90 of dense: a loss is seen, within") for x in summary.lose)
    assert any("minference saves no memory" in x for x in summary.limits)
    assert any("75% on average" in x for x in summary.limits)
    assert any("no samples.jsonl" in x for x in summary.limits)


def test_same_samples_are_tested_in_pairs(evaluation, tmp_path):
    ours, theirs = [1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
    rows = [row("dense", 0.9, ttft=4.0), row("pooled", 0.2)]
    said = [*lines("dense", theirs, ttft=4.0), *lines("pooled", ours)]
    folder = read_folders([evaluation(tmp_path / "a", rows, said)])[0]
    found = difference(Side(folder, "pooled"), Side(folder, "dense"), [("needle", 4096)])
    assert found.p == pytest.approx(2 / 2**7) and found.how == "McNemar, exact"
    summary = summarize(folder)
    assert summary.lose[0].startswith("pooled answers less than dense: 0.20 against 0.90 (\N{MINUS SIGN}0.70, 95 % ")
    assert "McNemar, exact, p = 0.016; 10 samples" in summary.lose[0]
    assert any("first token 2.0 times (95 % 2.0 to 2.0) as fast" in text for text in summary.gain)
    # other prompts, or fewer samples than the row counts, are no pairs
    for other in (lines("pooled", ours, prompt="q"), lines("pooled", ours[:9])):
        broken = evaluation(tmp_path / "a", rows, [*lines("dense", theirs), *other])
        folder = read_folders([broken])[0]
        found = difference(Side(folder, "pooled"), Side(folder, "dense"), [("needle", 4096)])
        assert found.p is None and found.how == "intervals, unpaired"


@pytest.mark.parametrize(
    ("name", "first", "step", "said"),
    [
        ("minference", 2.0, 2.0, "first token 2.0 times as fast, "),
        ("quest", 2.0, 2.0, "further tokens 2.0 times as fast, "),
        ("minference+quest@0.1", 2.0, 2.0, "first token 2.0 times as fast, further tokens 2.0 times as fast, "),
        ("snapkv", 2.0, 2.0, "further tokens 2.0 times as fast, "),
        ("duo", 2.0, 2.0, "first token 2.0 times as fast, further tokens 2.0 times as fast, "),
        ("offload+fetch", 2.0, 2.0, "further tokens 2.0 times as fast, "),
        ("plans/mine.json", 2.0, 2.0, "first token 2.0 times as fast, further tokens 2.0 times as fast, "),
        ("hip", 1.06, 1.04, "first token 1.1 times as fast, further tokens no faster, "),
        ("hip", 1.04, 1.06, "first token no faster, further tokens 1.1 times as fast, "),
        ("hip", 1.04, 1.04, None),
        ("quest", 2.0, 1.04, None),
        ("minference", 1.04, 2.0, None),
        ("offload", 2.0, 2.0, None),
    ],
)
def test_a_gain_is_one_that_the_method_makes(evaluation, tmp_path, name, first, step, said):
    rows = [row("dense", 0.9, ttft=4.0, tpot=0.04, kv=1000), row(name, 0.9, ttft=4 / first, tpot=0.04 / step, kv=1000)]
    gains = summarize(read_folders([evaluation(tmp_path / "a", rows)])[0]).gain
    if said is None:
        assert gains == ["Nothing that these rows show."]
    else:
        assert len(gains) == 1 and gains[0].startswith(f"{name} at 4,096 tokens: {said}100% of the bytes")


def test_a_loss_on_one_task_is_not_hidden_by_the_others(evaluation, tmp_path):
    rows, said = [], []
    for task, ours in (("needle", [1] * 10), ("kv", [1] * 10), ("words", [0] * 7 + [1] * 3)):
        for method, scores in (("dense", [1] * 10), ("quest", ours)):
            rows.append(row(method, sum(scores) / 10, task=task))
            said += lines(method, scores, task)
    summary = summarize(read_folders([evaluation(tmp_path / "a", rows, said)])[0])
    assert any("words at 4,096 tokens: 0.30 against 1.00" in text for text in summary.lose)


def test_failed_and_missing_cells_are_shown(evaluation, page_of, tmp_path):
    rows = [row("dense", 1.0), failed("quest", "RuntimeError: out of memory")]
    folder = evaluation(tmp_path / "a", rows, methods=["dense", "quest", "duo"])
    found, page = page_of(folder)
    cells = {line[0]: line[4] for line in page.tables["rows"][1:]}
    assert cells["quest"] == "failed|RuntimeError: out of memory"
    assert cells["duo"] == "not run|asked for, no row yet"
    limits = " ".join(found.summaries["a"].limits)
    assert "1 cell failed" in limits and "quest on needle at 4,096" in limits and "duo" in limits
    assert "1 of 3 cells finished" in page.text
    assert "failed" in (found.page.with_name("report-plots") / "a-time-ttft-4096.svg").read_text()


def test_a_method_without_all_cells_is_left_out_of_the_means(evaluation, page_of, tmp_path):
    rows = [row("dense", 1.0), row("dense", 0.8, task="kv"), row("quest", 1.0), failed("quest", "x", task="kv")]
    _, page = page_of(evaluation(tmp_path / "a", rows))
    assert "Left out, because not all of their cells finished: quest." in page.text


def test_units_where_lower_is_better(evaluation, tmp_path):
    unit = {"task": "perplexity", "unit": "bits per byte, lower is better"}
    rows = [row("dense", 0.0) | unit | {"score": 1.4, "low": 1.38, "high": 1.42}]
    rows += [row("quest", 0.0) | unit | {"score": 1.9, "low": 1.85, "high": 1.95}]
    rows += [row("duo", 0.0) | unit | {"score": 1.2, "low": 1.15, "high": 1.25}]
    rows += [row("tidal", 0.0) | unit | {"score": 1.41, "low": None, "high": None}]
    summary = summarize(read_folders([evaluation(tmp_path / "a", rows)])[0])
    start = "perplexity at 4,096 tokens, bits per byte, lower is better: dense 1.4"
    assert any(text.startswith(f"{start}: quest 1.9 (+0.50") for text in summary.lose)
    assert any(text.startswith(f"{start}: duo 1.2 (\N{MINUS SIGN}0.20") for text in summary.gain)
    assert any("tidal 1.41 (+0.010, 95 % no interval" in text for text in summary.lose)


def test_where_it_is_slower_is_said_by_method(evaluation, tmp_path):
    rows = [row("dense", 1.0, length=length) for length in (1024, 2048, 4096)]
    rows += [row("quest", 1.0, length=length, ttft=3.0) for length in (1024, 2048, 4096)]
    rows += [row("duo", 1.0, length=length, ttft=ttft) for length, ttft in ((1024, 3.0), (2048, 2.5), (4096, 1.0))]
    limits = summarize(read_folders([evaluation(tmp_path / "a", rows)])[0]).limits
    assert "Slower to the first token than dense: quest at every length; duo at 1,024 and 2,048 tokens." in limits


def test_controls(evaluation, tmp_path):
    def limits(*rows):
        return " ".join(summarize(read_folders([evaluation(tmp_path / "a", [row("dense", 1.0), *rows])])[0]).limits)

    assert "All methods answer more than the window control" in limits(row("streaming", 0.0), row("quest", 1.0))
    assert "Not better than the window control (streaming), beyond the interval: quest" in limits(
        row("streaming", 0.9), row("quest", 1.0)
    )
    assert "not shown" in limits(row("quest", 1.0))


def test_without_dense_nothing_is_claimed(evaluation, page_of, tmp_path):
    found, _ = page_of(evaluation(tmp_path / "a", [row("quest", 1.0)]))
    summary = found.summaries["a"]
    assert summary.gain == summary.lose == ["Nothing that these rows show."]
    assert any("Dense attention has no finished cell" in text for text in summary.limits)


def test_hostile_words_stay_words(evaluation, page_of, tmp_path):
    rows = [row("dense", 1.0), row(EVIL, 0.5), failed("quest", EVIL), row("dense", 0.5, task=EVIL)]
    rows[1]["unit"] = EVIL
    rows.append(row(EVIL.replace("<", ">"), 0.5))
    said = [*lines("dense", [1] * 10, depths=[0.5] * 10), *lines(EVIL, [1] * 5 + [0] * 5, depths=[0.5] * 10)]
    head = {"method": EVIL, "task": EVIL, "length": 4096, "phase": EVIL, "density": [[0.5]], "mass": None}
    folder = evaluation(tmp_path / "a'<b>&", rows, said, [head], model=EVIL, plan_files={EVIL: EVIL})
    found, page = page_of(folder)
    text = found.page.read_text(encoding="utf-8")
    assert page.tags.count("script") == 1 and "<script>alert" not in text and "<b>" not in text
    assert EVIL in page.text and page.tables["rows"][2][0] == EVIL
    assert len(set(found.pictures)) == len(found.pictures)
    for picture in found.pictures:
        assert re.fullmatch(r"[\w.+-]+", picture.name) and "<script" not in picture.read_text()


def test_page_loads_nothing_and_links_to_the_rows(evaluation, page_of, tmp_path):
    folder = evaluation(tmp_path / "a", [row("dense", 1.0), row("quest", 1.0)])
    found, page = page_of(folder)
    files = [link for link in page.links if not link.startswith("data:image/png;base64,")]
    assert files == ["../a/rows.jsonl", "../a/config.json"]
    assert all((found.page.parent / link).is_file() for link in files)
    text = found.page.read_text(encoding="utf-8")
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "viewport" in text
    assert "$" not in text


def test_depth_map_by_hand(evaluation, tmp_path):
    depths = [0.0, 0.0, 0.5, 0.5]
    rows = [row("dense", 0.75, n=4), row("quest", 0.25, n=4), failed("duo", "x"), row("dense", 0.5, n=4, length=8192)]
    said = [*lines("dense", [1, 1, 1, 0], depths=depths), *lines("quest", [0, 1, 0, 0], depths=depths)]
    folder = read_folders([evaluation(tmp_path / "a", rows, said)])[0]

    def hints(method):
        return re.findall(r"<title>(.*?)</title>", heat_map(folder, method, "needle").svg())

    where = ["4,096 tokens, depth 0", "4,096 tokens, depth 0.5", "8,192 tokens, depth 0", "8,192 tokens, depth 0.5"]
    assert hints("dense") == [
        f"{x}: {y}" for x, y in zip(where, ["2 of 2", "1 of 2", *["nothing run"] * 2], strict=True)
    ]
    assert hints("quest")[:2] == [f"{where[0]}: 1 of 2", f"{where[1]}: 0 of 2"]
    assert hints("duo")[:2] == [f"{where[0]}: failed", f"{where[1]}: failed"]


def test_every_depth_is_in_one_band():
    depths = [i / 997 for i in range(998)] + [0.1, 0.3, 0.7, 1.0]
    bands = depth_bands(depths)
    assert len(bands) == 10
    assert all(sum(low <= depth <= high for low, high in bands) == 1 for depth in depths)


def test_front_is_what_none_beats():
    source = [(3, 0.5), (1, 0.2), (2, 0.5), (4, 0.9), (5, 0.9), (1, 0.1), (6, 0.3)]
    points = [Point(str(at), "method", cost, score, None, None) for at, (cost, score) in enumerate(source)]
    kept = {
        p.name
        for p in points
        if not any((q.cost <= p.cost and q.score >= p.score) and q[2:4] != p[2:4] for q in points)
    }
    assert {point.name for point in front(points)} == kept == {"1", "2", "3"}


def test_several_runs_side_by_side(evaluation, page_of, tmp_path):
    first, second = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    rows = [row("dense", 1.0), row("quest", 0.9)]
    a = evaluation(tmp_path / "x" / "run", rows, lines("quest", first))
    b = evaluation(tmp_path / "y" / "run", [row("quest", 0.2)], lines("quest", second), model="other")
    found, page = page_of(a, b)
    assert list(found.summaries) == ["x/run", "y/run"]
    assert "Different models are compared: x/run has model reader and y/run has model other" in found.warnings[0]
    assert found.warnings[0] in page.text
    head, dense, quest = page.tables["runs"][0], *page.tables["runs"][1:]
    assert len(head) == len(dense) == 8
    assert dense[3] == "1.00|0.72 to 1.00" and dense[4:6] == ["not run|not asked for", "-"]
    assert quest[3].startswith("0.90|") and quest[4].startswith("0.20|")
    assert quest[5].startswith("\N{MINUS SIGN}0.70|") and "McNemar, exact, p = 0.016" in quest[5]
    assert found.compared[0].startswith("quest: 0.20 in y/run, 0.90 in x/run (\N{MINUS SIGN}0.70")
    assert found.compared[0].endswith(": a difference.")
    assert len(page.tables["rows"]) == 1 + 3


def test_maps_of_heads(evaluation, page_of, tmp_path):
    density = [[0.1, 0.2], [0.4, 0.1]]
    head = {"method": "quest", "task": "needle", "length": 4096, "phase": "decode", "density": density, "mass": None}
    found, page = page_of(evaluation(tmp_path / "a", [row("dense", 1.0), row("quest", 1.0)], heads=[head]))
    assert "density 20% on average, most 40% in layer 1, head 0" in page.text
    assert (found.page.with_name("report-plots") / "a-heads-quest-needle-4096-decode.svg").is_file()


def test_positions(evaluation, page_of, tmp_path):
    more = {"task": "perplexity", "unit": "bits per byte, lower is better", "score": 1.4}
    rows = [row("dense", 0.0) | more | {"by_position": [[1, 64, 2.125], [64, 128, None]]}]
    _, page = page_of(evaluation(tmp_path / "a", rows))
    assert page.tables["positions-0"][1] == ["dense", "2.125", "-"]


def test_pictures_as_png_too(evaluation, tmp_path):
    pytest.importorskip("matplotlib")
    said = [*lines("dense", [1] * 10, depths=[0.5] * 10)]
    found = write_report(
        tmp_path / "r.html", [evaluation(tmp_path / "a", [row("dense", 1.0), row("qu$est$", 1.0)], said)]
    )
    stems = {path.stem for path in found.pictures}
    assert {"a-pareto-ttft-4096", "a-pareto-kv-4096", "a-time-ttft-4096", "a-depth-needle-dense"} <= stems
    for stem in stems:
        svg, png = (found.page.with_name("r-plots") / f"{stem}.{end}" for end in ("svg", "png"))
        assert svg.read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "<style>" in svg.read_text()
        assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text, says", [("", "no rows"), ("nonsense\n{}\n", "line 1"), ('{"method": "a"}\n', "line 1")])
def test_rows_that_cannot_be_read(evaluation, tmp_path, text, says):
    folder = evaluation(tmp_path / "a", [row("dense", 1.0)])
    (folder / "rows.jsonl").write_text(text)
    with pytest.raises(FileError, match=says):
        write_report(tmp_path / "r.html", [folder])
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("bad", [{"score": math.nan}, {"score": "1"}, {"length": "4096"}, {"ttft_s": [1]}])
def test_values_that_are_none_of_ours(evaluation, tmp_path, bad):
    folder = evaluation(tmp_path / "a", [row("dense", 1.0) | bad], lengths=[4096])
    with pytest.raises(FileError, match="line 1"):
        read_folders([folder])


def test_other_folders_are_refused(evaluation, tmp_path):
    with pytest.raises(FileError, match="no such folder"):
        read_folders([tmp_path / "none"])
    with pytest.raises(FileError, match=r"no config\.json"):
        read_folders([tmp_path])
    folder = evaluation(tmp_path / "a", [row("dense", 1.0)])
    for text in ("[]", "{}", "{"):
        (folder / "config.json").write_text(text)
        with pytest.raises(FileError, match=r"config\.json"):
            read_folders([folder])


def test_a_cut_last_line_is_left_out_and_told(evaluation, page_of, tmp_path):
    folder = evaluation(tmp_path / "a", [row("dense", 1.0), row("quest", 0.5)])
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text[:-30])
    found, page = page_of(folder)
    assert "cut off" in found.warnings[0] and found.warnings[0] in page.text
    assert [line[4] for line in page.tables["rows"][2:]] == ["not run|asked for, no row yet"]


def test_a_cell_done_again_counts_once(evaluation, tmp_path):
    folder = evaluation(tmp_path / "a", [failed("dense", "x"), row("dense", 0.5)])
    found = read_folders([folder])[0]
    assert [x["score"] for x in found.rows] == [0.5] and found.failed == []


def test_data_is_json(evaluation, page_of, tmp_path):
    found, _ = page_of(evaluation(tmp_path / "a", [row("dense", 1.0), row("quest", 1.0)]))
    again = json.loads(json.dumps(found.data(), allow_nan=False))
    assert list(again) == ["page", "pictures", "summary", "compared", "warnings"]
    assert list(again["summary"]["a"]) == ["gain", "lose", "limits"]
