"""`nanoengine chat`: the conversation with a tiny real model in this process, then in a terminal as a user has it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner, Result

from nanoengine import LLM, SamplingParams
from nanoengine.api.errors import RequestError
from nanoengine.cli.app import app
from nanoengine.cli.chat import _edit_lines, _read, chat_params
from nanoengine.cli.common import printable
from nanoengine.cli.conversation import Conversation
from nanoengine.setup.config.config import load_config
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.usefixtures("forked")

Chat = Callable[..., Result]
CONFIG = """\
model: ./tiny
engine: {max_num_seqs: 1}
sampler: {temperature: 0, max_tokens: 12}
prompts: [not asked]
output: not-written.jsonl
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return tiny_llama(folder, with_tokenizer=True, max_position_embeddings=20_000)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "chat.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """`chat("hello\\n/exit\\n", "model=./x")`: lines on standard input, then arguments."""
    monkeypatch.chdir(folder)
    return lambda lines, *arguments: CliRunner().invoke(app, ["chat", "chat.yaml", *arguments], input=lines)


# -- as a script -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_python_api(chat: Chat, folder: Path) -> None:
    result = chat("hello\n\nand more \\\nof it\n")
    assert result.exit_code == 0, result.stderr
    messages: list[dict[str, str]] = []
    with LLM.from_config(folder / "chat.yaml", [f"model={folder / 'tiny'}"]) as llm:
        for text in ("hello", "and more \nof it"):
            messages.append({"role": "user", "content": text})
            [output] = llm.chat(messages, use_tqdm=False)
            messages.append({"role": "assistant", "content": output.outputs[0].text})
    assert result.stdout == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    assert not (folder / "not-written.jsonl").exists()
    assert "cut at sampler.max_tokens=12, 12 tokens, " in result.stderr


def test_prefix_cache_hits_are_shown(chat: Chat) -> None:
    result = chat(f"{'a long message ' * 10}\nshort\n/stats\n")
    first, second = re.findall(r"(\d+) of (\d+) prompt tokens from the prefix cache\]", result.stderr)
    assert int(first[0]) == 0
    assert int(second[0]) >= int(first[1]) // 16 * 16 - 16 > 100  # the first message's blocks
    total, share = int(first[1]) + int(second[1]), int(second[0])
    assert (
        f"4 messages; in total 2 answers, 24 tokens, {share} of {total} prompt tokens from the prefix" in result.stderr
    )
    assert ", 0 running, 0 waiting, 0 of " in result.stderr


def test_commands(chat: Chat) -> None:
    result = chat(
        "/system be brief\nhello\n/reset\nhello\n/system ''\n/system\n/reset\nhello\n/help\n//x\n/exit\nnever\n"
    )
    assert result.exit_code == 0, result.stderr
    prompts = [int(n) for n in re.findall(r"of (\d+) prompt tokens", result.stderr)]
    plain = len("<user\nhello>\n<assistant\n")  # one byte a token, and one for each special token
    assert prompts[:3] == [plain + len("<system\nbe brief>\n")] * 2 + [plain]
    for words in (
        "system prompt: be brief",
        "a new conversation begins, with the system prompt",
        "no system prompt",
        "/stats   shows",
    ):
        assert words in result.stderr
    assert len(prompts) == 4


def test_an_unknown_command_is_no_message(chat: Chat) -> None:
    result = chat("/rset\n/stats\n")
    assert result.exit_code == 1  # a script with it has not done what it says; at a terminal it is 0
    assert "no command /rset; did you mean '/reset'? Valid: " in result.stderr
    assert "0 messages; in total 0 answers" in result.stderr
    assert result.stdout == ""


def test_a_message_that_is_refused_leaves_the_conversation_as_it_was(chat: Chat) -> None:
    result = chat(f"hello\n{'x' * 300}\n/stats\nhello\n", "engine.max_model_len=256")
    assert result.exit_code == 1
    assert "no answer (too_long): " in result.stderr
    assert "/reset begins a new conversation" in result.stderr
    assert "2 messages; in total 1 answers" in result.stderr
    assert result.stderr.count("prompt tokens from the prefix cache]") == 2


def test_without_max_tokens_an_answer_goes_as_far_as_the_model(chat: Chat) -> None:
    result = chat("hello\n", "~sampler.max_tokens", "+sampler.ignore_eos=true", "engine.max_model_len=64")
    assert "[cut at max_model_len; /reset begins a new conversation, 40 tokens, " in result.stderr


def test_no_chat_template(chat: Chat, folder: Path, tmp_path: Path) -> None:
    bare = tiny_llama(tmp_path / "bare", with_tokenizer=True)
    (bare / "chat_template.jinja").unlink()
    result = chat("hello\n", "model=./bare")
    assert result.exit_code == 2
    assert "error: ./bare has no chat template, so it cannot chat; " in result.stderr
    result = chat("hello\n", "+engine.skip_tokenizer_init=true")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat=false"], "override 'chat=false': chat is false, but nanoengine chat needs the chat template"),
        (["sampler.topp=1"], "unknown key 'sampler.topp'"),
        (["sampler.n=2"], "override 'sampler.n=2': sampler.n is 2"),
        (["model=./nope"], "no model './nope'"),
    ],
)
def test_mistakes(chat: Chat, arguments: list[str], words: str) -> None:
    result = chat("hello\n", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_max_tokens_of_the_model_s_own_defaults_do_not_cut_an_answer(folder: Path) -> None:
    config = load_config(folder / "chat.yaml", ["~sampler"])
    assert chat_params(SamplingParams(max_tokens=16), config).core.max_tokens is None


# -- the conversation ------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, max_num_seqs=1) as llm:
        yield llm


def test_a_stopped_answer_keeps_what_was_shown(llm: LLM) -> None:
    talk, shown = Conversation(llm, SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)), list[str]()
    answer = talk.ask("hello", shown.append, lambda: len(shown) >= 5)
    assert answer.stopped
    assert answer.text == "".join(shown) != ""
    assert talk.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer.text}]
    assert llm.stats().running == 0
    assert llm.stats().free_blocks == llm.stats().num_blocks
    again = Conversation(llm, SamplingParams(temperature=0, ignore_eos=True, max_tokens=40))
    assert again.ask("hello", lambda text: None, lambda: False).text.startswith(answer.text)


def test_a_message_stopped_before_any_text_is_taken_back(llm: LLM) -> None:
    talk = Conversation(llm, SamplingParams(detokenize=False, max_tokens=None, ignore_eos=True))
    answer = talk.ask("hello", lambda text: None, lambda: True)
    assert (answer.stopped, answer.text, talk.messages) == (True, "", [])


def test_a_stream_takes_messages_as_chat_does(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=8)
    [whole] = llm.chat(messages, params, use_tqdm=False)
    deltas = list(llm.stream(messages, params, delta=True, add_generation_prompt=True))
    assert "".join(sample.text for each in deltas for sample in each.outputs) == whole.outputs[0].text
    assert (deltas[0].prompt, deltas[0].prompt_token_ids) == (whole.prompt, whole.prompt_token_ids)
    with pytest.raises(RequestError, match="must be a string or a list of parts"):
        next(llm.stream([{"role": "user", "content": 3}], params))


def test_generate_of_plain_text_hints_at_chat_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(temperature=0, max_tokens=1)
    llm._hinted = False
    llm.generate([1], params, use_tqdm=False)
    llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)
    assert "chat template" not in caplog.text
    llm.generate(["Hi", "you"], params, use_tqdm=False)
    llm.generate("Hi", params, use_tqdm=False)
    assert caplog.text.count("for an answer call llm.chat(") == 1
    caplog.clear()
    llm._hinted = False
    llm.generate(f"{llm.get_tokenizer().all_special_tokens[0]}Hi", params, use_tqdm=False)
    assert not caplog.text


def test_a_long_prompt_reports_its_progress_and_can_be_stopped(model: Path) -> None:
    with LLM(model, max_num_seqs=1, max_num_batched_tokens=16) as llm:
        talk, seen = Conversation(llm, SamplingParams(temperature=0, max_tokens=4)), list[tuple[int, int]]()
        answer = talk.ask(
            "word " * 30, lambda text: None, lambda: False, lambda done, total: seen.append((done, total))
        )
        assert answer.output is not None
        total = len(answer.output.prompt_token_ids)
        assert seen == [(done, total) for done in range(0, total, 16)][: len(seen)]
        assert len(seen) > 2
        talk.reset()
        llm.reset_prefix_cache()
        seen.clear()
        stopped = talk.ask("word " * 30, lambda text: None, lambda: len(seen) > 1, lambda *each: seen.append(each))
        assert (stopped.stopped, stopped.output, talk.messages) == (True, None, [])
        assert len(seen) == 2
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_a_conversation_is_saved_and_continued(chat: Chat, folder: Path) -> None:
    whole = chat("/system be brief\nhello\nmore\n")
    assert chat("/system be brief\nhello\n", "--save", "talk.json").exit_code == 0
    saved = json.loads((folder / "talk.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    second = chat("more\n", "--continue", "talk.json")
    assert second.exit_code == 0, second.stderr
    assert "2 messages of talk.json; the last: " in second.stderr
    assert whole.stdout.endswith(second.stdout)
    assert len(json.loads((folder / "talk.json").read_text())["messages"]) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save", "chat.yaml"], "exists already; to go on with it, give --continue chat.yaml"),
        (["--save", "chat.yaml/talk.json"], "--save chat.yaml/talk.json: "),
        (["--continue", "half.json"], "half.json:1: not JSON"),
        (["--continue", "none.json"], "no such file: "),
        (["--continue", "open.json"], "must follow each other, and end with an answer"),
        (["--continue", "two.json"], "is not one conversation: it has 2 rows"),
    ],
)
def test_files_that_keep_no_conversation(chat: Chat, folder: Path, arguments: list[str], words: str) -> None:
    user = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    (folder / "open.json").write_text(user)
    (folder / "two.json").write_text(user * 2)
    (folder / "half.json").write_text(user[:20])
    result = chat("hello\n", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "loading" not in result.stderr


def test_a_conversation_is_saved_in_a_new_folder(chat: Chat, folder: Path) -> None:
    assert chat("hello\n", "--save", "talks/today/one.json").exit_code == 0
    assert len(json.loads((folder / "talks/today/one.json").read_text())["messages"]) == 2


def test_lines_that_come_together_are_one_message_where_a_paste_is_not_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With editline, and on a terminal without bracketed paste."""
    coming = ["def f():", "    return 1", "", "later"]
    monkeypatch.setattr("nanoengine.cli.chat._input", lambda prompt: coming.pop(0))
    monkeypatch.setattr("select.select", lambda reads, *_: (reads if len(coming) > 1 else [], [], []))
    assert _read(pasted_at_once=False) == "def f():\n    return 1\n"
    assert coming == ["later"]
    coming = ["one", "two", "three"]
    assert _read(pasted_at_once=True) == "one"
    monkeypatch.setenv("TERM", "dumb")
    assert not _edit_lines()


def test_the_line_under_an_answer_says_how_full_the_context_is(chat: Chat) -> None:
    result = chat("hello\n", "engine.max_model_len=48", "engine.block_size=16", "~sampler.max_tokens")
    assert re.search(
        r"\[cut at max_model_len; /reset begins .*the conversation has 48 of max_model_len=48 tokens", result.stderr
    )
    assert "[cut at sampler.max_tokens=1, 1 token, first after" in chat("hello\n", "sampler.max_tokens=1").stderr


def test_errors_are_raised(llm: LLM) -> None:
    talk = Conversation(llm, SamplingParams())
    with pytest.raises(RequestError, match="surrogates not allowed"):
        talk.ask("half \ud83d", lambda text: None, lambda: False)
    assert talk.messages == []


def test_control_characters_do_not_reach_a_terminal() -> None:
    class Screen:
        encoding = "ascii"

        def isatty(self) -> bool:
            return True

    screen: Any = Screen()
    assert printable("a\tb\n\x1b[2J\r\x9bé", screen) == "a\tb\n\\x1b[2J\\x0d\\x9b\\xe9"


# -- in a terminal ---------------------------------------------------------------------------------------------------


class Terminal(Protocol):
    """A chat that a user sits before."""

    def type(self, keys: str) -> None: ...

    def screen(self) -> str: ...

    def close(self) -> None: ...


class Tmux:
    """A pane of a tmux server of its own."""

    def __init__(self, command: str, cwd: Path) -> None:
        self.server = ["tmux", "-f", "/dev/null", "-S", str(cwd / "socket")]
        run = f"trap : INT; {command}; echo left with $?; sleep 60"
        self._tmux("new-session", "-d", "-x", "150", "-y", "200", "-c", str(cwd), run)

    def _tmux(self, *words: str) -> str:
        return subprocess.run([*self.server, *words], check=True, capture_output=True, text=True, timeout=60).stdout

    def type(self, keys: str) -> None:
        self._tmux("send-keys", "-H", *(f"{byte:x}" for byte in keys.encode()))

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-J")

    def close(self) -> None:
        self._tmux("kill-server")


class Pty:
    """The bare kernel side of a terminal, for machines without tmux."""

    def __init__(self, command: str, cwd: Path) -> None:
        self.seen, self.status = "", None
        self.process, self.master = pty.fork()
        if not self.process:
            os.chdir(cwd)
            os.execvp(sys.executable, shlex.split(command))

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def screen(self) -> str:
        while self.status is None and select.select([self.master], [], [], 0)[0]:
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace").replace("\r", "")
            except OSError:  # the other side is closed
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
                self.seen += f"\nleft with {self.status}"
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen)

    def close(self) -> None:
        if self.status is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.master)


def wait_for(terminal: Terminal, pattern: str, count: int = 1) -> None:
    end = time.monotonic() + 150
    while len(re.findall(pattern, terminal.screen())) < count:
        assert time.monotonic() < end, f"no {pattern!r} x {count} on:\n{terminal.screen()}"
        time.sleep(0.05)


@pytest.fixture(params=[Tmux, Pty])
def terminal(request: pytest.FixtureRequest, folder: Path) -> Iterator[Terminal]:
    if request.param is Tmux and shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    words = [sys.executable, "-m", "nanoengine", "chat", "chat.yaml", "~sampler.max_tokens", "+sampler.ignore_eos=true"]
    terminal: Terminal = request.param(shlex.join(words), folder)
    yield terminal
    terminal.close()


def test_in_a_terminal(terminal: Terminal) -> None:
    wait_for(terminal, "Ctrl-D leaves\\s*\n> ")
    terminal.type("hello\n")  # the answer would take 20,000 tokens
    wait_for(terminal, r"> hello\s*\n\S")
    terminal.type("\x03")
    wait_for(terminal, r"\[stopped, \d+ tokens")
    terminal.type("/stats\n")  # the program lives, and the partial answer is in the conversation
    wait_for(terminal, "conversation: 2 messages; in total 1 answers")
    wait_for(terminal, "0 running, 0 waiting, 0 of .*\n> ")
    terminal.type("half a line")
    wait_for(terminal, "> half a line")
    terminal.type("\x03")
    wait_for(terminal, "Ctrl-D or /exit leaves")
    terminal.type("more\n")
    wait_for(terminal, r"> more\s*\n\S")
    terminal.type("\x03\x03")  # an impatient one
    wait_for(terminal, r"\[stopped, \d+ tokens", 2)
    terminal.type("/stats\n")
    wait_for(terminal, "conversation: 4 messages; in total 2 answers.*\n.* KV blocks used\n> ")
    terminal.type("\x04")  # at the prompt: what is typed ahead of it is no end of input
    wait_for(terminal, "\nleft with 0")
    assert "Traceback" not in terminal.screen()


def test_several_pasted_lines_are_one_message(terminal: Terminal) -> None:
    wait_for(terminal, "Ctrl-D leaves\\s*\n> ")
    terminal.type("\x1b[200~first line\nsecond line\x1b[201~\n")
    wait_for(terminal, r"second line\s*\n\S")
    terminal.type("\x03")
    wait_for(terminal, r"\[stopped, \d+ tokens")
    terminal.type("/stats\n")
    wait_for(terminal, "conversation: 2 messages; in total 1 answers.*\n.* KV blocks used\n> ")
    terminal.type("\x04")  # at the prompt: what is typed ahead of it is no end of input
    wait_for(terminal, "\nleft with 0")
