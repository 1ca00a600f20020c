"""Names that no file can have are a mistake like any other: one message, status 2, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
PART_TOO_LONG, RECORD_TOO_LONG = "x" * 250, "x" * 244
"""File names of at most 255 bytes, with which `.NAME.part`, or what is written for `NAME.run.json`, has more."""
LONG, NOBODY = "x" * 5000, "~no-such-user/x"
COMMANDS = [
    ["run", LONG],
    ["run", f"{LONG}.yaml"],
    ["run", f"{NOBODY}.yaml"],
    ["run", "a\0b.yaml"],
    ["run", "run.yaml", f"model={LONG}"],
    ["run", "run.yaml", "model=~no-such-user"],
    ["run", "run.yaml", f"output={LONG}"],
    ["run", "run.yaml", f"output={NOBODY}"],
    ["run", "run.yaml", f"prompts={LONG}.jsonl"],
    ["run", "run.yaml", f"prompts={NOBODY}.jsonl"],
    ["run", "run.yaml", 'output="a\\0b"'],
    ["run", "run.yaml", f"output={PART_TOO_LONG}"],
    ["run", "run.yaml", f"output={RECORD_TOO_LONG}"],
    ["run", "run.yaml", f"output=new/{RECORD_TOO_LONG}"],
    ["run", "run.yaml", "output=ring"],
    ["run", "run.yaml", "--trace", PART_TOO_LONG],
    ["run", "run.yaml", "--trace", "ring"],
    ["run", "run.yaml", "--trace", "a\0b"],
    ["run", "run.yaml", "--trace", LONG],
    ["run", "run.yaml", "--trace", NOBODY],
    ["run", "run.yaml", "--plugin", f"{LONG}.py"],
    ["run", "run.yaml", "--plugin", f"{NOBODY}.py"],
    ["run", "run.yaml", "--resume", f"output={LONG}"],
    ["run", "--resume", LONG],
    ["run", "-m", LONG, "engine.seed=1,2"],
    ["run", "-m", "run.yaml", "engine.seed=1,2", "--trace", LONG],
    ["config", "show", LONG],
    ["config", "show", NOBODY],
    ["report", LONG],
    ["report", NOBODY],
    ["bench", "serving", "run.yaml", "--engine", "max_num_seqs=[1"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda each: " ".join(each)[:40].replace("\0", "0"))
def test_a_name_that_no_file_can_have(fake: Any, nanoengine: Run, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "run.yaml").write_text("model: a/b\nprompts: [x]\n")
    (tmp_path / "ring").symlink_to("ring")
    result = nanoengine(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)[:300]
    assert not fake.made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ring", "run.yaml"]
