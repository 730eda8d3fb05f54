"""Every name that `saccade eval` takes for the bundled reader, run as users do: no cell fails, no figure is missing."""

import math
import re
from functools import cache, partial

import pytest

from saccade.core.errors import PlanError
from saccade.core.table import METHODS, family, find
from saccade.evaluate import fields
from saccade.evaluate.crew import Processes, setups
from saccade.evaluate.model import READER, load
from saccade.evaluate.presets import preset
from saccade.evaluate.run import FIELDS, Ask, run

LENGTH = 768  # all policies leave something out, and hold less than dense
NAMES = [name for name in METHODS if "layer" not in find(name).phases]
POLICIES = [name for name in NAMES if family(name) == "policy"]
# what stands beside a policy or another phase in the documents
BESIDE = [
    "fetch+offload",
    "retrieval+offload",
    "minference+fetch+offload",
    "minference+tidal",
    "minference+duo",
    "trishape+snapkv",
    "trishape+razor",
    "xattention+h2o",
    "quest+duo",
    "tidal+moa",
    "quest@0.1",
    "snapkv@0.1",
]
AWAY = "reads the store only, but in layer 0 the plan moves tokens of heads [0, 1, 2, 3] out of it"
REFUSED = {
    "quest+offload": f"Quest {AWAY}",
    "hip+offload": f"HiP {AWAY}",
    "tidal+offload": "TidalDecode needs every token in the cache, but the plan also evicts",
}
QUICK = [
    *(("needle", name) for name in ("dense", *POLICIES, "fetch+offload", "minference+tidal", "minference+duo")),
    *(("multi-turn", name) for name in ("dense", "offload", "fetch+offload", "snapkv")),
]
SLOW = [(task, name) for task in ("needle", "multi-turn") for name in [*NAMES, *BESIDE] if (task, name) not in QUICK]
# these give the answer themselves where they leave something out: there is no pattern, and so no mass
ANSWERS = {"hyper", "hipextend", "longheads", "offload", "fetch+offload", "retrieval+offload"}
# at this length these read everything, or a part so large that no answer hangs on the rest
LOSSLESS = {"dense", "above", "actqkv", "fetch", "offload"}


@pytest.fixture(scope="module")
def reader():
    return load(READER, device="cpu")


@pytest.fixture(scope="module")
def row_of(reader, tmp_path_factory):
    """The row of a cell."""

    @cache
    def of(task, name):
        ask = Ask(READER, (name,), (task,), (LENGTH,), samples=1)
        return run(reader, ask, tmp_path_factory.mktemp("sweep"))[0]

    return of


@pytest.mark.parametrize(("task", "name"), [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)])
def test_a_cell_of_every_name(row_of, task, name):
    row = row_of(task, name)
    assert row.get("error") is None, row["error"]
    # a task has fields of its own beside these
    assert tuple(row)[: len(FIELDS)] == FIELDS and set(fields.FIELDS) <= set(row)
    unknown = {"peak_bytes"} | ({"mass", "mass_low", "estimate"} if name in ANSWERS else set())
    assert {field for field in FIELDS if row[field] is None} == unknown
    assert row["n"] == row["batch"] == 1 and 0 <= row["low"] <= row["score"] <= row["high"] <= 1
    # h2o's votes form every score of the prompt once more
    assert 0 < row["density"] < (2.5 if "h2o" in name else 1.5) and row["output_error"] >= 0 and row["ceiling"] > 0
    assert row["kv_bytes"] > 0 and row["read_bytes"] > 0
    for share in ("mass", "mass_low", "agree_answer", "agree_other"):
        assert row[share] is None or 0 <= row[share] <= 1 + 1e-6
    for phase in ("prefill", "decode"):
        parts = row["waterfall"][phase]
        assert set(parts) == {"select", "attend", "copy", "rest"} and all(math.isfinite(s) for s in parts.values())
    if name in LOSSLESS:
        assert row["kl_answer"] < 1e-9 and row["agree_answer"] == row["score"] == 1.0


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_holds_less_than_dense(row_of, name):
    dense = row_of("needle", "dense")
    assert row_of("needle", name)["kv_bytes"] < 0.8 * dense["kv_bytes"]
    read = row_of("needle", name)["read_bytes"]
    # what lies elsewhere is read, too
    assert read == dense["read_bytes"] if name == "offload" else read < 0.8 * dense["read_bytes"]
    assert name != "offload" or row_of("needle", "fetch+offload")["read_bytes"] < 0.8 * read


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_elsewhere_is_refused_before_anything_is_run(reader, tmp_path, name):
    with pytest.raises(PlanError, match=re.escape(f"{name}: {REFUSED[name]}")):
        run(reader, Ask(READER, (name, "streaming"), ("needle",), (512,), samples=1), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NAMES])
def test_layers_are_refused_before_anything_is_run(reader, tmp_path, name):
    with pytest.raises(PlanError, match=f"{name}: a layer with its own weights"):
        run(reader, Ask(READER, ("dense", name), ("needle",), (LENGTH,)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_every_name_has_a_plan_at_every_length(reader):
    for name in [*NAMES, *BESIDE]:
        for length in (128, 1024, 8192, 32768):
            plan = preset(name, reader.model, length, bundled=True)
            assert plan.note == name and len(plan.layers) == reader.shape.layers


@pytest.mark.slow
def test_jobs_measure_a_policy_as_this_process_does(reader, row_of, tmp_path):
    names = ("offload", "snapkv")
    ask = Ask(READER, names, ("needle",), (LENGTH,), samples=1)
    rows = run(reader, ask, tmp_path, crew=partial(Processes, setups(reader, 2, "cpu", 1)))
    timed = {"ttft_s", "tpot_s", "waterfall"}
    for row in rows:
        want = row_of("needle", row["method"])
        assert row.get("error") is None and all(row[field] is not None for field in timed)
        for field in set(FIELDS) - timed:
            assert row[field] == (
                pytest.approx(want[field], abs=1e-6) if isinstance(want[field], float) else want[field]
            )
