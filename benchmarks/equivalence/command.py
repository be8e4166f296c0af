"""`python -m benchmarks equivalence [NAME CHECKOUT]`: our objectives against published code."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.equivalence import PEERS
from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import Comparison
from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.files import write_atomically


def main(arguments: list[str]) -> int:
    """Compare what was asked for; 2 means that the arguments or the checkout are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks equivalence", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which comparison (--list)")
    parser.add_argument("checkout", nargs="?", type=Path, metavar="CHECKOUT", help="directory of their repository")
    parser.add_argument("--list", action="store_true", help="print the comparisons and the repositories they need")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument(
        "--diffusers", type=Path, metavar="DIR", help="a checkout of diffusers whose schedulers theirs runs with"
    )
    options = parser.parse_args(arguments)
    if options.list:
        for name in PEERS:
            peer = _peer(name)
            print(f"{name:14} {peer.REPOSITORY:34} {(peer.__doc__ or '').splitlines()[0]}")
        return 0
    if options.name is None or options.checkout is None:
        parser.error("give the name of a comparison and a checkout of its repository; --list prints both")
    if options.name not in PEERS:
        parser.error(
            f"no comparison '{options.name}'; there are {', '.join(PEERS)}{did_you_mean(options.name, PEERS)}"
        )
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.absolute().parent}; make it first")
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    peer = _peer(options.name)
    checkout = Checkout(options.checkout, peer.REPOSITORY)
    if options.diffusers is None:
        comparisons = peer.compare(checkout)
    elif hasattr(peer, "compare_with_diffusers"):
        comparisons = peer.compare_with_diffusers(checkout, Checkout(options.diffusers, "huggingface/diffusers"))
    else:
        raise UserError(f"--diffusers: '{options.name}' takes no scheduler from diffusers; leave it out")
    print(f"{options.name}: https://github.com/{peer.REPOSITORY} at {checkout.commit}")
    for comparison in comparisons:
        print(_lines(comparison))
    if options.json:
        found = {"repository": peer.REPOSITORY, "commit": checkout.commit}
        rows = [comparison.as_json() for comparison in comparisons]
        write_atomically(options.json, json.dumps({**found, "comparisons": rows}, indent=2) + "\n")
    return 0


def _lines(c: Comparison) -> str:
    lines = [f"  {c.what} ({c.file}, {c.dtype}; settings: {c.settings})"]
    lines.append(f"    theirs {c.theirs:.15g}, ours {c.ours:.15g}, largest difference {c.difference:.1e}")
    for name, (difference, largest) in c.gradients.items():
        lines.append(f"    gradient by {name}: largest difference {difference:.1e} of entries up to {largest:.2g}")
    return "\n".join(lines)


def _peer(name: str) -> Any:
    return importlib.import_module(f"benchmarks.equivalence.{name}")
