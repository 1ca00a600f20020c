"""`nanoengine serve` on the mock model, in processes of its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanoengine.testing.byte_tokenizer import END, write_byte_tokenizer
from nanoengine.testing.mock_model import write_mock_checkpoint
from tests.server.running import Running, command_of

PLUGIN = Path(__file__).with_name("mock_plugin.py")
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONFIG = """\
model: {model}
attention: mock
sampler: {{temperature: 0}}
engine: {{device: cpu, load_format: dummy, kv_cache_memory: 8388608, max_num_batched_tokens: 2048, max_num_seqs: 64}}
server: {{port: 0}}
"""
LONG = 131_072  # tokens of the mock's context


def mock_folder(folder: Path, *, slow: bool = False) -> Path:
    """A mock model with a tokenizer of bytes and a chat template."""
    folder.mkdir(parents=True)
    tokenizer = write_byte_tokenizer(folder)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    write_mock_checkpoint(folder, vocab_size=size, max_position_embeddings=LONG, eos_token_id=end)
    for name, change in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("config.json", {"architectures": ["SlowMockForCausalLM" if slow else "MockForCausalLM"]}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


class MockServer(Running):
    """`pace`: a file with the seconds that a step takes, where the model is the slow one."""

    def __init__(self, command: Sequence[str], pace: Path) -> None:
        self._pace = pace
        self.steps_take(0)
        super().__init__(command, {"SLOW_MOCK_SECONDS": str(pace)})

    def steps_take(self, seconds: float) -> None:
        """From the next step on."""
        part = self._pace.with_suffix(".part")
        part.write_text(str(seconds))
        part.replace(self._pace)


def mock_server(folder: Path, *overrides: str, slow: bool = False) -> MockServer:
    """Starts a server. `folder`: for its model and configuration; they are made if they are not there."""
    model = folder / ("slow" if slow else "mock")
    if not model.exists():
        mock_folder(model, slow=slow)
    config = folder / f"{model.name}.yaml"
    config.write_text(CONFIG.format(model=model))
    command = [sys.executable, "-m", "nanoengine", "serve", str(config), *overrides, "--plugin", str(PLUGIN)]
    return MockServer(command, folder / "pace")


def engine_of(server: Running) -> int:
    """The engine's process."""
    [pid] = [pid for pid in server.children() if "nanoengine.service.process" in command_of(pid)]
    return pid


def https_of(server: Running) -> list[int]:
    return [pid for pid in server.children() if "nanoengine.server.http_process" in command_of(pid)]


def events(lines: Iterable[bytes]) -> Iterator[Any]:
    """The JSON of each event of a stream; it must end with [DONE]."""
    done = False
    for line in lines:
        text = line.decode().rstrip("\n")
        if text.startswith("data: "):
            assert not done
            done = text == "data: [DONE]"
            if not done:
                yield json.loads(text.removeprefix("data: "))
    assert done, "the stream ended without [DONE]"


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"no {name} in\n{text}"
    return sum(map(float, found))
