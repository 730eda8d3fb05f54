"""The files that MInference and DuoAttention published, on models of their shape whose heads are 8 wide."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from saccade import Assign, ModelShape, Plan, attach
from saccade.cli.main import main
from saccade.core.errors import PlanError
from saccade.evaluate.presets import read_plan
from saccade.fit.published import from_duo

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "plans"
FILES = sorted([*FOLDER.glob("minference/*.json"), *FOLDER.glob("duo-attention/*/*.tsv")])
MINFERENCE = [path for path in FILES if path.suffix == ".json"]
DUO = [path for path in FILES if path.suffix == ".tsv"]
KEY_HEADS = {"Llama_3.1": 8, "Phi_3": 32, "Qwen2.5": 4, "Llama-2": 32, "Meta-Llama-3.1": 8, "Mistral": 8}
NONE = [pytest.param(None, marks=pytest.mark.skip(reason=f"the published files are not in {FOLDER}"))]


def name_of(path):
    return "none" if path is None else path.parent.name if path.suffix == ".tsv" else path.name


def over(paths):
    return pytest.mark.parametrize("path", paths or NONE, ids=name_of)


def shape_of(path):
    kv = next(count for start, count in KEY_HEADS.items() if name_of(path).startswith(start))
    if path.suffix == ".tsv":
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        assert len(rows[0]) == kv
        return ModelShape(len(rows), 32, kv)
    rows = json.loads(path.read_text())
    return ModelShape(len(rows), len(rows[0]), kv)


def model_of(shape, layers=None):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=shape.heads,
        intermediate_size=32,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=8,
        vocab_size=50,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    return tf.LlamaForCausalLM(config).eval()


def read(model, cache, ids, prompt):
    """Logits of a prompt and of what follows it token by token."""
    with torch.no_grad():
        parts = [ids[:, :prompt], *(ids[:, at : at + 1] for at in range(prompt, ids.shape[1]))]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@over(FILES)
def test_attaches_prefills_and_decodes(path):
    """At lengths below every head's budget a published plan leaves attention as it is."""
    shape, ids = shape_of(path), torch.randint(0, 50, (1, 94))
    model = model_of(shape)
    want = read(model, tf.DynamicCache(config=model.config), ids, 90)
    with attach(model, read_plan(str(path), model)) as session:
        got = read(model, session.cache(94), ids, 90)
        assert set(session.calls.values()) == {5}
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@over(MINFERENCE)
def test_minference_heads_are_as_sparse_as_their_entries_say(path):
    """Two layers at 1000 tokens: heads of 30 columns and 800 diagonals read no more, those of 6096 diagonals all."""
    shape, rows = shape_of(path), json.loads(path.read_text())[:2]
    plan = read_plan(str(path), shape)
    model, dense = model_of(shape, layers=2), torch.ones(1000, 1000).tril().bool()
    found = {}
    with attach(model, Plan.per_head(model, plan.layers[:2])) as session, torch.no_grad():
        session.watch = lambda seen: found.update({seen.call.layer: seen.pattern.mask(seen.call)[0]})
        model(torch.randint(0, 50, (1, 1000)), past_key_values=session.cache(1000), logits_to_keep=1)
    sizes = set()
    for layer, row in enumerate(rows):
        for head, (kind, columns, diagonals, _) in row.items():
            read_most = int(found[layer][int(head)].sum(-1).max())
            sizes.add((columns, diagonals))
            if kind == "vertical_and_slash" and diagonals >= 1000:
                assert torch.equal(found[layer][int(head)], dense)
            elif kind == "vertical_and_slash":
                # diagonals lie in blocks of 64, and may touch one more; the last queries' block may stand apart
                assert read_most <= columns + diagonals + 3 * 64
            assert (found[layer][int(head)] & ~dense).sum() == 0
    assert len(sizes) > 1


@over(DUO)
def test_duo_heads_of_small_gates_hold_less(path):
    shape = shape_of(path)
    gates = torch.tensor([[float(g) for g in line.split()] for line in path.read_text().splitlines() if line.strip()])
    plan = from_duo(path, shape, sparsity=0.5, sink=4, recent=16)
    held = torch.full((shape.layers, shape.kv_heads), 120)
    model = model_of(shape)
    with attach(model, plan) as session:
        cache = session.cache(120)
        read(model, cache, torch.randint(0, 50, (1, 120)), 120)
        for layer in range(shape.layers):
            for group in cache.layers[layer].store.groups:
                held[layer, list(group.heads)] = group.lengths[0]
    streams = held == 4 + 16 + 16
    assert streams.sum() == gates.numel() // 2 and (held[~streams] == 120).all()
    assert gates[streams].max() <= gates[~streams].min() + 1e-6


@over(FILES)
def test_plan_show_draws_it(path, capsys, tmp_path):
    assert main(["plan", "show", str(path), "--out", str(tmp_path / "plan.png")]) == 0
    text = capsys.readouterr().out
    # a line for each layer at least
    assert len(text.splitlines()) > shape_of(path).layers
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"
    assert main(["plan", "show", str(path), "--json"]) == 0
    phase = "cache" if path.suffix == ".tsv" else "prefill"
    maps = json.loads(capsys.readouterr().out)["maps"]
    assert [len(line) for line in maps[phase]] == [len(maps[phase][0])] * shape_of(path).layers


def test_a_plan_for_another_model_is_refused_before_any_work():
    plan = Plan.per_head(ModelShape(2, 32, 8), [[Assign((0,), "duo", {}, "cache")]] * 2)
    with pytest.raises(PlanError, match="layers"):
        attach(model_of(ModelShape(3, 32, 8)), plan)


HOSTILE = {
    "nothing": ("", "nothing in it"),
    "no heads": ("[{}]", "there is none"),
    "a head id too large": ('[{"1000000": ["stream_llm", 1, 2, 3]}]', "1000000"),
    "a head id in other digits": ('[{"\u00b2": ["stream_llm", 1, 2, 3]}]', "numbers up to 99999"),
    "a pattern that is a list": ('[{"0": [["x"], 1, 2, 3]}]', "pattern one of"),
    "an entry that is an object": ('[{"0": {"0": 1}}]', "pattern one of"),
    "a gate that is no number": ("nan\t1\n", "not a number"),
    "words": ("hello world\n", "begins with"),
    "rows of different lengths": ("1 2\n1\n", "one row per layer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_words(name, tmp_path):
    text, says = HOSTILE[name]
    (tmp_path / "given.json").write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=says) as found:
        read_plan(str(tmp_path / "given.json"))
    assert str(found.value).startswith(f"{tmp_path}") and len(str(found.value)) < 500


def test_what_a_file_does_not_say_is_not_made_up(tmp_path):
    """How query heads share key heads is known only once there is a model."""
    (tmp_path / "a.json").write_text('[{"0": ["stream_llm", 1, 2, 3], "1": ["stream_llm", 1, 2, 3]}]')
    (tmp_path / "a.tsv").write_text("0.5 0.1")
    for name, shape in (("a.json", ModelShape(1, 2, 1)), ("a.tsv", ModelShape(1, 4, 2))):
        assert "does not say" in read_plan(str(tmp_path / name)).note
        assert "does not say" not in read_plan(str(tmp_path / name), shape).note
