"""`python -m fuzz.child KIND SEED START STOP DESCRIPTOR`: the cases START to STOP of a seed. See `harness`.

It reports to the descriptor, each message ended by a NUL: `ready`, then for each case `case NUMBER REPR` and, if it
crashed, `crash TRACEBACK`, which ends the process; at last `end STOP`.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import traceback
from itertools import islice

from nanoengine.api.errors import NanoEngineError

_LONGEST = 20_000  # characters of a case that are shown


def main() -> None:
    kind, seed, start, stop, descriptor = sys.argv[1], *map(int, sys.argv[2:])
    module = importlib.import_module(f"fuzz.{kind}")

    def report(message: str) -> None:
        data = memoryview(message.replace("\0", "\\0").encode("utf-8", "backslashreplace") + b"\0")
        while data:
            data = data[os.write(descriptor, data) :]

    warm = getattr(module, "warm", None)  # what is to be loaded before memory is bounded
    if warm is not None:
        warm()
    report("ready")
    sys.stdin.read()  # until memory is bounded
    for number, case in enumerate(islice(module.mutants(random.Random(seed)), start, stop), start):
        report(f"case {number} {_shown(case)}")
        try:
            module.run(case)
        except NanoEngineError as error:
            try:
                str(error).encode("utf-8", "backslashreplace")
            except BaseException:  # noqa: BLE001
                report(f"crash its error cannot be shown\n{traceback.format_exc()}")
                return
        except BaseException:  # noqa: BLE001 - each is a finding
            report(f"crash {traceback.format_exc()}")
            return
    report(f"end {stop}")


def _shown(case: object) -> str:
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return repr(case)[:_LONGEST]
    finally:
        sys.set_int_max_str_digits(digits)


if __name__ == "__main__":
    main()
