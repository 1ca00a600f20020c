"""Commands of plugins: found as every part is, listed without being imported, and no command's trouble is another's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nanoengine.cli.app import app
from nanoengine.cli.commands import load_command
from nanoengine.lab.doctor import parts
from nanoengine.setup.plugins.discover import discover

OWN = ["run", "chat", "config", "plugins", "bench", "report", "sweep", "doctor", "serve"]
COMMAND = """
@hookimpl
def register_commands():
    return [CommandSpec(name={name!r}, target={target!r}, help="Say hello.", api=1)]
"""
WORKER = """
import sys
import typer, click
from nanoengine.api import ModelError

print("imported", file=sys.stderr)

def hello(name: str, times: int = 1):
    print(" ".join([f"hello {name}"] * times))

def status(how: str):
    if how == "exit": sys.exit(7)
    if how == "typer": raise typer.Exit(8)
    if how == "user": raise ModelError("no such model here")
    if how == "interrupt": raise KeyboardInterrupt

app = typer.Typer(help="Of typer.")

@app.command()
def one(): print("one of typer")

@app.command()
def two(): raise typer.Exit(9)

alone = typer.Typer()
alone.command()(hello)

@click.group()
def group(): "Of click."

@group.command()
@click.option("--times", default=1)
def deep(times): print("of click " * times)

@group.command()
@click.pass_context
def ends(context): context.exit(6)

@click.command()
@click.argument("number", type=int)
def plain(number): sys.exit(number)

number = 5
class Kind: ...
def odd(x: int | str): ...
empty = typer.Typer()
"""


def command(name: str, target: str) -> str:
    return COMMAND.format(name=name, target=target)


def nanoengine(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="nanoengine")


def listed(result: Result, title: str = "Commands:") -> dict[str, str]:
    """Name -> help, of what a group's help lists."""
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.partition(title)[2].strip().splitlines()
    return {words[0]: " ".join(words[1:]) for words in map(str.split, lines)}


@pytest.fixture
def hello(install: Any, tmp_path: Path) -> Callable[[str, str], None]:
    """hello("greet", "hello"): nanoengine-hello with that command, whose target is in a module of its own."""

    def do(name: str, attribute: str) -> None:
        (tmp_path / "site" / "hello_work.py").write_text(WORKER)
        install("nanoengine-hello", command(name, f"hello_work:{attribute}"))

    return do


def test_a_package_brings_a_command(hello: Any) -> None:
    hello("greet", "hello")
    assert listed(nanoengine("--help")) | {"greet": "Say hello."} == listed(nanoengine("--help"))
    result = nanoengine("greet", "you", "--times", "2")
    assert (result.exit_code, result.stdout) == (0, "hello you hello you\n")
    assert "Usage: nanoengine greet [OPTIONS]" in nanoengine("greet", "--help").stdout
    assert nanoengine("greet").exit_code == 2  # its argument is missing


def test_help_lists_all_and_imports_no_target(hello: Any) -> None:
    hello("greet", "hello")
    result = nanoengine("--help")
    assert list(listed(result)) == [*OWN, "greet"]
    assert "hello_work" not in sys.modules
    assert "imported" not in result.stderr
    assert nanoengine("greet", "x").exit_code == 0
    assert "hello_work" in sys.modules


def test_help_imports_neither_torch_nor_the_commands() -> None:
    code = (
        "import sys\nfrom nanoengine.cli import main\nsys.argv[1:] = ['--help']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "loaded = {'torch', 'transformers', 'nanoengine.cli.run', 'nanoengine.cli.plugins'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "lab = [name for name in sys.modules if name.startswith('nanoengine.lab.')]\n"
        "assert not lab, lab\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in OWN)


@pytest.mark.parametrize(
    ("attribute", "arguments", "status", "output"),
    [
        ("hello", ["you"], 0, "hello you\n"),
        ("app", ["one"], 0, "one of typer\n"),
        ("app", ["two"], 9, ""),
        ("app", ["three"], 2, ""),
        ("alone", ["you"], 0, "hello you\n"),
        ("group", ["deep", "--times", "2"], 0, "of click of click \n"),
        ("group", ["ends"], 6, ""),
        ("group", ["none"], 2, ""),
        ("plain", ["4"], 4, ""),
        ("plain", ["x"], 2, ""),
        ("status", ["exit"], 7, ""),
        ("status", ["typer"], 8, ""),
        ("status", ["user"], 2, ""),
        ("status", ["interrupt"], 130, ""),
        ("status", ["fine"], 0, ""),
    ],
)
def test_what_a_target_may_be_and_its_exit_status(
    hello: Any, attribute: str, arguments: list[str], status: int, output: str
) -> None:
    hello("greet", attribute)
    result = nanoengine("greet", *arguments)
    assert (result.exit_code, result.stdout) == (status, output), result.stderr
    if arguments == ["user"]:
        assert "error: no such model here" in result.stderr


def test_a_group_has_no_options_that_nanoengine_has_not(hello: Any) -> None:
    hello("greet", "app")
    result = nanoengine("greet", "--help")
    assert result.exit_code == 0
    assert "Of typer." in result.stdout
    assert "completion" not in result.stdout
    assert "completion" not in nanoengine("bench", "--help").stdout


@pytest.mark.parametrize(
    ("name", "attribute", "words"),
    [
        ("greet", "helo", "it has no 'helo'"),
        ("greet", "number", "'hello_work:number' is 5, not a function, typer app or click command"),
        ("greet", "Kind", "not a function, typer app or click command"),
        ("greet", "odd", "'hello_work:odd' cannot be made a typer command: "),
        (
            "greet",
            "empty",
            "'hello_work:empty' cannot be made a typer command: ",
        ),
    ],
)
def test_a_target_that_is_no_command(hello: Any, name: str, attribute: str, words: str) -> None:
    hello(name, attribute)
    assert name in listed(nanoengine("--help"))
    result = nanoengine(name)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import no_such_library_q", "failed at import: ModuleNotFoundError: No module named 'no_such_library_q'"),
        ("import sys; sys.exit(3)", "failed at import: SystemExit: 3"),
        ("@hookimpl\ndef register_commands(): raise KeyError('boom')", "failed at register_commands: KeyError: 'boom'"),
        ("@hookimpl\ndef register_commands(): return ['greet']", "not a CommandSpec"),
        (command("greet", "x"), "target must be of the form 'package.module:attribute'"),
        (command("greet", "x:y").replace("api=1", "api=7"), "it was written for plugin api 7"),
        (command("greet", "x:y").replace("Say hello.", ""), "help must be one line"),
        (command("greet", "x:y").replace("Say hello.", r"a\nb"), "help must be one line"),
        *(
            (command(name, "x:y"), "name must be words with one space")
            for name in ("", " a", "a  b", "-a", "a --b", "a\tb")
        ),
    ],
)
def test_a_broken_plugin_breaks_no_command(install: Any, code: str, cause: str) -> None:
    install("nanoengine-bad", code, version="0.7")
    assert list(listed(nanoengine("--help"))) == OWN
    assert nanoengine("config", "list", "sampler").exit_code == 0
    listing = nanoengine("plugins", "list")
    assert "nanoengine-bad 0.7" in listing.stdout
    assert cause in listing.stdout
    result = nanoengine("gret")
    assert result.exit_code == 2
    assert "no command 'gret' is installed; " in result.stderr
    assert "It may be missing because nanoengine-bad 0.7 (plugin 'plug') failed" in result.stderr


@pytest.mark.parametrize("name", ["run", "bench", "plugins new"])
def test_a_name_of_nanoengines_is_refused_with_both_owners(hello: Any, name: str) -> None:
    hello(name, "hello")
    [failure] = discover().failures
    assert str(failure.origin) == "nanoengine-hello 1.0 (plugin 'plug')"
    assert f"{name!r} is already a command of nanoengine 0.1.0 (plugin 'builtin-" in failure.message
    assert "; rename yours" in failure.message
    assert failure.message in nanoengine("plugins", "list").stdout
    result = nanoengine(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Say hello." not in result.stdout
    assert "hello_work" not in sys.modules


def test_a_name_of_two_plugins_is_an_error_that_names_both_when_it_is_called(hello: Any, install: Any) -> None:
    hello("greet", "hello")
    install("nanoengine-other", command("greet", "x:y"), "2.0")
    install("nanoengine-third", command("greet more", "hello_work:hello"), "3.0")
    assert list(listed(nanoengine("--help"))) == OWN
    for words in (["greet", "you"], ["greet", "more", "you"]):
        result = nanoengine(*words)
        assert result.exit_code == 2
        assert "command 'greet' is registered by nanoengine-hello 1.0" in result.stderr
        assert "and nanoengine-other 2.0" in result.stderr
    [conflict] = json.loads(nanoengine("plugins", "list", "--json").stdout)["conflicts"]
    assert (conflict["kind"], conflict["name"]) == ("command", "greet")


@pytest.mark.parametrize("name", ["bench greet", "plugins greet"])
def test_a_name_with_a_space_goes_into_that_group(hello: Any, name: str) -> None:
    hello(name, "hello")
    group = name.split()[0]
    assert list(listed(nanoengine("--help"))) == OWN
    inside = listed(nanoengine(group, "--help"))
    assert inside["greet"] == "Say hello."
    assert len(inside) > 2
    result = nanoengine(*name.split(), "you")
    assert (result.exit_code, result.stdout) == (0, "hello you\n")
    assert "Usage: nanoengine " + name in nanoengine(*name.split(), "--help").stdout


def test_a_group_of_clicks_takes_commands_of_others_too(hello: Any, install: Any) -> None:
    hello("greet", "group")
    install("nanoengine-other", command("greet you", "hello_work:hello"))
    for _ in range(2):  # what is added is not left in the target
        assert list(listed(nanoengine("greet", "--help"))) == ["deep", "ends", "you"]
        assert nanoengine("greet", "you", "Ann").stdout == "hello Ann\n"
        assert nanoengine("greet", "ends").exit_code == 6


def test_a_group_that_no_plugin_has_is_made_of_what_is_in_it(hello: Any, install: Any) -> None:
    hello("acme greet", "hello")
    install("nanoengine-other", command("acme deep greet", "hello_work:hello"))
    top = listed(nanoengine("--help"))
    assert list(top) == [*OWN, "acme"]
    assert top["acme"].startswith("Of nanoengine-hello 1.0")
    assert list(listed(nanoengine("acme", "--help"))) == ["greet", "deep"]
    assert nanoengine("acme", "greet", "you").stdout == "hello you\n"
    assert nanoengine("acme", "deep", "greet", "you").stdout == "hello you\n"
    assert nanoengine("acme").exit_code == 2


@pytest.mark.parametrize(
    ("name", "call", "why"),
    [
        (
            "bench latency",
            ["bench", "latency", "--help"],
            "'bench' is of nanoengine 0.1.0 (plugin 'builtin-lab'), which has",
        ),
        (
            "report html",
            ["report", "--help"],
            "'report' is of nanoengine 0.1.0 (plugin 'builtin-lab'), which is not a group",
        ),
    ],
)
def test_a_name_that_a_group_itself_has_is_refused_when_the_group_is_called(
    hello: Any, name: str, call: list[str], why: str
) -> None:
    hello(name, "hello")
    result = nanoengine(*call)
    assert result.exit_code == 0
    assert f"command {name!r} of nanoengine-hello 1.0 (plugin 'plug') is skipped: {why}" in result.stderr
    assert "Say hello." not in result.stdout


def test_a_plugin_file_brings_a_command(plugin_py: Any) -> None:
    code = command("greet", "MODULE:greet").replace("'MODULE:greet'", "f'{__name__}:greet'")
    path = plugin_py(code + "def greet(name: str): print('hello', name)\n")
    assert "greet" in listed(nanoengine("--plugin", path, "--help"))
    assert nanoengine("--plugin", path, "greet", "you").stdout == "hello you\n"
    found = json.loads(nanoengine("--plugin", path, "plugins", "list", "--json").stdout)["plugins"]
    [row] = [row for row in found if row["name"] == "greet"]
    assert (row["kind"], row["origin"]) == ("command", str(path))
    assert nanoengine("greet", "you").exit_code == 2


def test_a_plugin_file_that_fails_or_takes_a_name_is_an_error_at_once(plugin_py: Any, tmp_path: Path) -> None:
    taken = plugin_py(command("run", "x:y"))
    broken = plugin_py("1 / 0", "broken.py")
    for words in (["--help"], ["config", "list"], ["run", "quickstart"]):
        result = nanoengine("--plugin", taken, *words)
        assert result.exit_code == 2
        assert (
            f"plugin file {taken} failed at command 'run': PluginError: 'run' is already a command of nanoengine"
            in result.stderr
        )
        result = nanoengine("--plugin", broken, *words)
        assert (result.exit_code, "ZeroDivisionError" in result.stderr) == (2, True)
    result = nanoengine("--plugin", tmp_path / "none.py", "--help")
    assert (result.exit_code, "does not exist" in result.stderr) == (2, True)


def test_plugins_before_and_behind_the_command_are_both_taken(plugin_py: Any) -> None:
    one, two = plugin_py(command("one", "x:y"), "one.py"), plugin_py(command("two", "x:y"), "two.py")
    result = nanoengine("--plugin", one, "plugins", "list", "--plugin", two, "--json")
    assert {"one", "two"} <= {row["name"] for row in json.loads(result.stdout)["plugins"]}


def test_every_command_of_nanoengines_own_loads_and_is_listed_with_its_origin() -> None:
    registry = discover()
    assert registry.failures == ()
    for name, found in registry.commands.items():
        assert found.origin.distribution == "nanoengine"
        assert load_command(registry, name).get_short_help_str(200)
    rows = json.loads(nanoengine("plugins", "list", "--json").stdout)["plugins"]
    origins = {row["name"]: row["origin"] for row in rows if row["kind"] == "command"}
    assert list(origins) == list(registry.commands)
    assert origins["run"] == "nanoengine.cli.own"
    assert origins["plugins new"] == origins["sweep"] == "nanoengine.lab"


@pytest.mark.parametrize(
    ("attribute", "cause"), [("helo", "it has no 'helo'"), ("odd", "cannot be made a typer command: ")]
)
def test_the_doctor_loads_commands_too(hello: Any, attribute: str, cause: str) -> None:
    hello("greet", attribute)
    both = [nanoengine(*words, "--json") for words in (["doctor"], ["plugins", "doctor"])]
    findings = [json.loads(result.stdout)["findings"] for result in both]
    for found in findings:
        [finding] = [each for each in found if each["name"] == "greet"]
        assert finding["level"] == "warning"
        assert cause in finding["text"]
        assert [each["level"] for each in found if each["name"] == "plugins new"] == ["ok"]


def test_a_command_whose_module_is_missing_says_what_to_install(install: Any, hello: Any) -> None:
    hello("other", "hello")
    more = 'requires=("no_such_module",), install="get it")'
    install("nanoengine-needy", command("greet", "no_such_module:hello").replace("api=1)", f"api=1, {more}"))
    result = nanoengine("greet", "you")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "command 'greet' of nanoengine-needy" in result.stderr
    assert "needs no_such_module, not installed here (get it)" in result.stderr
    assert "greet" in listed(nanoengine("--help"))
    [found] = [each for each in parts.plugins(discover(), load=True) if each.name == "greet"]
    assert (found.level, "needs no_such_module" in found.text) == ("note", True)


def test_serve_names_its_extra() -> None:
    spec = discover().commands["serve"].spec
    assert "msgspec" in spec.requires
    assert spec.install == "pip install 'nanoengine[server]'"
