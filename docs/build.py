"""Write a page per method from its docstring: docs/methods/<name>.md. Run with `make docs`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from saccade.core.table import METHODS, family, find

HERE = Path(__file__).parent / "methods"


def page(name: str) -> str:
    """The page of one method."""
    cls = find(name)
    module = sys.modules[cls.__module__]
    idea = (inspect.getdoc(module) or "").splitlines()[0]
    source = cls.__module__.replace(".", "/") + ".py"
    lines = [
        f"# {name}",
        "",
        idea,
        "",
        f"- class `{cls.__module__}.{cls.__name__}` ([source](../../{source}))",
        f"- family {family(name)}; phases {', '.join(cls.phases)}",
        f"- paper: {cls.paper or 'none'}",
        f"- strictly causal: {'yes' if cls.strictly_causal else 'no, the choice of indices looks at later tokens'}",
        f"- chunked prefill: {cls.chunked}",
    ]
    if "prefill" in cls.phases:
        lines.append(f"- later prompts over a cache that evicts: {later(cls)}")
    if "cache" in cls.phases:
        able = ", ".join(f"`{n}`" for n in METHODS if "prefill" in find(n).phases and reads_on(find(n), cls))
        others = f"dense over {'everything' if cls.lossless else 'what is kept'}, by the policy"
        lines.append(
            f"- later prompts: {able + ' read them themselves; beside other methods ' if able else ''}{others}"
        )
    if "layer" not in cls.phases:
        lines.append(f"- see it: `saccade show {name}`; try it: `saccade demo {name}`")
    lines += ["", "```text", inspect.getdoc(cls) or "", "```", ""]
    return "\n".join(lines)


def later(cls: type) -> str:
    """Who reads a later prompt where a policy has dropped tokens."""
    if "inner" in getattr(cls, "__dataclass_fields__", {}):
        return "as its inner method"
    return "dense over what the policy keeps" if cls.unbroken else "read by the method itself"


def reads_on(cls: type, policy: type) -> bool:
    """Does a method read later prompts over what a policy leaves?"""
    wrapper = "inner" in getattr(cls, "__dataclass_fields__", {})
    return not wrapper and (cls.reads_far if policy.lossless else not cls.unbroken)


def main() -> None:
    """Write all pages and their index."""
    HERE.mkdir(exist_ok=True)
    rows = ["# Methods", "", "| name | family | phases | paper |", "|---|---|---|---|"]
    for name in METHODS:
        (HERE / f"{name}.md").write_text(page(name), encoding="utf-8")
        cls = find(name)
        rows.append(f"| [{name}]({name}.md) | {family(name)} | {', '.join(cls.phases)} | {cls.paper} |")
    (HERE / "README.md").write_text("\n".join([*rows, ""]), encoding="utf-8")
    print(f"{len(METHODS)} pages in docs/methods")


if __name__ == "__main__":
    main()
