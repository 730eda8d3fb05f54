"""Tri-shape's claim: a window and sinks suffice for reading if the last queries, which ask, read everything."""

from saccade.core.plan import ModelShape, Plan
from saccade.evaluate.generate import answer, serving
from saccade.evaluate.model import load
from saccade.evaluate.tasks.needle import Needle
from saccade.hf.meter import Meter


def test_the_last_rows_make_the_answer():
    reader = load()
    shape = ModelShape.of(reader.model)
    right, cost = {}, {}
    for name, args in (("trishape", {"sink": 64, "recent": 128}), ("streaming", {"sink": 64, "recent": 256})):
        found, meter = [], Meter(mass=False)
        with serving(reader, Plan.uniform(shape, prefill=(name, args)), meter) as cache:
            for index in range(4):
                sample = Needle(depth=0.3, value="pair").sample(reader.tokenizer, 1536, index)
                said = answer(reader, sample.ids, cache(len(sample.ids)), least=1).text
                # the first token is the prefill's own; decoding is dense
                found.append(said[:3] == sample.answer[:3])
        right[name], cost[name] = sum(found), meter.density("prefill")
    assert cost["trishape"] < cost["streaming"]
    assert right["trishape"] >= 3 and right["streaming"] <= 1
