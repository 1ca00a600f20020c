"""`nanoengine report`: the page of real runs, read by a parser, and looked at in a browser where there is one."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from markupsafe import Markup
from typer.testing import CliRunner, Result

from nanoengine.cli.app import app
from nanoengine.lab.cli.report_charts import Picture, _largest, milliseconds
from nanoengine.lab.cli.report_data import RunData, Steps, read_all
from nanoengine.lab.cli.report_view import _spread, _tables
from nanoengine.lab.cli.sweep_report import Outcome
from nanoengine.testing.checkpoints import tiny_llama
from tests.engine.timeline import read

Run = Callable[..., Result]

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SHARED = "a long beginning that several prompts have in common, "
CONFIG = """\
model: ./tiny
sampler: {temperature: 0, max_tokens: 24, ignore_eos: true}
engine: {block_size: 16, num_gpu_blocks_override: 20, max_num_seqs: 6, max_num_batched_tokens: 64}
chat: false
prompts: prompts.jsonl
output: results/results.jsonl
"""
EVIL = "</td><script>document.title = 'owned'</script><b>bold</b> & more"
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """Asserts that elements close where they should, ids are unique and nothing is fetched; gathers what is there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: dict[str, int] = {}
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []
        assert len(self.ids) == len(set(self.ids)), "ids are not unique"
        assert set(self.references) <= {f"#{each}" for each in self.ids}, "a reference to nothing"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(str(value))
            self.references += re.findall(r"url\((.*?)\)", value or "")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(text for text in self.texts if text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run in results/, and a sweep."""
    place = tmp_path_factory.mktemp("report")
    tiny_llama(place / "tiny", with_tokenizer=True)
    asked = [f"{SHARED}{word}" for word in ("one", "two", "three", "four")] + ["short", EVIL, "far too long " * 40]
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    (place / "run.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "results").mkdir()
        arguments = ["run", "run.yaml", "engine.num_gpu_blocks_override=11", "--trace", "results/trace.json"]
        assert CliRunner().invoke(app, arguments).exit_code == 1  # the last prompt is too long
        arguments = ["run", "run.yaml", "-m", "sampler.max_tokens=4,9", "sampler.top_p=0.9,7", "prompts=[hi, ho]"]
        assert CliRunner().invoke(app, [*arguments, "--trace", "trace.json"]).exit_code == 1  # two have a wrong top_p
    return place


@pytest.fixture
def report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(folder)
    return lambda *arguments: CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are composed, but not drawn, which is most of the time of a page: where others show that they can be."""
    monkeypatch.setattr("nanoengine.lab.cli.report_charts._picture", lambda figure, text: Picture(text, "<svg></svg>"))


def made(result: Result, path: Path) -> str:
    assert result.exit_code == 0, result.stderr
    assert f"wrote {path}" in result.stderr
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def sweep_page(folder: Path) -> Page:
    """As `report` makes it; one for all that is asked of it."""
    [sweep] = (folder / "multirun").iterdir()
    return Page(made(CliRunner().invoke(app, ["report", str(sweep)]), sweep / "report.html"))


def test_the_page_of_a_run(report: Run) -> None:
    style = dict(matplotlib.rcParams)
    page = Page(made(report("results"), Path("results/report.html")))
    assert dict(matplotlib.rcParams) == style  # the page's own is not everybody's
    assert page.tags["svg"] == 4  # over time, steps, latencies, prefixes
    assert "script" not in page.tags
    assert "link" not in page.tags
    rows = [json.loads(line) for line in Path("results/results.jsonl").read_text().splitlines()]
    record = json.loads(Path("results/results.jsonl.run.json").read_text())
    for said in (
        "1 failed",
        f"{record['summary']['tokens_per_second']:,.0f}",
        "generated tokens/s", "rows of a step", "KV blocks", "time to first token, ms", "from the prefix cache",
        "too_long", "engine.num_gpu_blocks_override", record["versions"]["torch"],
    ):  # fmt: skip
        assert said in page.text, said
    assert re.search(r"\d+ preemptions", page.text)
    assert EVIL in page.text  # as text
    cached = sum(row["num_cached_tokens"] for row in rows)
    assert cached > 0
    assert f"{cached} prompt tokens" in page.text
    assert "needs 1 more KV blocks" in page.text  # why somebody was preempted


def test_its_figures_are_those_of_the_run(report: Run) -> None:
    [run] = read_all(Path("results"), None)
    record = json.loads(Path("results/results.jsonl.run.json").read_text())
    assert run.steps is not None
    assert run.steps.whole
    assert run.steps["new_tokens"].sum() == record["summary"]["generated_tokens"]
    assert run.steps["total"].tolist() == [11] * len(run.steps)
    assert run.steps["shared"].max() >= 3
    assert 1000 * record["summary"]["ttft"]["median"] == pytest.approx(np.median(run.metric("ttft")))
    assert [row["index"] for row in run.failed] == [6]


def test_mutants_are_seen(report: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures that share ids would show each other's parts; a text that is not escaped is a part of the page."""
    with monkeypatch.context() as patch:
        patch.setattr("nanoengine.lab.cli.report_view.page_ids", lambda pictures: [each.svg for each in pictures])
        assert report("results", "-o", "mutant.html").exit_code == 0
        with pytest.raises(AssertionError, match="not unique"):
            Page(Path("mutant.html").read_text("utf-8"))
    with monkeypatch.context() as patch:
        request.getfixturevalue("undrawn")
        patch.setattr("nanoengine.lab.cli.report_view._excerpt", lambda prompt: Markup(prompt))
        assert report("results", "-o", "mutant.html").exit_code == 0
        with pytest.raises(AssertionError, match="closes another element"):
            Page(Path("mutant.html").read_text("utf-8"))


def test_without_a_trace_the_page_says_so(report: Run, tmp_path: Path) -> None:
    for name in ("results.jsonl", "results.jsonl.run.json"):
        text = Path("results", name).read_text("utf-8")
        (tmp_path / name).write_text(text.replace("trace.json", "gone.json"), "utf-8")
    page = Page(made(report(tmp_path / "results.jsonl"), tmp_path / "results.html"))
    assert page.tags["svg"] == 2
    assert "No trace" in page.text
    page = Page(
        made(report(tmp_path / "results.jsonl", "--trace", "results/trace.json", "-o", "x.html"), Path("x.html"))
    )
    assert page.tags["svg"] == 4


def test_a_trace_that_a_full_disk_left_empty_is_none(report: Run, folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder / "results", tmp_path / "results")
    (place / "trace.json").write_text("")
    path = place / "results.jsonl.run.json"
    record = json.loads(path.read_text())
    record["summary"]["trace"] = str(place / "trace.json")
    path.write_text(json.dumps(record))
    assert "No trace: " in made(report(place), place / "report.html")
    refused = report(place / "results.jsonl", "--trace", place / "trace.json")
    assert (refused.exit_code, "is not a trace" in refused.stderr) == (2, True)


def test_what_a_killed_run_left(report: Run, tmp_path: Path) -> None:
    """A row torn, no summary, and a trace that breaks off in the middle of a line."""
    rows = Path("results/results.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(rows[:3]) + rows[3][:40], "utf-8")
    record = json.loads(Path("results/results.jsonl.run.json").read_text())
    (tmp_path / "results.jsonl.run.json").write_text(json.dumps({**record, "summary": None}))
    trace = Path("results/trace.json").read_text("utf-8")
    (tmp_path / "t.json").write_text(trace[: trace.rindex('"cat":"step"') + 60], "utf-8")
    page = Page(made(report(tmp_path / "results.jsonl", "--trace", tmp_path / "t.json"), tmp_path / "results.html"))
    for said in ("did not end", "which are left out: 1.", "The trace is incomplete"):
        assert said in page.text
    assert page.tags["svg"] == 4


def test_the_page_of_a_sweep(report: Run, sweep_page: Page) -> None:
    [sweep], page = Path("multirun").iterdir(), sweep_page
    traces = sorted(sweep.glob("*/trace.json"))
    assert [read(each).steps != [] for each in traces] == [True, True]  # each combination's in its folder
    # bars, shares of two runs that were composed, and their own four each
    assert page.tags["svg"] == 2 + 2 * 4
    assert page.text.count("not composed") == 2 * 3  # in the table, in its own heading and its note
    assert "sampler.top_p must be above 0 and at most 1" in page.text
    for said in ("sampler.max_tokens", "tokens/s", "share of the requests", "#0", "#2"):
        assert said in page.text
    assert "--trace belongs to one run" in report(sweep, "--trace", "results/trace.json").stderr


def test_the_page_has_date_command_machine_and_versions(report: Run, undrawn: None) -> None:
    record = json.loads(Path("results/results.jsonl.run.json").read_text())
    page = Page(made(report("results"), Path("results/report.html")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", record["started"])
    assert record["command"].startswith("nanoengine")
    for said in (record["started"], record["command"], record["machine"]["cpu"], record["machine"]["load"]):
        assert said in page.text
    assert f"nanoengine {record['versions']['nanoengine']}, python {record['versions']['python']}, torch " in page.text


def test_a_sweep_s_answers_are_side_by_side(folder: Path, sweep_page: Page) -> None:
    [sweep] = (folder / "multirun").iterdir()
    with (sweep / "answers.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["#", "prompt"]
    assert [label.split()[0] for label in header[2:]] == ["#0", "#1", "#2", "#3"]
    assert "Answers side by side" in sweep_page.text
    for number, combination in enumerate(sorted(each for each in sweep.iterdir() if each.is_dir())):
        results = combination / "results.jsonl"
        found = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
        for row in found:
            answer = row["outputs"][0]["text"].strip() if row["error"] is None else f"({row['error']['code']})"
            assert rows[row["index"]][2 + number] == answer
    assert any(cell for row in rows for cell in row[2:])


def test_a_sweep_has_its_command_and_says_that_each_ran_once(folder: Path, sweep_page: Page) -> None:
    [sweep] = (folder / "multirun").iterdir()
    assert json.loads((sweep / "sweep.json").read_text())["command"].startswith("nanoengine")
    assert "command" in sweep_page.texts
    assert "Each combination ran once. 'engine.seed=range(3)' runs each three times" in sweep_page.text


def test_runs_that_differ_in_seeds_only_show_the_spread() -> None:
    def ran(number: int, rate: float, **varied: str) -> Outcome:
        return Outcome(number, varied, "ok", {"tokens_per_second": rate, "ttft": {"median": 0.5}, "itl": None})

    runs = [ran(0, 30.0, top_k="1", seed="0"), ran(1, 10.0, top_k="1", seed="1"), ran(2, 20.0, top_k="1", seed="2")]
    spread = _spread([*runs, ran(3, 99.0, top_k="2", seed="0")])
    assert list(spread.rows) == [["top_k=1", "3", "20.0 (10.0 to 30.0)", "500.0 (500.0 to 500.0)", "-"]]


def test_few_answers_are_open_and_many_are_folded() -> None:
    for count, is_open in ((8, True), (9, False)):
        row = {"index": 0, "prompt": "hi", "outputs": [], "num_cached_tokens": 0, "error": {"code": "x", "message": ""},
               "metrics": {"ttft": None, "itl": None, "latency": None}, "prompt_token_ids": []}  # fmt: skip
        run = RunData(Outcome(0, {}, "ok"), Path("x.jsonl"), [row] * count, 0, None, None)
        answers = next(each for each in _tables(run) if each.title == "answer")
        assert (answers.open, answers.folded) == (is_open, f"{count} answers")


@pytest.mark.parametrize(
    ("milliseconds_", "text"), [(0.123, "0.123 ms"), (12.34, "12.3 ms"), (420, "420 ms"), (5279, "5.28 s")]
)
def test_times_are_in_seconds_from_a_second_on(milliseconds_: float, text: str) -> None:
    assert milliseconds(milliseconds_) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no nowhere: give a results file, or a folder with one"),
        (["tiny"], "tiny has no results: no results.jsonl with its results.jsonl.run.json, and no sweep.json"),
        (["prompts.jsonl"], "prompts.jsonl, line 1: this is not a row of `nanoengine run`"),
        (["results", "--trace", "run.yaml"], "run.yaml is not a trace of `nanoengine run --trace`"),
        (["results", "-o", "results/results.jsonl"], "results.jsonl is the results file, which it would overwrite"),
        (["results", "-o", "run.yaml/x.html"], "cannot write run.yaml/x.html: "),
    ],
)
def test_mistakes_are_reported(report: Run, undrawn: None, arguments: list[str], said: str) -> None:
    result = report(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_of_a_folder_of_sweeps_the_sweeps_are_named(nanoengine: Run, tmp_path: Path) -> None:
    for name in ("2026-01-01", "2026-01-02", "other"):
        (tmp_path / "multirun" / name).mkdir(parents=True)
        if name != "other":
            (tmp_path / "multirun" / name / "sweep.json").write_text("{}")
    result = nanoengine("report", "multirun")
    assert result.exit_code == 2
    assert result.stderr.rstrip().endswith("the newest first: multirun/2026-01-02, multirun/2026-01-01")


def test_the_page_may_go_into_a_new_folder(report: Run, undrawn: None) -> None:
    assert report("results", "-o", "new/er/x.html").exit_code == 0
    assert Path("new/er/x.html").is_file()


def test_without_matplotlib_it_says_what_to_install(report: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = report("results", "-o", "none.html")
    assert result.exit_code == 2
    assert "pip install 'nanoengine[plot]'" in result.stderr
    assert not Path("none.html").exists()


def test_a_picture_over_time_shows_the_fullest_step_of_each_column() -> None:
    end = np.array([0.5, 1.5, 1.6, 1.7, 4.5])
    steps = Steps({}, True, {"start": end - 0.5, "end": end}, [])
    edges = np.arange(6.0)
    assert _largest(edges, steps, np.array([1.0, 7.0, 9.0, 8.0, 2.0])).tolist() == [0, 2, 2, 2, 4]


# -- in a browser ----------------------------------------------------------------------------------------------------


def browse(path: Path, *arguments: str) -> str:
    """What headless Chromium prints. It has no network to use: every host is one that does not exist."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", *arguments, path.absolute().as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr  # the page has nothing to complain of
    return result.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_shows_it(report: Run, tmp_path: Path) -> None:
    path = Path("results/report.html")
    made(report("results"), path)
    dom = browse(path, "--dump-dom")
    assert "<title>nanoengine run: results</title>" in dom  # it has no owner
    assert dom.count("<svg") == 4
    shot = tmp_path / "page.png"
    browse(path, f"--screenshot={shot}", "--window-size=1200,3000")
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (3000, 1200)
    for color in ((68, 114, 176), (85, 160, 106), (221, 138, 60), (196, 78, 82)):  # the pictures' own
        near = np.abs(255 * pixels - np.array(color)).max(axis=2) < 24
        assert near.sum() > 50, f"nothing is drawn in {color}"
    drawn = (pixels < 0.9).any(axis=2).any(axis=1).nonzero()[0]
    assert drawn.max() > 1500, "the page ends early"


def test_what_is_no_result_gets_no_page_and_what_is_no_page_stays(nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a\nb\n")
    assert "has no row" in nanoengine("report", "notes.txt").stderr
    metrics = {**dict.fromkeys(("queued", "ttft", "itl", "latency")), "num_generated": 0}
    row = {"index": 0, "prompt": "a", "prompt_token_ids": [1], "outputs": [], "num_cached_tokens": 0,
           "metrics": metrics, "error": {"code": "x", "message": "y"}}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rows.html").write_text("<p>mine</p>")
    assert "exists and is not a report" in nanoengine("report", "rows.jsonl").stderr
    assert (tmp_path / "rows.html").read_text() == "<p>mine</p>"
    (tmp_path / "rows.html").unlink()
    for _ in range(2):  # its own page it replaces
        assert nanoengine("report", "rows.jsonl").exit_code == 0
