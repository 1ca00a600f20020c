"""Folder and .gguf sources, the cache root, and the cache of converted models among several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fixtures_models
import pytest
from gguf_zoo import TinyGGUF

from nanoengine.api import ModelSource, ModelSourceError, SourceContext
from nanoengine.api.sources import cache_root
from nanoengine.plugins import model_sources
from nanoengine.plugins.model_sources import conversion_cache
from nanoengine.plugins.model_sources.folder import FolderSource
from nanoengine.plugins.model_sources.gguf_architectures import ARCHITECTURES
from nanoengine.plugins.model_sources.gguf_file import GGUFFileSource
from nanoengine.plugins.model_sources.gguf_tokenizer import PRE_TOKENIZERS
from nanoengine.plugins.model_sources.hub import HubSource
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.sources import resolve_model, with_revision
from nanoengine.setup.plugins.targets import TargetLoader

pytestmark = pytest.mark.usefixtures("forked")

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "nanoengine.json"}  # fmt: skip


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def ctx(tmp_path: Path, lines: list[str]) -> SourceContext:
    return SourceContext(tmp_path / "cache", lines.append)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return TinyGGUF().write(tmp_path / "tiny.gguf")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Registration and order


def test_registered_targets_load_and_name_their_models() -> None:
    specs = sorted(model_sources.register_model_sources(), key=lambda spec: spec.order)
    assert [spec.name for spec in specs] == ["smollm2-wheel", "folder", "gguf_file", "hub"]
    for spec in specs:
        source = TargetLoader().load(spec.target)
        assert issubclass(source, ModelSource)
        assert spec.models == ((source.model,) if hasattr(source, "model") else ())


def test_sources_import_no_torch(tiny: Path, tmp_path: Path, started: None) -> None:
    code = (
        "import sys; from pathlib import Path; from nanoengine.api import SourceContext\n"
        "from nanoengine.plugins.model_sources.gguf_file import GGUFFileSource\n"
        "from nanoengine.plugins.model_sources import hub, hub_errors; hub_errors.hub_failures()\n"
        f"print(GGUFFileSource().resolve({str(tiny)!r}, SourceContext(Path({str(tmp_path / 'c')!r}))))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert names(Path(done.stdout.strip())) == FILES


def test_resolve_asks_in_order_and_names_the_nearest(tmp_path: Path, tiny: Path, ctx: SourceContext) -> None:
    sources = [("folder", FolderSource()), ("gguf", GGUFFileSource())]
    folder = resolve_model(str(tiny), sources, ctx)
    assert resolve_model(str(folder), sources, ctx) == folder
    with pytest.raises(ModelSourceError, match=r"no model 'smollm2'.*did you mean 'smollm2-135m'"):
        resolve_model("smollm2", sources, ctx, names=["smollm2-135m"])


def test_no_model_is_an_error_with_what_a_model_may_be(tmp_path: Path, ctx: SourceContext) -> None:
    sources = [("folder", FolderSource()), ("gguf", GGUFFileSource()), ("hub", HubSource())]
    with pytest.raises(
        ModelSourceError, match=r"not a folder .* a \.gguf file, a known name or a hub id such as owner/name"
    ):
        resolve_model("here", sources, ctx)
    for path in ("./here/there", "../here", "/here", "~/here", "here/or/there"):
        with pytest.raises(ModelSourceError) as caught:
            resolve_model(path, sources, ctx)
        assert str(caught.value) == f"no model {path!r}: no such folder: {Path(path).expanduser().absolute()}"
    with pytest.raises(ModelSourceError, match="a known name or a hub id"):  # a plugin's, which is not there
        resolve_model("s3://bucket/model", sources, ctx)
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelSourceError, match=r"model exists, but has no revisions: leave out @v1"):
        resolve_model(f"{tmp_path}/model@v1", sources, ctx)
    with pytest.raises(ModelSourceError, match=r"no such file: absent/tiny\.gguf"):
        resolve_model("absent/tiny.gguf", sources, ctx)
    with pytest.raises(ModelSourceError, match=r"org/tiny@main is not, .* HF_HUB_OFFLINE"):
        resolve_model("org/tiny/tiny.gguf", sources, ctx)


def test_one_form_for_revisions() -> None:
    assert with_revision("org/name", None) == "org/name"
    assert with_revision("org/name", "refs/pr/3") == "org/name@refs/pr/3"
    with pytest.raises(ModelSourceError, match="leave out one"):
        with_revision("org/name@v1", "v2")


# Cache root


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOENGINE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.setenv("NANOENGINE_CACHE", "")
    assert cache_root() == tmp_path / "xdg" / "nanoengine"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_root() == tmp_path / "home" / ".cache" / "nanoengine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / "home" / ".cache" / "nanoengine"
    monkeypatch.setenv("NANOENGINE_CACHE", "here")
    assert cache_root() == Path.cwd() / "here"


# Folder


def test_folder(tmp_path: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FolderSource().resolve(str(tmp_path / "none"), ctx) is None
    assert FolderSource().resolve("~nobody-of-that-name/model", ctx) is None
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelSourceError, match=r"no config\.json; a model folder has"):
        FolderSource().resolve(str(tmp_path / "model"), ctx)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert FolderSource().resolve(str(tmp_path / "model"), ctx) == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert FolderSource().resolve("model", ctx) == tmp_path / "model"
    with pytest.raises(ModelSourceError, match=r"did you mean a folder inside it\? .*model"):
        FolderSource().resolve(str(tmp_path), ctx)


def test_folder_that_holds_only_a_gguf_says_so(tmp_path: Path, tiny: Path, ctx: SourceContext) -> None:
    with pytest.raises(ModelSourceError, match=r"give a \.gguf file in it instead: .*tiny\.gguf"):
        FolderSource().resolve(str(tmp_path), ctx)


# .gguf files and the cache


def test_gguf_is_converted_once(tiny: Path, ctx: SourceContext, lines: list[str]) -> None:
    folder = GGUFFileSource().resolve(str(tiny), ctx)
    assert folder is not None
    assert names(folder) == FILES
    assert [line for line in lines if "converting tiny.gguf: 20 tensors" in line]
    before = (folder / "model.safetensors").stat()
    lines.clear()
    assert GGUFFileSource().resolve(str(tiny), ctx) == folder
    assert lines == []
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [name for name in names(folder.parent) if ".tmp-" in name] == []


def test_what_is_no_gguf_or_not_there(tmp_path: Path, ctx: SourceContext) -> None:
    assert GGUFFileSource().resolve("some-name", ctx) is None
    with pytest.raises(ModelSourceError, match=r"no such file: .*absent\.gguf"):
        GGUFFileSource().resolve(str(tmp_path / "absent.gguf"), ctx)


def test_entry_goes_by_content_not_by_name(tmp_path: Path, tiny: Path, ctx: SourceContext) -> None:
    folder = GGUFFileSource().resolve(str(tiny), ctx)
    copy = tmp_path / "other name.gguf"
    shutil.copyfile(tiny, copy)
    assert GGUFFileSource().resolve(str(copy), ctx) == folder
    TinyGGUF(seed=7).write(tiny)
    changed = GGUFFileSource().resolve(str(tiny), ctx)
    assert changed != folder
    assert names(changed or tmp_path) == FILES


def test_another_converter_version_is_another_entry(
    tiny: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GGUFFileSource().resolve(str(tiny), ctx)
    monkeypatch.setattr(conversion_cache, "CONVERTER_VERSION", 999)
    assert GGUFFileSource().resolve(str(tiny), ctx) != folder


def test_digest_is_remembered_until_the_file_changes(
    tiny: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    GGUFFileSource().resolve(str(tiny), ctx)
    read: list[Path] = []
    real = conversion_cache.file_sha256
    monkeypatch.setattr(conversion_cache, "file_sha256", lambda path: (read.append(path), real(path))[1])
    GGUFFileSource().resolve(str(tiny), ctx)
    assert read == []
    os.utime(tiny, ns=(1, 1))
    GGUFFileSource().resolve(str(tiny), ctx)
    assert read == [tiny]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", Path.unlink), ("model.safetensors", truncate), ("tokenizer.json", Path.unlink),
        ("nanoengine.json", Path.unlink), ("nanoengine.json", truncate),
    ],
)  # fmt: skip
def test_damaged_entry_is_made_again(
    name: str, damage: Callable[[Path], None], tiny: Path, ctx: SourceContext, lines: list[str]
) -> None:
    folder = GGUFFileSource().resolve(str(tiny), ctx)
    assert folder is not None
    content = (folder / name).read_bytes()
    damage(folder / name)
    assert GGUFFileSource().resolve(str(tiny), ctx) == folder
    assert (folder / name).read_bytes() == content
    assert names(folder) == FILES
    assert [line for line in lines if "is damaged" in line]


def test_refused_file_leaves_nothing_behind(tmp_path: Path, ctx: SourceContext) -> None:
    bad = TinyGGUF(pre="unheard-of").write(tmp_path / "bad.gguf")
    with pytest.raises(ModelSourceError, match="unheard-of"):
        GGUFFileSource().resolve(str(bad), ctx)
    assert {name for name in names(ctx.cache / "gguf") if not name.endswith(".lock")} == {"digests"}


def test_cache_that_cannot_be_written(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelSourceError, match="NANOENGINE_CACHE"):
        GGUFFileSource().resolve(str(tiny), SourceContext(tmp_path / "file"))


def test_disk_too_full_is_said_before_writing(tiny: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ModelSourceError, match=r"converted weights take .* MB, more than is free"):
        GGUFFileSource().resolve(str(tiny), ctx)


# Several processes. The child logs each conversion it starts, and holds it until the file `go` appears.

CHILD = """
import contextlib, os, sys, time
from pathlib import Path
from nanoengine.api import SourceContext
from nanoengine.plugins.model_sources import conversion_cache
from nanoengine.plugins.model_sources.gguf_file import GGUFFileSource

gguf, cache, go, log, mode = sys.argv[1:]
real = conversion_cache.convert

def held(source, folder, say):
    real(source, folder, say)
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    while not Path(go).exists():
        time.sleep(0.01)

conversion_cache.convert = held
if mode == "no lock":
    conversion_cache.ConvertedModel._lock = lambda self: contextlib.nullcontext()
say = lambda line: print(line, flush=True)
print(GGUFFileSource().resolve(gguf, SourceContext(Path(cache), say)), flush=True)
"""


class Children:
    """Child processes over one .gguf file and one cache."""

    def __init__(self, tiny: Path, tmp_path: Path) -> None:
        self.cache, self.go, self.log = tmp_path / "cache", tmp_path / "go", tmp_path / "log"
        self.script = tmp_path / "child.py"
        self.script.write_text(CHILD)
        self.arguments = [str(tiny), str(self.cache), str(self.go), str(self.log)]
        self.started: list[subprocess.Popen[str]] = []

    def start(self, mode: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, str(self.script), *self.arguments, mode]
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return self.started[-1]

    def conversions(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def wait_for(self, conversions: int) -> None:
        deadline = time.monotonic() + 100
        while self.conversions() < conversions:
            assert time.monotonic() < deadline, f"only {self.conversions()} conversions started"
            time.sleep(0.01)


@pytest.fixture
def children(tiny: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    group = Children(tiny, tmp_path)
    yield group
    for child in group.started:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def line_of(child: subprocess.Popen[str], words: str) -> str:
    """The child's next line with `words` in it."""
    assert child.stdout is not None
    for line in child.stdout:
        if words in line:
            return line
    raise AssertionError(f"the child ended without saying {words!r}")


def test_two_processes_convert_once(children: Children) -> None:
    first = children.start()
    children.wait_for(1)
    second = children.start()
    line_of(second, "another process is converting this model")
    children.go.touch()
    outputs = [child.communicate(timeout=100)[0] for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert children.conversions() == 1
    assert names(Path(outputs[0].splitlines()[-1])) == FILES


def test_mutant_without_lock_converts_twice(children: Children) -> None:
    children.start("no lock")
    children.wait_for(1)
    children.start("no lock")
    children.wait_for(2)


def test_killed_half_way_is_cleaned_up_and_made_again(tiny: Path, children: Children) -> None:
    child = children.start()
    children.wait_for(1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    left = [path for path in (children.cache / "gguf").iterdir() if ".tmp-" in path.name]
    assert len(left) == 1
    assert (left[0] / "model" / "model.safetensors").exists()  # it was well under way
    assert all(name.startswith(".") or name == "digests" for name in names(children.cache / "gguf"))  # nothing whole
    folder = GGUFFileSource().resolve(str(tiny), SourceContext(children.cache))
    assert folder is not None
    assert names(folder) == FILES
    assert not left[0].exists()
    manifest = json.loads((folder / "nanoengine.json").read_text())
    assert set(manifest["files"]) == FILES - {"nanoengine.json"}


def test_missing_model_skips_but_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no network"):
        fixtures_models.missing(ModelSourceError("no network"))
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="CI is set, and a model is missing: no network"):
        fixtures_models.missing(ModelSourceError("no network"))


# docs/models.md


def test_the_page_names_what_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    served = [*ARCHITECTURES, *PRE_TOKENIZERS, "HF_HUB_OFFLINE", "HF_ENDPOINT", "NANOENGINE_CACHE"]
    assert [name for name in served if f"`{name}" not in text] == []
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "hub.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    assert load_config("hub.yaml").model.pinned == "Qwen/Qwen3-0.6B@main"
