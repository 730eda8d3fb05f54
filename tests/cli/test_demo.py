import json

import pytest
from report_pages import Nested

ROW = ["method", "exact", "asked", "ttft_s", "tpot_s", "kv_bytes", "density"]


class Page(Nested):
    """Counts what the tests look at."""

    void = ("meta", "br", "img", "image", "rect", "path", "hr", "link")

    def __init__(self):
        super().__init__()
        self.count, self.links, self.text = {}, [], []

    def start(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """One run of the demo on the tiny model: its document, stderr and page."""
    import contextlib
    import io

    from saccade.cli.main import main

    out = tmp_path_factory.mktemp("out")
    argv = ["demo", "streaming", "minference", "tidal", "--model", tiny, "--length", "640", "--facts", "2"]
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        assert main([*argv, "--out", str(out), "--json"]) == 0
    return json.loads(said.getvalue()), told.getvalue(), (out / "demo.html")


def test_fields(made):
    found, _, page = made
    assert list(found)[:5] == ["model", "length", "device", "dtype", "rows"]
    assert (found["length"], found["device"], found["dtype"]) == (640, "cpu", "float32")
    assert all(list(row)[:7] == ROW for row in found["rows"])
    assert [row["method"] for row in found["rows"]] == ["dense", "streaming", "minference", "tidal"]
    assert found["page"] == str(page)


def test_rows_say_what_was_measured(made):
    dense, streaming, minference, tidal = made[0]["rows"]
    assert dense["density"] == dense["ttft_ratio"] == dense["kv_share"] == 1.0
    assert all(row["asked"] == 2 and 0 <= row["exact"] <= 2 for row in made[0]["rows"])
    assert streaming["density"] < 0.7 and 0 < streaming["mass"] < 1
    assert minference["density_decode"] == 1.0 and minference["note"] == "decode dense"
    assert tidal["density_prefill"] == 1.0 and tidal["density"] == tidal["density_decode"]
    assert dense["kv_bytes"] == pytest.approx(4 * 2 * 2 * 8 * 4 * 620, rel=0.1)
    assert streaming["ttft_ratio"] == pytest.approx(dense["ttft_s"] / streaming["ttft_s"], rel=0.01)


def test_progress_goes_to_stderr(made):
    assert "[4/4] tidal" in made[1]


def test_page_is_one_file_that_loads_nothing(made):
    text = made[2].read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert "script" not in page.count and "link" not in page.count
    assert page.count["figure"] == page.count["svg"] == 4
    assert page.count["mark"] == 2
    assert "viewport" in text and "prefers-color-scheme: dark" in text
    assert "$" not in "".join(page.text)


def test_page_tells_everything(made):
    text, found = made[2].read_text(encoding="utf-8"), made[0]
    for part in (*found["questions"], *found["expected"], *(row["method"] for row in found["rows"])):
        assert part in text
    assert all(value in text for value in found["conditions"].values() if "<" not in value)
    assert found["conditions"]["command"].startswith("saccade demo")


def test_default_methods_and_long_prompts(saccade, tiny, tmp_path):
    code, out, err = saccade("demo", "--model", tiny, "--length", 2200, "--facts", 1, "--out", tmp_path)
    assert code == 0, err
    names = [line.split()[0] for line in out.splitlines()[2:] if line and "/1 " in line]
    assert names == ["dense", "streaming", "trishape", "minference", "tidal", "minference+tidal"]
    assert "warning" in err and "2048" in err
    assert "2048" in (tmp_path / "demo.html").read_text()
    assert str(tmp_path / "demo.html") in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
