"""The house stays one that can be read: its numbers (house.toml) only fall, folders form no circle, words stay out."""

from __future__ import annotations

import ast
import gc
import re
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest
from engine.support import mock_llm
from source import PACKAGE, ROOT, Source, sources, under

from nanoengine import SamplingParams

LIMITS: Mapping[str, Mapping[str, int]] = tomllib.loads((Path(__file__).parent / "house.toml").read_text())
CORE = [source for source in sources() if under(source.module, "nanoengine.core") and source.text.strip()]

# What runs in each step speaks token ids: none of these may be imported there, at any depth of a function.
OUTSIDE = ("yaml", "omegaconf", "pluggy", "typer", "rich", "jinja2", "tqdm", "transformers", "tokenizers")

WORDS = re.compile(
    r"\b(mends?|mended|mending|told|untold|heard|passed over|not served|guilty|suspects?|rehearsals?|rehearsed|"
    r"arenas?|steady|nobody|whoever)\b",
    re.IGNORECASE,
)
ALLOWED = ("tests/architecture/test_house.py",)


def hold(section: str, found: Mapping[str, int], slack: float = 0.02) -> None:
    """Each number is within its limit, and its limit is no older one that forgot to fall."""
    limits = LIMITS[section]
    assert found.keys() == limits.keys()
    over = {name: f"{found[name]} of {limits[name]}" for name in found if found[name] > limits[name]}
    assert not over, f"larger than tests/architecture/house.toml allows: {over}"
    loose = {name: found[name] for name in found if limits[name] > found[name] + 2 + slack * found[name]}
    assert not loose, f"lower these numbers in tests/architecture/house.toml: {loose}"


def spans(kinds: tuple[type[ast.AST], ...], parts: list[Source]) -> list[int]:
    nodes = [node for source in parts for node in ast.walk(source.tree) if isinstance(node, kinds)]
    return [node.end_lineno - node.lineno + 1 for node in nodes]  # type: ignore[attr-defined]


def test_the_core_does_not_grow() -> None:
    lines = [len(source.text.splitlines()) for source in CORE]
    found = {
        "lines": sum(lines),
        "files": len(lines),
        "longest_file": max(lines),
        "longest_class": max(spans((ast.ClassDef,), CORE)),
        "longest_function": max(spans((ast.FunctionDef, ast.AsyncFunctionDef), CORE)),
    }
    hold("core", found)


def test_the_core_imports_nothing_of_what_runs_once() -> None:
    wrong = [
        f"{source.path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for source in CORE
        for found in source.imports
        if any(under(found.module, package) for package in OUTSIDE)
    ]
    assert wrong == []


def folder_of(module: str) -> str | None:
    """The folder, as a dotted name, of a module of ours (or of a name in it); a file that lies beside folders is one by
    itself: what is inside them may import it, and it them, if not the same ones."""
    parts = module.split(".")
    if parts[0] != "nanoengine" or len(parts) == 1:
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGE.parent.joinpath(*parts[:end])
        if path.is_dir():
            return ".".join(parts[:end])
        if path.with_suffix(".py").is_file():
            beside = any(other.is_dir() and any(other.glob("*.py")) for other in path.parent.iterdir())
            return ".".join(parts[: end if beside else end - 1])
    return None


def folder_graph(parts: list[Source]) -> dict[str, set[str]]:
    """folder -> folders that its files import. What only a type checker reads does not count."""
    graph: dict[str, set[str]] = {}
    for source in parts:
        here = folder_of(source.module)
        if here is None:
            continue
        goals = graph.setdefault(here, set())
        goals |= {goal for found in source.imports if not found.typing_only and (goal := folder_of(found.module))}
        goals.discard(here)
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of folders each of which reaches all others of its set."""
    reach = {name: set(goals) for name, goals in graph.items()}
    for _ in graph:
        for goals in reach.values():
            goals |= {far for near in list(goals) for far in reach.get(near, ())}
    found: list[set[str]] = []
    for name in graph:
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({other for other in graph if other in reach[name] and name in reach[other]})
    return found


def test_folders_that_import_each_other_do_not_get_more() -> None:
    found = circles(folder_graph(list(sources())))
    assert sum(len(circle) for circle in found) <= LIMITS["circles"]["folders"], found
    hold("circles", {"folders": sum(len(circle) for circle in found)})


def test_a_circle_of_folders_is_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [{"a", "b", "c"}]
    assert folder_of("nanoengine.layers.norm") == "nanoengine.layers"
    assert folder_of("nanoengine.layers.norm.RMSNorm") == "nanoengine.layers"
    assert folder_of("nanoengine.core.engine.Engine") == "nanoengine.core.engine"
    assert folder_of("nanoengine.core.execution.slots") == "nanoengine.core.execution"


@dataclass
class Trace:
    """Which functions of ours are entered while `on`, by all threads that start under it."""

    on: bool = False
    entered: set[tuple[str, str]] = field(default_factory=set)

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if self.on and event == "call" and code.co_filename.startswith(str(PACKAGE)) and code.co_name[0] != "<":
            self.entered.add((code.co_filename.removeprefix(f"{PACKAGE}/"), code.co_qualname))

    def __enter__(self) -> Trace:
        gc.collect()
        gc.disable()  # what earlier tests left must not end in here: its finalizers are functions of ours, too
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        gc.enable()


def decode_step(tmp_path: Path) -> set[tuple[str, str]]:
    with Trace() as trace, mock_llm(tmp_path) as llm:
        for i in range(4):
            llm.engine.add_request(f"r{i}", [1 + i, 2], SamplingParams(temperature=0, max_tokens=20))
        for _ in range(6):
            llm.engine.step()
        before = llm.stats()
        trace.on = True
        llm.engine.step()
        deltas = llm.engine.step()  # twice: a step's device side runs on a thread, from one call into the next
        trace.on = False
        after = llm.stats()
        assert len(deltas) == 4
        assert (after.steps - before.steps, after.running, after.graph_steps) == (2, 4, 0)
    return trace.entered


def test_one_decode_step_enters_few_places(tmp_path: Path) -> None:
    entered = decode_step(tmp_path)
    core = {place for place in entered if place[0].startswith("core/")}
    apart = ("kernels/", "layers/", "plugins/", "testing/")
    own = {place for place in entered if not place[0].startswith(apart)}
    found = {
        "core_files": len({file for file, _ in core}),
        "core_functions": len(core),
        "files": len({file for file, _ in own}),
        "functions": len(own),
    }
    hold("decode_step", found)


def texts() -> Iterator[tuple[str, str]]:
    for source in sources():
        yield str(source.path.relative_to(ROOT)), source.text
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]):
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in sorted([*PACKAGE.rglob("*.yaml"), *PACKAGE.rglob("*.jinja"), *ROOT.glob("examples/**/*.py")]):
        yield str(path.relative_to(ROOT)), path.read_text()


def test_words_that_readers_stumble_over_do_not_come_back() -> None:
    """DESIGN words: fix, report, skip, capture, failed request, dry run, no request; never their odd twins."""
    places = [
        f"{name}:{number}: {found.group()}"
        for name, text in texts()
        if name not in ALLOWED
        for number, line in enumerate(text.splitlines(), 1)
        for found in WORDS.finditer(line)
    ]
    limit = LIMITS["words"]["places"]
    assert len(places) <= limit, "\n".join(places[:20])
    hold("words", {"places": len(places)})


@pytest.mark.parametrize("line", ["the mend is this", "Nobody waits", "it is passed over", "steady rows"])
def test_such_a_word_is_seen(line: str) -> None:
    assert WORDS.search(line)


def test_the_map_lists_exactly_the_folders_that_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    block = page.partition("## The map")[2].partition("```\n")[2].partition("```")[0]
    listed = {
        name.rstrip("/") for line in block.splitlines() for name in re.findall(r"(?<![\w.])[a-z_/]+/(?= |$)", line)
    }
    there = {
        str(folder.relative_to(PACKAGE))
        for folder in PACKAGE.rglob("*")
        if folder.is_dir() and any(folder.glob("*.py")) and len(folder.relative_to(PACKAGE).parts) <= 2
    }
    assert listed == there


def test_the_reading_order_is_the_order_of_use() -> None:
    """Each file of the core once, behind all that it uses."""
    page = (ROOT / "docs" / "design.md").read_text()
    order = re.findall(r"`(?:core/)?(\w+)\.py`", page.partition("A newcomer may read")[2].partition("`llm.py`")[0])
    files = {source.path.stem: source for source in CORE}
    assert sorted(order) == sorted(files)
    read = [files[name].module for name in order]
    early = [
        f"{files[name].module} uses {used}"
        for at, name in enumerate(order)
        for used in read[at + 1 :]
        if any(under(found.module, used) and not found.typing_only for found in files[name].imports)
    ]
    assert early == []
