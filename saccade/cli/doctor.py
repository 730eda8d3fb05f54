"""`saccade doctor`: is the plan really at work on this model?"""

from __future__ import annotations

import argparse

from saccade.cli.arguments import add_model, load_model, positive
from saccade.cli.main import Result

HELP = "prove that a plan is at work on a model: calls, density, padded rows, bytes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, plan, length of the probe."""
    parser.add_argument("--plan", required=True, metavar="FILE|METHOD", help="plan file or method")
    parser.add_argument("--length", type=positive, default=512, help="tokens of the probe (512)")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Exit code 1 where there are problems."""
    from saccade.core.plan import Plan
    from saccade.evaluate.presets import resolve
    from saccade.hf.doctor import doctor

    loaded = load_model(args)
    plan = resolve(args.plan, loaded, args.length)
    found = doctor(loaded.model, Plan.uniform(loaded.model) if plan is None else plan, length=args.length)
    return Result(found.to_dict(), found.text(), 1 if found.problems else 0)
