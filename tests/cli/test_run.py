"""`nanoengine run`: what goes to the file, to standard output, to standard error, and which status comes out."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine.api.errors import ModelSourceError
from nanoengine.api.stats import EngineStats
from nanoengine.cli.common import ResultsLost
from nanoengine.cli.results import ResultsFile

Run = Callable[..., Result]
Rows = Callable[[], list[dict[str, Any]]]

CONFIG = """\
model: a/b
prompts:
  - one two three
  - - {role: system, content: be brief}
    - {role: user, content: "four five"}
  - "six = ${model.source}"
output: results.jsonl
"""


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, "utf-8")
        return "run.yaml"

    return write


def test_rows_answers_and_closing_line(fake: Any, nanoengine: Run, config: Any, rows: Rows) -> None:
    result = nanoengine("run", config(CONFIG))
    assert result.exit_code == 0, result.stderr
    assert [row["index"] for row in rows()] == [2, 1, 0]  # as they finish
    row = rows()[2]
    assert list(row) == [
        "index", "hash", "request_id", "prompt", "prompt_token_ids", "outputs", "num_cached_tokens", "metrics", "error",
    ]  # fmt: skip
    assert row["prompt"] == "one two three"
    assert row["prompt_token_ids"] == [1, 10, 11, 12, 2]  # through the chat template
    assert row["outputs"] == [
        {"text": " re: one two three é日", "token_ids": [7, 8], "finish_reason": "stop", "stop_reason": 2}
    ]
    assert (row["num_cached_tokens"], row["error"]) == (2, None)
    metrics = {name: round(value, 3) for name, value in row["metrics"].items()}
    assert metrics == {"queued": 0.5, "ttft": 1.0, "itl": 1.0, "latency": 2.0, "num_generated": 2}
    assert rows()[1]["prompt"][0] == {"role": "system", "content": "be brief"}
    assert "[0] one two three\nre: one two three é日\n" in result.stdout
    assert "[1] four five\n" in result.stdout
    assert "[2] six = a/b" in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    # 5 + 6 + 5 prompt tokens, of which 2 + 3 + 2 came from the cache
    assert last.startswith("3 prompts, 16 prompt + 6 generated tokens in ")
    assert last.endswith("tokens/s, TTFT median 1000 ms, prefix-cache hit rate 43.8%")
    assert "\r" not in result.stderr  # it is no terminal
    ready = next(line for line in result.stderr.splitlines() if line.startswith("ready in "))
    assert re.fullmatch(r"ready in \d+\.\d s \(process \d+\.\d.*\)", ready), ready
    assert fake.made[0].closed


def test_verbose_prints_every_phase_of_the_start(fake: Any, nanoengine: Run, config: Any) -> None:
    result = nanoengine("run", config("model: a/b\nprompts: [hello]\n"), "--verbose")
    phases = re.findall(r"^(\w[\w ]+?) +\d+\.\d{3} s$", result.stderr, re.M)
    assert phases == ["process", "import", "plugins", "weights", "total"]


def test_nothing_but_answers_on_standard_output(fake: Any, nanoengine: Run, config: Any) -> None:
    result = nanoengine("run", config("model: a/b\nprompts: [hello]\n"))
    assert result.stdout == "[0] hello\nre: hello é日\n\n"
    assert result.stderr.startswith("loading a/b\nfetching the model\n")


@pytest.mark.parametrize(
    ("chat", "template", "ids"), [(True, True, [1, 10, 2]), (True, False, [0]), (False, True, [0])]
)
def test_chat_only_where_wanted_and_possible(
    fake: Any, nanoengine: Run, config: Any, rows: Rows, chat: bool, template: bool, ids: list[int]
) -> None:
    fake.template = template
    assert nanoengine("run", config(CONFIG), "prompts=[hi]", f"chat={chat}").exit_code == 0
    assert rows()[0]["prompt_token_ids"] == ids


def test_overrides_reach_the_model(fake: Any, nanoengine: Run, config: Any) -> None:
    arguments = ("model=./x", "engine.max_num_seqs=3", "~output", "sampler.top_p=1e-3", "prompts=['what is x=y?']")
    assert nanoengine("run", config(CONFIG), *arguments).exit_code == 0
    found = fake.made[0].config
    assert (found.model.source, found.engine.max_num_seqs, found.output) == ("./x", 3, None)
    assert found.sampler == {"top_p": 0.001}
    assert found.prompts == ("what is x=y?",)


def test_prompts_from_a_file(fake: Any, nanoengine: Run, config: Any, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"q": "a b"}\n{"q": "é \\ud83d\\ude00"}\n')
    assert nanoengine("run", config(CONFIG), "prompts={file: p.jsonl, field: q}").exit_code == 0
    assert sorted(row["prompt"] for row in rows()) == ["a b", "é 😀"]


def test_failed_request_keeps_its_place_and_gives_1(fake: Any, nanoengine: Run, config: Any, rows: Rows) -> None:
    long = " ".join(["word"] * 30)
    result = nanoengine("run", config(CONFIG), f"prompts=[fine, {long}, refuse me]")
    assert result.exit_code == 1
    found = {row["index"]: row for row in rows()}
    assert [found[i]["error"] and found[i]["error"]["code"] for i in range(3)] == [None, "too_long", "invalid_prompt"]
    assert found[1]["error"] == {"code": "too_long", "message": "the prompt is too long"}
    assert found[1]["outputs"] == found[2]["outputs"] == []
    assert "[1] failed (too_long): the prompt is too long" in result.stderr
    assert "3 prompts, 2 failed, " in result.stderr
    assert "re: fine" in result.stdout


def test_a_long_prompt_is_printed_in_part_and_written_whole(
    fake: Any, nanoengine: Run, config: Any, rows: Rows
) -> None:
    long = "x" * 70_000
    result = nanoengine("run", config(CONFIG), f"prompts=[{long}, {'y' * 500}]")
    assert f"[0] {'x' * 500}... (70,000 characters)\n" in result.stdout
    assert f"[1] {'y' * 500}\n" in result.stdout
    assert sorted(row["prompt"] for row in rows()) == [long, "y" * 500]


def test_interrupt_keeps_what_is_finished(fake: Any, nanoengine: Run, config: Any, rows: Rows) -> None:
    fake.interrupt_after = 2
    result = nanoengine("run", config(CONFIG))
    assert result.exit_code == 130
    assert [row["index"] for row in rows()] == [2, 1]
    assert "interrupted; finished results are kept; --resume runs the rest\n" in result.stderr
    assert "2 of 3 prompts, " in result.stderr
    assert fake.made[0].closed


def test_interrupt_while_loading(fake: Any, nanoengine: Run, config: Any) -> None:
    fake.failure = KeyboardInterrupt()
    result = nanoengine("run", config(CONFIG))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted")


def test_each_row_is_on_disk_before_the_next_prompt(
    fake: Any, nanoengine: Run, config: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stats(self: Any) -> Any:  # asked between steps
        seen.append(len(rows()))
        return EngineStats()

    monkeypatch.setattr(fake, "stats", stats)
    monkeypatch.setattr("nanoengine.cli.run._STATE_SECONDS", -1.0)
    assert nanoengine("run", config(CONFIG)).exit_code == 0
    assert seen == [1, 2, 3, 3]  # and once at the end


def test_results_are_written_afresh_and_it_is_said(
    fake: Any, nanoengine: Run, config: Any, rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "results.jsonl").write_text('{"index": 7}\n')
    result = nanoengine("run", config(CONFIG))
    assert "results.jsonl exists already, and is overwritten" in result.stderr
    assert len(rows()) == 3
    assert "overwritten" not in nanoengine("run", config(CONFIG), "output=/dev/null").stderr


def test_a_model_that_fails_leaves_old_results_alone(fake: Any, nanoengine: Run, config: Any, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"index": 7}\n')
    fake.failure = ModelSourceError("no such model")
    result = nanoengine("run", config(CONFIG))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "error: no such model")
    assert "overwritten" not in result.stderr
    assert (tmp_path / "results.jsonl").read_text() == '{"index": 7}\n'


def test_output_in_a_new_folder(fake: Any, nanoengine: Run, config: Any, tmp_path: Path) -> None:
    assert nanoengine("run", config(CONFIG), "output=a/b/out.jsonl").exit_code == 0
    assert len((tmp_path / "a/b/out.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("output", [".", "run.yaml/x.jsonl"])
def test_output_that_cannot_be(fake: Any, nanoengine: Run, config: Any, output: str) -> None:
    result = nanoengine("run", config(CONFIG), f"output={output}")
    assert result.exit_code == 2
    assert f"cannot write output {output}" in result.stderr
    assert not fake.made  # reported before anything was loaded


MISTAKES = [
    (["run", "nope.yaml"], "no configuration file nope.yaml"),
    (["run", "nosuch"], "no file, recipe or model is called 'nosuch'; Valid: bare, quickstart"),
    (["run", "quikstart"], "did you mean 'quickstart'?"),
    (["run", "quickstart", "sampler.topp=1"], "did you mean 'top_p'?"),
    (["run", "quickstart", "prompts=[]"], "no prompts"),
    (["run", "quickstart", "prompts=null"], "no prompts"),
    (["run", "quickstart", "prompts={file: nope.jsonl}"], "nope.jsonl"),
    (["run", "quickstart", "nope.yaml"], "'nope.yaml' is no override"),
    (["run", "quickstart", "sampler=greedy,top_p"], "needs --multirun"),
    (["run", "quickstart", "--plugin", "nope.py"], "nope.py does not exist"),
    (["run", "quickstart", "--bogus"], "No such option"),
    (["run"], "Missing argument"),
    (["bogus"], "no command 'bogus' is installed"),
    (["config", "show", "quickstart", "engine.max_num_seqs=many"], "override 'engine.max_num_seqs=many'"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_give_2_and_no_traceback(fake: Any, nanoengine: Run, arguments: list[str], words: str) -> None:
    result = nanoengine(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not fake.made


def test_debug_shows_the_traceback(fake: Any, nanoengine: Run) -> None:
    result = nanoengine("run", "quickstart", "sampler.topp=1", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: override 'sampler.topp=1'")


def test_a_bug_is_not_taken_for_a_user_s_mistake(fake: Any, nanoengine: Run, config: Any) -> None:
    fake.failure = ZeroDivisionError("a bug")
    assert isinstance(nanoengine("run", config(CONFIG)).exception, ZeroDivisionError)


def test_plugin_file_brings_a_parameter(fake: Any, nanoengine: Run, config: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from nanoengine.api import SamplerSpec, ProcessorParams, hookimpl\n\n"
        "@dataclass(frozen=True)\n"
        "class Params(ProcessorParams):\n    sparkle: float = 0.0\n\n"
        "@hookimpl\n"
        "def register_samplers():\n"
        "    return [SamplerSpec(name='sparkle', params=Params, target='mine:Sparkle', api=1)]\n"
    )
    path = config(CONFIG)
    assert "unknown key 'sampler.sparkle'" in nanoengine("run", path, "sampler.sparkle=1").stderr
    assert nanoengine("run", path, "sampler.sparkle=1", "--plugin", "mine.py").exit_code == 0
    assert fake.made[0].config.sampler == {"sparkle": 1.0}
    wrong = nanoengine("run", path, "sampler.sparkle=much", "--plugin", "mine.py")
    assert "sampler.sparkle must be a number" in wrong.stderr


def test_rows_are_plain_json(fake: Any, nanoengine: Run, config: Any, tmp_path: Path) -> None:
    nanoengine("run", config(CONFIG))
    text = (tmp_path / "results.jsonl").read_text("utf-8")
    assert "é日" in text
    assert all(json.loads(line) for line in text.splitlines())


def test_output_that_would_overwrite_an_input(fake: Any, nanoengine: Run, config: Any, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to("p.jsonl")
    path, text = config(CONFIG), (tmp_path / "run.yaml").read_text()
    for output, what in (
        ("run.yaml", "configuration file"), (str(tmp_path / "p.jsonl"), "prompts file"), ("link.jsonl", "prompts file"),
    ):  # fmt: skip
        result = nanoengine("run", path, "prompts={file: p.jsonl}", f"output={output}")
        assert result.exit_code == 2
        assert f"output {output} is the {what}, which it would overwrite" in result.stderr
    assert not fake.made
    assert (tmp_path / "p.jsonl").read_text() == '{"prompt": "a"}\n'
    assert (tmp_path / "run.yaml").read_text() == text


@pytest.mark.parametrize("there", [True, False])
def test_output_without_permission_is_reported_before_loading(
    fake: Any, nanoengine: Run, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        (tmp_path / "results.jsonl").write_text("old\n")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may do all
    result = nanoengine("run", config(CONFIG))
    assert result.exit_code == 2
    assert "error: cannot write output results.jsonl: no permission to write " in result.stderr
    assert not fake.made


def test_a_full_disk_is_one_line_and_1(fake: Any, nanoengine: Run, config: Any) -> None:
    result = nanoengine("run", config(CONFIG), "output=/dev/full")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: cannot write output /dev/full: No space left on device; rows kept there: 0"
    )
    assert "Traceback" not in result.stderr
    assert fake.made[0].closed


def test_a_disk_that_fills_up_keeps_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Filling(FileIO):
        """Takes 30 bytes in all, 7 at a time."""

        def write(self, data: Any) -> int:
            room = 30 - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[: min(7, room)])

        def close(self) -> None:
            super().close()
            raise OSError(errno.EDQUOT, "Quota exceeded")

    monkeypatch.setattr("nanoengine.observe.files.FileIO", Filling)
    path = tmp_path / "out.jsonl"
    results = ResultsFile(str(path))
    for _ in range(2):
        results.write({"error": 0})
    with pytest.raises(ResultsLost, match="No space left on device; rows kept there: 2"):
        results.write({"error": 0})
    with pytest.raises(ResultsLost, match="Quota exceeded; rows kept there: 2"), results:
        pass
    assert path.read_text() == '{"error": 0}\n' * 2


def test_one_prompt_is_no_prompts(fake: Any, nanoengine: Run, config: Any) -> None:
    result = nanoengine("run", config("model: a/b\nprompts: [hello]\n"))
    assert result.stderr.splitlines()[-1].startswith("1 prompt, ")


@pytest.mark.parametrize("text", ["import this\n", "\n\nimport this\n"])
def test_what_holds_no_results_is_not_overwritten(nanoengine: Run, config: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    result = nanoengine("run", config(CONFIG), "output=mine.py")
    assert result.exit_code == 2
    assert "has no results of a run" in result.stderr
    assert (tmp_path / "mine.py").read_text() == text
    assert "'-' is not a file" in nanoengine("run", config(CONFIG), "output=-").stderr


def test_results_that_cannot_be_read_are_not_overwritten(
    nanoengine: Run, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write a file may not always read it."""
    (tmp_path / "mine.jsonl").write_text("mine")
    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        if self.name == "mine.jsonl" and mode == "rb":
            raise PermissionError(13, "Permission denied")
        return original(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", opened)
    result = nanoengine("run", config(CONFIG), "output=mine.jsonl")
    assert result.exit_code == 2
    assert "cannot read output mine.jsonl, which exists already: Permission denied" in result.stderr
