"""Imports point down only, wherever they stand in a file, and a family of methods never imports another."""

import ast
from pathlib import Path

import saccade

ROOT = Path(saccade.__file__).parent
FLOORS = ["core", "kernels", "cache", "methods", "nn", "hf", "fit", "analysis", "reader", "evaluate", "recipe"]
FLOORS += ["parallel", "cli", "testing"]
ALLOWED = {}  # (file, module): why


def imports(file):
    """Every module of saccade that a file names in an import, as parts of its path."""
    package = ("saccade", *file.relative_to(ROOT).parts)[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from saccade import cli` names a module, `from saccade.core.call import Call` a class in one
            names = [stem] if stem.count(".") else [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "saccade")


def place(parts):
    """The floor of a module; the package's own lazy names count as the floor they come from."""
    if parts and parts[0] in saccade._EXPORTS:
        parts = tuple(saccade._EXPORTS[parts[0]].split(".")[1:])
    return parts


def violations(file):
    here = file.relative_to(ROOT).with_suffix("").parts
    if len(here) == 1:
        return
    for parts in map(place, imports(file)):
        if not parts or parts[0] not in FLOORS or (str(file.relative_to(ROOT)), ".".join(parts)) in ALLOWED:
            continue
        if FLOORS.index(parts[0]) > FLOORS.index(here[0]):
            yield f"{here[0]} imports {'.'.join(parts)}, which is above it"
        if parts[0] == here[0] == "methods":
            # methods/base.py and methods/apply.py are nobody's family
            mine, other = (p[1] if len(p) > 2 or (ROOT / p[0] / p[1]).is_dir() else None for p in (here, parts))
            if other is not None and mine != other:
                yield f"family {mine} imports family {other}"


def test_every_folder_has_a_floor():
    folders = {p.parent.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py") if p.parent != ROOT}
    assert folders <= set(FLOORS)


def test_imports_point_down():
    found = [f"{file.relative_to(ROOT)}: {what}" for file in sorted(ROOT.rglob("*.py")) for what in violations(file)]
    assert not found, "\n" + "\n".join(found)


def test_the_test_can_fail(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    lines = {
        "core/a.py": "import saccade.kernels.topk",
        "kernels/b.py": "def f():\n    from saccade import attach",
        "methods/select/c.py": "if TYPE_CHECKING:\n    from saccade.methods.decode.tidal import TidalDecode",
        "methods/select/d.py": "from ...cli import main",
        "methods/base.py": "from saccade.methods.select import pooled",
        "hf/fine.py": "from saccade.core.call import Call\nfrom saccade.hf.cache import StoreLayer",
    }
    (tmp_path / "methods/select").mkdir(parents=True)
    for name, text in lines.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {name: bool(list(violations(tmp_path / name))) for name in lines} == {n: n != "hf/fine.py" for n in lines}
