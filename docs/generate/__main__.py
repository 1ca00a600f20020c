"""`python docs/generate`: writes docs/reference.md and nanoengine/params/signatures.py from the code."""

from __future__ import annotations

from pathlib import Path

from reference_page import page
from reference_signatures import signatures

HERE = Path(__file__).parent


def main() -> None:
    frame = (HERE / "reference.md.in").read_text("utf-8")
    files = {"nanoengine/params/signatures.py": signatures(), "docs/reference.md": page(frame)}
    for name, text in files.items():
        (HERE.parents[1] / name).write_text(text, "utf-8")
        print(name)


if __name__ == "__main__":
    main()
