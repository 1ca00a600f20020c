"""`python tests/fuzz [KIND ...] [--count N] [--seed S] [--only NUMBER]`: mutants of each kind; status 1 on a crash."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz.harness import fuzz, kinds


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"default: all, which are {', '.join(kinds())}")
    parser.add_argument("--count", type=_at_least(1), default=300, help="mutants of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", type=_at_least(0), metavar="NUMBER", help="only this one of the seed's")
    asked = parser.parse_args()
    unknown = set(asked.kinds) - set(kinds())
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(kinds())}")
    print(f"seed {asked.seed}", flush=True)
    start, stop = (0, asked.count) if asked.only is None else (asked.only, asked.only + 1)
    crashed = 0
    for kind in asked.kinds or kinds():
        began = time.monotonic()
        crashes, last = fuzz(kind, asked.seed, start, stop)
        crashed += len(crashes)
        for crash in crashes:
            print(f"\nCRASH {crash}\n", flush=True)
        ran = f"{last - start + 1} mutants (the last was number {last})"
        print(f"{kind}: {ran}, {len(crashes)} crashes, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
