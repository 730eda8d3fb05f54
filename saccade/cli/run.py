"""`saccade run`: one prompt through a plan."""

from __future__ import annotations

import argparse

from saccade.cli.arguments import add_model, load_model, positive, text_of
from saccade.cli.main import Result
from saccade.cli.progress import warn
from saccade.cli.table import number, percent, size, table
from saccade.core.errors import InputError

HELP = "answer a question about a text file through a plan, and say what it took"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, plan, prompt."""
    parser.add_argument("--plan", default="dense", metavar="FILE|METHOD", help="plan file or method (dense)")
    parser.add_argument("--prompt-file", required=True, metavar="FILE", help="text to read; - for stdin")
    parser.add_argument("--question", default="", help="put after the text, with a blank line between")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="most tokens to generate (64)")
    parser.add_argument("--stop", default="\n", help="text that ends the answer (newline); '' for none")
    add_model(parser)


def run(args: argparse.Namespace) -> Result:
    """Answer, timed; then once more, watched, for the density."""
    from saccade.evaluate.measure import answers, looked, times
    from saccade.evaluate.presets import resolve
    from saccade.evaluate.trace import trace

    text = text_of(args.prompt_file)
    prompt = f"{text}\n\n{args.question}" if args.question else text
    if not prompt.strip():
        raise InputError(f"{args.prompt_file}: there is no text in it")
    loaded = load_model(args)
    ids = list(loaded.tokenizer(prompt)["input_ids"])
    if line := loaded.beyond(len(ids) + args.max_new_tokens):
        warn(line)
    plan = resolve(args.plan, loaded, len(ids))
    (said,) = answers(loaded, plan, [ids], max_new_tokens=args.max_new_tokens, stop=args.stop)
    watched = None if plan is None else trace(loaded, plan, ids)
    seen = looked(watched, plan)
    data = {
        "model": loaded.name,
        "plan": args.plan,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "length": len(ids),
        "answer": said.text,
        **times([said]),
        **seen,
    }
    row = [
        str(len(ids)),
        number(data["ttft_s"], ".2f", " s"),
        "-" if data["tpot_s"] is None else f"{1000 * data['tpot_s']:.1f} ms",
        size(data["kv_bytes"]),
        percent(seen["density_prefill"]),
        percent(seen["density_decode"]),
    ]
    head = ["tokens", "first token", "per token", "keys and values", "reads in prefill", "in decode"]
    return Result(data, f"{said.text or '(no answer: its first token ended it)'}\n\n{table(head, [row], 'rrrrrr')}")
