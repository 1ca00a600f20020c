"""Sweeps: which combinations there are, their folders, crashes, interruption and going on."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from nanoengine.api.errors import ConfigError
from nanoengine.cli import parent
from nanoengine.lab.cli.combinations import combinations, split_values
from nanoengine.lab.cli.sweep_report import Outcome, plot, print_table, table_of
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.usefixtures("forked")

Run = Callable[..., Result]
CONFIG = "model: a/b\nprompts: [one, two words]\noutput: mine.jsonl\n"
FAKE = (sys.executable, str(Path(__file__).with_name("fake_process.py")))

# -- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "values"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (" a , 1e-3,null", ["a", "1e-3", "null"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ('"a,\\"b,",c', ['"a,\\"b,"', "c"]),
        ("'it''s, so',c", ["'it''s, so'", "c"]),
        ("it's,that's", ["it's", "that's"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("{a: 1, b: [2,3]},{a: '}'}", ["{a: 1, b: [2,3]}", "{a: '}'}"]),
        ("['a]',b],c", ["['a]',b]", "c"]),
        ("choice(a,b)", ["choice(a,b)"]),
        ("${oc.env:A,b},c", ["${oc.env:A,b}", "c"]),
        ("a\\,b", ["a\\,b"]),
        ("a,", ["a", ""]),
        ("", [""]),
        ("[1,2", ["[1,2"]),
        ("'a,b", ["'a,b"]),
    ],
)
def test_split_values(raw: str, values: list[str]) -> None:
    assert split_values(raw) == values


def test_the_last_override_varies_fastest() -> None:
    found = combinations(["model=a,models/b", "engine.seed=1", "+sampler.top_p=0.5,1", "~output"])
    assert [each.overrides for each in found] == [
        (f"model={model}", "engine.seed=1", f"+sampler.top_p={p}", "~output")
        for model in ("a", "models/b")
        for p in ("0.5", "1")
    ]
    assert found[3].varied == {"model": "models/b", "sampler.top_p": "1"}
    assert [each.folder(n) for n, each in enumerate(found)] == [
        "0_model=a,sampler.top_p=0.5",
        "1_model=a,sampler.top_p=1",
        "2_model=b,sampler.top_p=0.5",
        "3_model=b,sampler.top_p=1",
    ]


def test_folders_suit_file_systems() -> None:
    [_, odd] = combinations([f"sampler.stop=['a/b: é'],['{'x*' * 200}']"])
    assert odd.folder(1).startswith("1_sampler.stop=_x_x")
    assert len(odd.folder(1).encode()) <= 100
    assert [each.folder(0) for each in combinations(["a=1"])] == ["0"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("~engine.seed=1,2", "a deletion cannot have several values"),
        ("output=a,b", "its own output"),
        ("engine.seed=1,,2", "a value of the sweep is empty"),
        ("model=c,d", "model has several values twice"),
    ],
)
def test_what_cannot_be_swept_over(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        combinations(["model=a,b", override])


@pytest.mark.parametrize(
    ("call", "values"),
    [
        ("range(3)", ["0", "1", "2"]),
        ("range(16,64,16)", ["16", "32", "48"]),
        ("range(3, 0, -1)", ["3", "2", "1"]),
        ("range(0,0.3,0.1)", ["0.0", "0.1", "0.2"]),
        ("range(1,2)", ["1"]),
        ("range(2),7", ["0", "1", "7"]),
        ("choice(range(2),choice(8,9))", ["0", "1", "8", "9"]),
        ("choice(0,[1,2])", ["0", "[1,2]"]),
    ],
)
def test_range_and_choice_are_lists_of_a_sweep_without_the_range_s_stop(call: str, values: list[str]) -> None:
    assert [each.varied["engine.seed"] for each in combinations([f"engine.seed={call}"])] == values


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.seed=range(1,5,0)"], r"range\(START, STOP, STEP\)"),
        (["engine.seed=range(a)"], "in numbers"),
        (["engine.seed=range(5,1)"], "no values"),
        (["engine.seed=range(1e9)"], "1 to 10,000"),
        (["engine.seed=range(1000)", "engine.block_size=range(1000)"], "1,000,000 combinations"),
    ],
)
def test_ranges_of_a_sweep_that_make_no_sense_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        combinations(overrides)


def test_a_range_without_multirun_names_it(fake: Any, nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    result = nanoengine("run", "run.yaml", "engine.seed=range(3)")
    assert (result.exit_code, fake.made) == (2, [])
    assert "range() gives several values, which need --multirun (-m)" in result.stderr


@pytest.mark.parametrize("call", ["interval(1,2)", "glob(*)", "sort(1,2)"])
def test_functions_of_hydra_are_refused_by_name(fake: Any, nanoengine: Run, tmp_path: Path, call: str) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    result = nanoengine("run", "run.yaml", "-m", f"engine.seed={call}")
    assert result.exit_code == 2
    assert f"Hydra's {call.split('(')[0]}() is not supported" in result.stderr
    assert not (tmp_path / "multirun").exists()


# -- runs, each a process with the model of conftest -----------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nanoengine: Run) -> Run:
    """Runs `nanoengine run run.yaml -m ARGUMENTS`."""
    monkeypatch.setattr("nanoengine.lab.cli.multirun._NANOENGINE", FAKE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return lambda *arguments: nanoengine("run", "run.yaml", "-m", *arguments)


def rows(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def only(folders: list[Path]) -> Path:
    [folder] = folders
    return folder


def test_each_combination_has_its_folder_and_a_broken_one_stops_no_other(sweep: Run, tmp_path: Path) -> None:
    result = sweep("model=a/b,crash/it", "engine.seed=1,2", "engine.max_num_seqs=4")
    assert result.exit_code == 1, result.stderr
    root = only(list((tmp_path / "multirun").iterdir()))
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert folders == [
        f"{n}_model={m},engine.seed={s}" for n, (m, s) in enumerate([("b", 1), ("b", 2), ("it", 1), ("it", 2)])
    ]
    for seed, folder in enumerate(folders[:2], 1):
        config = yaml.safe_load((root / folder / "config.yaml").read_text())
        assert (config["engine"]["seed"], config["engine"]["max_num_seqs"]) == (seed, 4)
        assert sorted(row["prompt"] for row in rows(root / folder)) == ["one", "two words"]
        record = json.loads((root / folder / "results.jsonl.run.json").read_text())
        assert record["config"]["engine"]["seed"] == seed
        assert record["versions"]["nanoengine"]
        assert record["summary"]["finished"] == 2
    assert not (tmp_path / "mine.jsonl").exists()
    assert result.stderr.count("failed: SIGSEGV: killed by SIGSEGV; last line of its log: fetching the model") == 2
    assert result.stdout.count("failed: SIGSEGV") == 2
    with (root / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["model"], row["engine.seed"], row["status"], row["prompts"]) for row in table] == [
        ("a/b", "1", "ok", "2/2"), ("a/b", "2", "ok", "2/2"),
        ("crash/it", "1", "failed: SIGSEGV", "-"), ("crash/it", "2", "failed: SIGSEGV", "-"),
    ]  # fmt: skip
    assert [(row["TTFT ms"], row["ITL ms"]) for row in table[:2]] == [("1000.0", "1000.0")] * 2
    assert float(table[0]["tokens/s"]) > 0
    assert (root / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert f"type: nanoengine report multirun/{root.name}\n" in result.stderr


def test_a_combination_that_cannot_be_composed_stops_no_other(sweep: Run, tmp_path: Path) -> None:
    result = sweep("engine.seed=1,many", "attention.backend=torch,trch")
    assert result.exit_code == 1
    before, _, after = result.stderr.partition("#0 of 4: engine.seed=1 attention.backend=torch\n")
    assert "3 of them cannot be composed, and will not run:" in before  # said before anything runs
    assert "#2 of 4: engine.seed=many attention.backend=torch: override 'engine.seed=many': engine.seed must " in before
    assert "#1 of 4: engine.seed=1 attention.backend=trch: " in before
    assert "no attention backend 'trch' is installed" in before
    assert after.count("failed: it cannot be composed, see above") == 3
    assert "failed: not composed" in result.stdout
    root = only(list((tmp_path / "multirun").iterdir()))
    assert len(rows(root / "0_engine.seed=1,attention.backend=torch")) == 2
    [log] = (root / "2_engine.seed=many,attention.backend=torch").iterdir()
    assert (log.name, "not composed: override 'engine.seed=many': " in log.read_text()) == ("run.log", True)


def test_the_command_sweep_is_what_run_calls(sweep: Run, nanoengine: Run, tmp_path: Path) -> None:
    """The fixture stands for both: its runs are the fake's."""
    assert sweep("engine.seed=1,2").exit_code == 0
    [first] = (tmp_path / "multirun").iterdir()
    again = nanoengine("sweep", "--resume", str(first))
    assert (again.exit_code, again.stderr.count("finished already")) == (0, 2)
    direct = nanoengine("sweep", "run.yaml", "engine.seed=1,2", "--verbose")
    assert direct.exit_code == 0, direct.stderr
    [second] = set((tmp_path / "multirun").iterdir()) - {first}
    assert [folder.name for folder in sorted(second.glob("*_*/"))] == ["0_engine.seed=1", "1_engine.seed=2"]
    assert "weights" in (second / "0_engine.seed=1" / "run.log").read_text()  # --verbose came through
    for words, cause in (
        (["engine.sed=1,2"], "unknown key 'engine.sed'"),
        (["--trace", "a/b.json"], "--trace a/b.json: "),
    ):
        mistake = nanoengine("sweep", "run.yaml", *words)
        assert (mistake.exit_code, cause in mistake.stderr) == (2, True)


def test_where_none_can_be_composed_nothing_is_made(sweep: Run, tmp_path: Path) -> None:
    result = sweep("engine.sed=1,2")
    assert result.exit_code == 2
    assert "unknown key 'engine.sed'" in result.stderr
    assert not (tmp_path / "multirun").exists()


def test_two_sweeps_of_one_second(sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noon:
        @staticmethod
        def now() -> Any:
            return type("T", (), {"strftime": lambda self, form: "noon"})()

    monkeypatch.setattr("nanoengine.lab.cli.multirun.datetime", Noon)
    assert sweep("engine.seed=1").exit_code == sweep("engine.seed=1").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "multirun").iterdir()) == ["noon", "noon_2"]


def test_without_matplotlib_the_sweep_ends_well(sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    result = sweep("engine.seed=1")
    assert result.exit_code == 0
    assert "no plot: " in result.stderr
    assert "pip install 'nanoengine[plot]'" in result.stderr
    assert list(tmp_path.glob("multirun/*/plot.png")) == []
    assert len(list(tmp_path.glob("multirun/*/table.csv"))) == 1


def test_resume_runs_what_is_left(sweep: Run, nanoengine: Run, tmp_path: Path) -> None:
    assert sweep("engine.seed=1,2,3").exit_code == 0
    root = only(list((tmp_path / "multirun").iterdir()))
    half = root / "1_engine.seed=2" / "results.jsonl"
    record = json.loads(half.with_name("results.jsonl.run.json").read_text())
    half.with_name("results.jsonl.run.json").write_text(json.dumps({**record, "summary": None}))  # as when killed
    [first, second] = half.read_text().splitlines(keepends=True)
    half.write_text(first + second[:30])
    for path in (root / "2_engine.seed=3").glob("results*"):
        path.unlink()
    done = (root / "0_engine.seed=1" / "results.jsonl").stat().st_mtime_ns
    result = nanoengine("run", "-m", "--resume", str(root))
    assert result.exit_code == 0, result.stderr
    assert (root / "0_engine.seed=1" / "results.jsonl").stat().st_mtime_ns == done
    assert "finished already" in result.stderr
    assert half.read_text().startswith(first)
    assert sorted(row["index"] for row in rows(half.parent)) == [0, 1]
    assert len(rows(root / "2_engine.seed=3")) == 2
    assert "2/2 (1 kept)" in result.stdout
    assert result.stdout.count(" ok ") == 3


def test_a_sweep_may_be_moved_and_gone_on_with_from_elsewhere(
    sweep: Run, nanoengine: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("relative\n")
    assert sweep("model=a/b,crash/it", "prompts=p.txt").exit_code == 1
    moved = only(list((tmp_path / "multirun").iterdir())).rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (moved / "0_model=b").glob("results*"):
        path.unlink()
    result = nanoengine("run", "--resume", "../moved")
    assert result.exit_code == 1
    assert [row["prompt"] for row in rows(moved / "0_model=b")] == ["relative"]
    assert result.stderr.count("by SIGSEGV;") == 1  # tried again


def test_standard_input_is_for_every_combination(sweep: Run, nanoengine: Run, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nanoengine.cli.app import app

    words = ["run", "run.yaml", "-m", "engine.seed=1,2", "prompts={file: '-', format: csv}"]
    result = CliRunner().invoke(app, words, input="prompt\nfirst\nsecond\n")
    assert result.exit_code == 0, result.stderr
    for folder in tmp_path.glob("multirun/*/*_*"):
        assert sorted(row["prompt"] for row in rows(folder)) == ["first", "second"]


def test_plugin_files_and_options_reach_every_combination(sweep: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom nanoengine.api import SamplerSpec, ProcessorParams, hookimpl\n\n"
        "@dataclass(frozen=True)\nclass Params(ProcessorParams):\n    sparkle: float = 0.0\n\n@hookimpl\n"
        "def register_samplers():\n"
        "    return [SamplerSpec(name='sparkle', params=Params, target='mine:Sparkle', api=1)]\n"
    )
    result = sweep("sampler.sparkle=1,2", "--plugin", "mine.py", "--verbose")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^total +\d", next(tmp_path.glob("multirun/*/0_*/run.log")).read_text(), re.MULTILINE)
    record = json.loads(next(tmp_path.glob("multirun/*/0_*/results.jsonl.run.json")).read_text())
    assert record["params"]["sparkle"] == 1.0
    assert [name for name in record["versions"] if name.endswith("mine.py")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "empty"], "no file, recipe or model is called 'empty'"),
        (["run", "broken"], "broken is the folder of a sweep; to continue it, give --resume broken"),
        (["run", "--resume", "empty"], "empty has no sweep.json"),
        (["run", "--resume", "empty", "engine.seed=1"], "takes no overrides"),
        (["run", "--resume", "broken"], "broken/sweep.json cannot be read"),
        (["run", "--multirun", "--resume", "multirun/nope"], "; there is no multirun/nope (looked for /"),
        (["run", "--resume", "gone"], "/no/such/folder, where the sweep was started, does not exist any more"),
    ],
)
def test_what_is_no_sweep(nanoengine: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    for name, text in {
        "empty": None, "broken": "{}", "gone": '{"format": 1, "cwd": "/no/such/folder", "plugins": [], "jobs": []}'
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "sweep.json").write_text(text)
    result = nanoengine(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.fixture
def started(sweep: Run, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`nanoengine run ARGUMENTS` as a process, of 30 prompts; `seconds`: how long a step takes."""
    (tmp_path / "sweep.py").write_text(
        "import signal, sys\nfrom nanoengine.cli import main\nfrom nanoengine.lab.cli import multirun\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup pytest ignores it\n"
        f"multirun._NANOENGINE = {FAKE!r}\nmain()\n"
    )
    (tmp_path / "p.txt").write_text("".join(f"prompt {n}\n" for n in range(30)))

    def start(seconds: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "sweep.py", "run", *arguments],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "FAKE_SECONDS": seconds},
        )  # fmt: skip

    return start


def wait_for_rows(process: subprocess.Popen[str], tmp_path: Path) -> None:
    while process.poll() is None and not any(path.stat().st_size for path in tmp_path.glob("multirun/*/0_*/*.jsonl")):
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_sweep_can_go_on(started: Any, tmp_path: Path, number: int, status: int, word: str) -> None:
    process = started("0.3", "run.yaml", "-m", "engine.seed=1,2", "prompts=p.txt")
    wait_for_rows(process, tmp_path)
    process.send_signal(number)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    root = only(list((tmp_path / "multirun").iterdir()))
    assert f"continue with: nanoengine run --resume multirun/{root.name}" in errors
    kept = len(rows(root / "0_engine.seed=1"))
    assert 0 < kept < 30
    assert f"{word}; finished results are kept" in (root / "0_engine.seed=1" / "run.log").read_text()
    assert [line.split("│")[3].strip() for line in out.splitlines() if "│ " in line] == [word, "not run"]
    process = started("0", "--resume", str(root))
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert f"30/30 ({kept} kept)" in out
    assert [len(rows(root / f"{n}_engine.seed={n + 1}")) for n in range(2)] == [30, 30]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_sweep_that_is_killed_ends_its_combination(started: Any, tmp_path: Path, number: int) -> None:
    """It cannot pass these signals on. The lock of the results is the combination's as long as that lives."""
    process = started("0.2", "run.yaml", "-m", "engine.seed=1,2", "prompts=p.txt")
    wait_for_rows(process, tmp_path)
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == -number
    root = only(list((tmp_path / "multirun").iterdir()))
    log = root / "0_engine.seed=1" / "run.log"
    until = time.monotonic() + 100
    while "prompts, " not in log.read_text() and time.monotonic() < until:
        time.sleep(0.02)
    assert "terminated; finished results are kept" in log.read_text()
    with (root / "0_engine.seed=1" / "results.jsonl").open("a") as file:
        while not free(file) and time.monotonic() < until:
            time.sleep(0.02)
        assert free(file)
    assert 0 < len(rows(root / "0_engine.seed=1")) < 30
    assert not list(root.glob("1_*/results.jsonl"))


def test_a_sweep_whose_folder_vanishes_ends_in_words(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(command: Any, environment: Any, folder: Path, log: Any) -> int:
        shutil.rmtree(tmp_path / "multirun")
        return 0

    monkeypatch.setattr("nanoengine.lab.cli.multirun.run_child", vanished)
    result = sweep("engine.seed=1,2")
    assert result.exit_code == 1, result.output
    assert result.stderr.count("  failed: No such file or directory: ") == 2
    assert "cannot write the report of the sweep" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_disk_that_is_full_before_a_sweep_is_one_message(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanoengine.lab.cli.multirun.write_whole", full)
    result = sweep("engine.seed=1,2")
    assert result.exit_code == 2
    assert re.search(
        r"error: cannot write the folder of the sweep multirun/\S+: No space left on device$", result.stderr
    )


def free(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_a_combination_that_does_not_end_in_words_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaf to SIGTERM: a kernel that hangs, a plugin that catches everything."""
    monkeypatch.setattr(parent, "_PATIENCE", 0.2)
    deaf = (
        "import os, signal, time\n"
        "for n in (2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "os.write(2, b'deaf')\n"
        "time.sleep(60)"
    )
    killed = []
    original = subprocess.Popen.wait

    def wait(self: Any, timeout: float | None = None) -> int:
        if timeout is None and not killed:
            killed.append(self)
            while not (tmp_path / "log").stat().st_size:
                time.sleep(0.02)
            raise KeyboardInterrupt
        return original(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with (tmp_path / "log").open("wb") as log, pytest.raises(KeyboardInterrupt):
        parent.run_child([sys.executable, "-c", deaf], dict(os.environ), tmp_path, log)
    assert killed[0].returncode == -signal.SIGKILL


# -- the report ------------------------------------------------------------------------------------------------------


def outcome(number: int, tokens_per_second: float | None, **varied: str) -> Outcome:
    spread = None if number == 1 else {"median": 0.5, "p99": 0.75}
    summary = {
        "prompts": 2, "kept": 0, "finished": 2, "failed": 1, "ttft": spread, "itl": None,
        "tokens_per_second": tokens_per_second,
    }  # fmt: skip
    return Outcome(number, varied, "ok", summary)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        [outcome(0, 12.34, model="[bold]x" + "y" * 60), outcome(1, None), Outcome(2, {"model": "z"}, "not run")]
    )
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert lines == [
        ["0", "[bold]x" + "y" * 60, "ok", "1/2", "12.3", "500.0", "750.0", "-", "-"],
        ["1", "", "ok", "1/2", "-", "-", "-", "-", "-"],
        ["2", "z", "not run", "-", "-", "-", "-", "-", "-"],
    ]


def test_the_table_has_drafts_if_a_combination_had_any() -> None:
    plain = outcome(0, 10.0, speculation="none")
    found = outcome(2, 20.0, speculation="ngram")
    drafts = {"drafted_per_position": [5, 4], "accepted_per_position": [5, 2]}
    drafted = replace(found, summary={**found.summary, **drafts})
    header, rows = table_of([plain, drafted])
    assert header[-1] == "drafts"
    assert [row[-1] for row in rows] == ["-", "7/9"]
    assert "drafts" not in table_of([plain])[0]


def test_plot_of_what_there_is(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plot([outcome(0, 10.0, model="a"), outcome(1, 20.0, model="b"), outcome(2, None)], tmp_path / "plot.png")
    height, width, _ = imread(tmp_path / "plot.png").shape
    assert width > 1000
    assert 150 < height < 1000
    with pytest.raises(ValueError, match="no combination generated anything"):
        plot([outcome(0, None)], tmp_path / "none.png")


# -- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_sweep(nanoengine: Run, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny", with_tokenizer=True)
    (tmp_path / "run.yaml").write_text("model: ./tiny\nsampler: {max_tokens: 8}\nprompts: [one, two]\n")
    result = nanoengine("run", "run.yaml", "-m", "engine.block_size=16,32", "sampler.temperature=0")
    assert result.exit_code == 0, result.stderr
    [a, b] = (sorted(rows(folder), key=lambda row: row["index"]) for folder in sorted(tmp_path.glob("multirun/*/*_*")))
    assert [row["outputs"] for row in a] == [row["outputs"] for row in b]
    record = json.loads(next(tmp_path.glob("multirun/*/1_*/results.jsonl.run.json")).read_text())
    assert record["config"]["engine"]["block_size"] == 32
    assert {"torch", "transformers"} <= set(record["versions"])
    assert record["summary"]["tokens_per_second"] > 0
