"""The report in headless Chromium: it renders, sorts and filters, says nothing on the console, and fits a phone."""

import html
import json
import os
import random
import re
import shutil
import subprocess

import pytest

from saccade.evaluate.metrics import wilson
from saccade.evaluate.report.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

PHASES = ("prefill", "decode")
# errors while the page loads are heard only by what stands before the page's own script
EAR = """<script>window.heard = [];
addEventListener("error", event => heard.push(String(event.message)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => heard.push(words.join(" "));</script>"""
PROBE = """<script>addEventListener("load", () => {
const found = (() => { %s })();
const note = parent.document.createElement("pre");
note.id = "found"; note.textContent = JSON.stringify({heard, found});
parent.document.body.append(note);
});</script>"""
# a window of Chromium is never narrower than 500 pixels, a frame is
FRAME = '<!doctype html><iframe style="width: %dpx; height: 900px; border: 0" srcdoc="%s"></iframe>'
NAMES = """const names = () => [...document.querySelectorAll("#rows tbody tr")].filter(row => row.offsetHeight > 0)
  .map(row => row.cells[0].firstChild.textContent);
const heads = [...document.querySelectorAll("#rows thead th")];
const sorts = () => heads.map(head => head.getAttribute("aria-sort")).filter(sort => sort !== "none");
const press = name => heads.find(head => head.textContent.trim() === name).querySelector("button").click();
const type = text => { const box = document.getElementById("rows-filter"); box.value = text;
  box.dispatchEvent(new Event("input")); return document.querySelector("output[for=rows-filter]").textContent; };
"""


def row(method, score, ttft):
    low, high = wilson(score * 10, 10)
    found = {"method": method, "n": 10, "score": score, "low": low, "high": high, "density": 0.1, "mass": 0.9}
    near = {"mass_low": 0.4, "estimate": 0.02, "output_error": 0.05, "kl_answer": 0.001, "kl_other": 0.01}
    near |= {"agree_answer": 1.0, "agree_other": 0.97, "read_bytes": 2_000_000, "peak_bytes": 9_000_000, "ceiling": 3.1}
    near["waterfall"] = {phase: {"select": 0.1, "attend": 0.4, "copy": 0.1, "rest": 1.0} for phase in PHASES}
    return found | near | {"ttft_s": ttft, "tpot_s": 0.02, "kv_bytes": 1_000_000}


@pytest.fixture(scope="module")
def rows():
    names = ["dense", "streaming", "minference+a-plan-with-a-very-long-name-that-goes-on-and-on", "quest", "duo"]
    found = [row(name, (3 * at % 10) / 10, 10.0 + 90 * (at % 2) + at) for at, name in enumerate(names)]
    return [*found, dict.fromkeys(found[0]) | {"method": "tidal", "error": "RuntimeError: " + "x" * 300}]


@pytest.fixture
def page(evaluation, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("saccade.evaluate.report.report._save", lambda page, pictures: [])
    source = random.Random(0)
    samples = [
        {
            "method": x["method"],
            "task": "needle",
            "length": 4096,
            "index": i,
            "prompt": str(i),
            "score": i % 2,
            "depth": d,
        }
        for x in rows[:5]
        for i, d in enumerate(source.random() for _ in range(10))
    ]
    maps = {"density": [[0.1] * 32] * 32, "mass": [[0.5] * 32] * 32, "phase": "prefill"}
    heads = [{"method": "quest", "task": "needle", "length": 4096} | maps]
    folders = [evaluation(tmp_path / name, rows, samples, heads) for name in ("first-run", "second-run")]
    return write_report(tmp_path / "report.html", folders).page


@pytest.fixture
def ask(page, tmp_path):
    """ask(script) -> (what the console said, what the script returned), in a window of some width."""

    def run(script, width=1200, dark=False):
        text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{EAR}", 1)
        probed = tmp_path / "probed.html"
        text = text.replace("</body>", f"{PROBE % script}</body>", 1)
        probed.write_text(FRAME % (width, html.escape(text, quote=True)), encoding="utf-8")
        argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        argv += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000"]
        argv += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000"]
        done = subprocess.run(
            [*argv, "--dump-dom", probed.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert said, done.stderr[-2000:]
        answer = json.loads(html.unescape(said[1]))
        return answer["heard"], answer["found"]

    return run


def test_renders_and_the_console_stays_silent(ask):
    heard, found = ask(
        NAMES + "return [document.title, names().length, document.querySelectorAll('svg').length, innerWidth,"
        "[...document.images].every(x => x.complete)]"
    )
    assert heard == []
    # two runs of six rows; for each two Pareto plots, six depth maps, a map of heads, two sets of bars, two waterfalls
    assert found == ["What the shortcut costs: reader", 12, 2 * (2 + 6 + 1 + 2 + 2), 1200, True]


def test_the_ear_hears(ask):
    heard, _ = ask('console.error("one"); console.warn("two"); return 0')
    assert heard == ["one", "two"]


def test_a_click_sorts_numbers_and_puts_failed_rows_last(ask, rows):
    _, found = ask(
        NAMES + 'const said = []; for (const name of ["First token", "First token", "Method", "Score"]) {'
        "press(name); said.push([sorts(), names()]); } return said"
    )
    both = sorted([*rows[:5], *rows[:5]], key=lambda x: x["ttft_s"])
    up = [x["method"] for x in both]
    assert found[0] == [["ascending"], [*up, "tidal", "tidal"]]
    assert found[1] == [["descending"], [*up[::-1], "tidal", "tidal"]]
    assert found[2] == [["ascending"], sorted([x["method"] for x in [*rows, *rows]])]
    scores = [x["method"] for x in sorted([*rows[:5], *rows[:5]], key=lambda x: x["score"])]
    assert found[3] == [["ascending"], [*scores, "tidal", "tidal"]]


def test_heads_are_sorted_by_keyboard(ask):
    """A button is what Enter and Space press; it must take the focus."""
    _, found = ask(
        NAMES + 'const button = heads[0].querySelector("button"); button.focus();'
        "return [document.activeElement === button, button.type, button.tabIndex]"
    )
    assert found == [True, "button", 0]


def test_the_filter_hides_rows_and_counts(ask):
    _, found = ask(
        NAMES + 'return [type("quest"), names(), type("QUEST second-run"), names(), type("nothing"), names(), type(""),'
        "names().length]"
    )
    assert found[:2] == ["2 of 12 rows", ["quest", "quest"]]
    assert found[2:6] == ["1 of 12 rows", ["quest"], "0 of 12 rows", []]
    assert found[6:] == ["12 rows", 12]


@pytest.mark.parametrize("width", [400, 800])
def test_nothing_overflows(ask, width):
    """Wide things scroll inside of themselves; all details are opened first."""
    _, found = ask(
        """document.querySelectorAll("details").forEach(x => x.open = true);
        const all = [...document.body.querySelectorAll("*")].filter(x => !x.closest(".scroll table, svg"));
        const wide = all.filter(x => x.getBoundingClientRect().right > innerWidth).map(x => x.outerHTML.slice(0, 90));
        const root = document.documentElement, table = document.querySelector(".scroll");
        return [innerWidth, root.scrollWidth, wide, table.scrollWidth > innerWidth]""",
        width=width,
    )
    assert found == [width, width, [], True]


def test_dark_is_dark(ask):
    look = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    light, dark = ask(look)[1], ask(look, dark=True)[1]

    def shade(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert shade(light[0]) > 600 > 200 > shade(light[1])
    assert shade(dark[0]) < 200 < 600 < shade(dark[1])
