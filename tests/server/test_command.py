"""What `nanoengine serve` refuses before it binds a port or starts a process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanoengine.cli.app import app
from nanoengine.server import serve as command
from nanoengine.server.auth import VARIABLE
from nanoengine.testing.mock_model import write_mock_checkpoint

KEY = "sk-alice-123456"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command up to the start of the server: (exit status, what it says, the options it would start with)."""
    started: list[Any] = []
    monkeypatch.setattr(command, "run_server", lambda config, options, files: started.append(options) or 0)
    write_mock_checkpoint(tmp_path / "model")
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {tmp_path / 'model'}\nserver: {{port: 0}}\n")

    def ran(*overrides: str, **environment: str) -> tuple[int, str, Any]:
        result = CliRunner().invoke(app, ["serve", str(config), *overrides], env=environment)
        return result.exit_code, result.output, started.pop() if started else None

    return ran


@pytest.mark.parametrize(
    ("override", "content", "words"),
    [
        ("server.api_keys_file={file}", None, "cannot be read"),
        ("server.api_keys_file={folder}", None, "cannot be read"),
        ("server.api_keys_file={file}", b"\xff\xfe", "cannot be read"),
        ("server.api_keys_file={file}", b"# none\n", "has no keys"),
        ("server.api_keys_file={file}", b"short\n", "entry 1 is not KEY"),
        ("server.api_keys=[sk-alice-123456]", None, "server.api_keys: entry 1"),
        ("server.tool_parser=hermse", None, "did you mean 'hermes'"),
        ("server.reasoning_parser=thinks", None, "did you mean 'think'"),
    ],
)
def test_what_only_a_process_that_starts_later_would_see_ends_the_command_at_once(
    run: Any, tmp_path: Path, override: str, content: bytes | None, words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    status, said, options = run(override.format(file=file, folder=tmp_path))
    assert (status, options) == (2, None), said
    assert words in " ".join(said.split())
    assert KEY not in said


def test_a_wrong_key_of_the_environment_ends_the_command_at_once(run: Any) -> None:
    status, said, options = run(**{VARIABLE: "short"})
    assert (status, options) == (2, None)
    assert VARIABLE in said


def test_the_processes_get_the_keys_of_the_start_as_hashes(run: Any, tmp_path: Path) -> None:
    """A file that changes does not give one process other keys than the others."""
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    status, said, options = run(f"server.api_keys_file={tmp_path / 'keys'}", "server.reasoning_parser='<a> </a>'")
    assert status == 0, said
    assert (options.api_keys, options.api_keys_file) == ((f"alice:sha256:{HASH}",), None)
