"""Chat templates run in processes of their own, within a deadline and a bound of memory, and end with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.errors import EngineClosed, NanoEngineError, RequestError
from nanoengine.text import templates
from nanoengine.text.templates import TemplateProcesses

MEMORY = 64 << 20


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses(seconds=30.0, memory=MEMORY)
    yield made
    made.close()


def children(made: TemplateProcesses) -> list[int]:
    return [process._child.pid for process in made._idle]


def refusal(made: TemplateProcesses, template: str, **variables: Any) -> str:
    with pytest.raises(RequestError) as caught:
        made.render(template, variables)
    assert caught.value.code == "invalid_prompt"
    assert caught.value.__cause__ is not None
    return str(caught.value)


def test_one_process_renders_all_templates_and_starts_with_the_first(processes: TemplateProcesses) -> None:
    made = TemplateProcesses()
    assert children(made) == []
    assert made.render("{{ a }}", {"a": "é\ud800"}) == "é\ud800"
    first = children(made)
    assert len(first) == 1
    assert made.render("{{ a|length }}", {"a": [1, 2]}) == "2"
    assert "no" in refusal(made, "{{ raise_exception('no') }}")
    assert children(made) == first
    made.close()
    made.close()
    with pytest.raises(EngineClosed):
        made.render("", {})
    with pytest.raises(ProcessLookupError):
        os.kill(first[0], 0)


LOOP = "{% for i in range(99999) %}"
SLOW = LOOP * 3 + "{% endfor %}" * 3
BOMBS = {
    "a long text": "{{ 'a' * 10**10 }}",
    "a text within the address space": "{{ 'a' * (40 * 10**6) }}",
    "a filter": "{{ 'a'|center(10**9) }}",
    "a method": "{{ 'a'.center(10**9) }}",
    "a format": "{{ '%999999999d' % 1 }}",
    "another format": "{{ '{:>999999999}'.format(1) }}",
    "doubling": "{% set ns = namespace(a='a') %}" + LOOP + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "a list": "{{ [0] * 10**9 }}",
    "a constant": "{{ 2 ** (10**10) }}",
    "a doubled list": "{% set ns = namespace(a=[1]) %}" + LOOP + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_memory_fails_alone(processes: TemplateProcesses, name: str) -> None:
    assert "took more than 64 MiB (chat_template_memory)" in refusal(processes, BOMBS[name])
    assert processes.render("{{ a }}", {"a": "next"}) == "next"


@pytest.mark.parametrize(
    "template",
    [
        SLOW,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x = 9 ** (9 ** 9) %}",  # one operation in C that no signal handler of Python's could end
    ],
    ids=["loops", "macros", "one operation"],
)
def test_a10_a_template_that_takes_too_long_is_killed(template: str) -> None:
    made = TemplateProcesses(seconds=30.0, memory=1 << 30)
    assert made.render("", {}) == ""
    (first,) = children(made)
    made._seconds = 0.3
    assert "took longer than 0.3 s (chat_template_timeout)" in refusal(made, template)
    made._seconds = 30.0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert made.render("{{ a }}", {"a": "next"}) == "next"
    made.close()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10**9)|list }}", "Range too big"),
        ("a\n{{ 1 + '' }}", r"TypeError: .*\(line 2 of the template\)"),
        ("a\n{% if %}", "Expected an expression.*line 2"),
        ("\n\n{{ raise_exception('roles must alternate') }}", r"roles must alternate \(line 3 of the template\)"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ lists.append(1) }}", "unsafe"),
        ("{% set ns = namespace(_a=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ dict.__mro__.a }}", "unsafe|no attribute|undefined"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_what_a_template_raises_is_its_own_message_with_the_line(
    processes: TemplateProcesses, template: str, words: str
) -> None:
    processes.render("", {})
    before = children(processes)
    with pytest.raises(RequestError, match=rf"the chat template rejected the messages: [\s\S]*{words}"):
        processes.render(template, {"lists": [1]})
    assert children(processes) == before


def test_what_a_template_says_of_half_a_surrogate_pair_can_be_printed(processes: TemplateProcesses) -> None:
    said = refusal(processes, "{{ raise_exception('unknown role ' ~ role) }}", role="a\ud800")
    assert said.encode().endswith(b"unknown role a\\ud800 (line 1 of the template)")


def test_variables_that_cannot_be_handed_over_are_refused(processes: TemplateProcesses) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert "too deeply nested" in refusal(processes, "{{ a }}", a=deep)
    assert processes.render("{{ a }}", {"a": "next"}) == "next"


def test_a_long_conversation_goes_through(processes: TemplateProcesses) -> None:
    text = "é" * 10**6
    assert processes.render("{{ a }}", {"a": text}) == text


def test_callers_of_several_threads_do_not_wait_for_a_slow_template() -> None:
    made = TemplateProcesses(seconds=200.0)
    slow = threading.Thread(target=_ignored, args=(made, SLOW))
    slow.start()
    while made._places._value == 2:  # type: ignore[attr-defined]
        time.sleep(0.01)
    assert [made.render("{{ a }}", {"a": i}) for i in range(50)] == [str(i) for i in range(50)]
    assert slow.is_alive(), "the slow one is still running"
    found: list[str] = []
    threads = [threading.Thread(target=lambda i=i: found.append(made.render("{{ a }}", {"a": i}))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(map(str, range(8)))
    _kill_children()
    slow.join()
    made.close()


def _ignored(made: TemplateProcesses, template: str) -> None:
    with contextlib.suppress(NanoEngineError):  # killed amid the template, or while its process starts
        made.render(template, {})


def _kill_children() -> None:
    """Those of this process that render templates."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
            if mine and "template_child" in (folder / "cmdline").read_text():
                os.kill(int(folder.name), signal.SIGKILL)


def test_a_process_that_died_while_idle_is_replaced(processes: TemplateProcesses) -> None:
    processes.render("", {})
    (pid,) = children(processes)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert processes.render("{{ a }}", {"a": "next"}) == "next"
    assert children(processes) != [pid]


def test_a_process_that_died_unseen_is_replaced(processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may die between the look at it and the template."""
    processes.render("", {})
    (pid,) = children(processes)
    os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(templates._Process, "lives", lambda self: True)
    assert processes.render("{{ a }}", {"a": "next"}) == "next"
    assert children(processes) != [pid]


def test_a_process_that_dies_amid_a_template_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os, time\nos.write(0, b'ready')\nos.read(0, 1)\nos.kill(os.getpid(), 11)")
    monkeypatch.setattr(templates, "_CHILD", child)
    made = TemplateProcesses()
    assert "the chat template failed: it ended its process (SIGSEGV)" in refusal(made, "")


def test_an_interrupt_ends_the_process_that_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer would be taken for that of the next template."""
    made = TemplateProcesses()
    made.render("", {})
    (pid,) = children(made)

    def interrupted(*args: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(templates._Process, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.render("late", {})
    assert made.render("{{ a }}", {"a": "next"}) == "next"
    assert children(made) != [pid]
    made.close()


def test_a_process_that_does_not_start_is_an_error_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child.py"
    child.write_text("import no_such_module")
    monkeypatch.setattr(templates, "_CHILD", child)
    with pytest.raises(NanoEngineError, match=r"did not start \(exit status 1\).*child.py.*jinja2"):
        TemplateProcesses().render("", {})


PARENT = """
import os, sys, time
from nanoengine.text.templates import TemplateProcesses
made = TemplateProcesses(seconds=60)
assert "torch" not in sys.modules and "jinja2" not in sys.modules
print(made.render("{{ a }}", {"a": 1}), made._idle[0]._child.pid, flush=True)
if sys.argv[1] == "fork":
    child = os.fork()
    print("fork" if child else "child", made.render("{{ a }}", {"a": 2}), flush=True)
    if child:
        assert os.waitpid(child, 0)[1] == 0
        print(made.render("{{ a }}", {"a": 3}), made._idle[0]._child.pid, flush=True)
    sys.exit()
if sys.argv[1] == "amid":
    made.render("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, {})
time.sleep(60)
"""


def started(how: str) -> tuple[subprocess.Popen[str], int]:
    """A program without a `__main__` guard that has rendered a template; the process that did."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    one, pid = process.stdout.readline().split()
    assert one == "1"
    return process, int(pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_idle_process_ends_with_its_parent(number: int) -> None:
    process, pid = started("idle")
    process.send_signal(number)
    process.communicate(timeout=100)
    _gone(pid)


def test_a_process_amid_a_template_ends_after_its_deadline() -> None:
    made = TemplateProcesses(seconds=30.0)
    made.render("", {})
    (process,) = made._idle
    request = templates.marshal.dumps((SLOW, {}, 0.2))
    process._socket.sendall(len(request).to_bytes(8, "little") + request)  # and no one waits for the answer
    assert process._child.wait(timeout=100) == -signal.SIGALRM


def test_a_fork_has_processes_of_its_own_and_ends_none_of_its_parent_s() -> None:
    process, pid = started("fork")
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert sorted(out.splitlines()) == sorted(["child 2", "fork 2", f"3 {pid}"])
    _gone(pid)


def _gone(pid: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # its parent of now is to reap it
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")


def test_nothing_can_be_written_by_a_template_s_process(processes: TemplateProcesses) -> None:
    processes.render("", {})
    (pid,) = children(processes)
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    found = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert found["Max file size"] == found["Max core file size"] == "0"
    assert int(found["Max address space"]) < MEMORY + (512 << 20)


def test_the_child_imports_jinja2_and_no_more_than_the_standard_library() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='child'); "
        "tops = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names); "
        "print(*sorted(tops))"
    )
    command = [sys.executable, "-P", "-S", "-c", code, str(templates._CHILD)]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    assert set(done.stdout.split()) <= {"__main__", "jinja2", "markupsafe"}
