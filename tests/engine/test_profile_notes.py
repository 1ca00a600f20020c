"""A start takes from the notes of an earlier one of the same plan what that one measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import EnginePlan, PolicyPlan
from nanoengine.setup.start import profile_notes
from nanoengine.setup.start.profile_notes import ProfileNotes, notes_path

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU and a Triton whose cache is an empty folder."""
    found = SimpleNamespace(name="NVIDIA H200", total_memory=141 << 30)
    cache = SimpleNamespace(dir=str(tmp_path / "cache"))
    triton = SimpleNamespace(__version__="3.6.0", knobs=SimpleNamespace(cache=cache))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(profile_notes.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", triton)
    return found


def plan(**options: Any) -> EnginePlan:
    return EnginePlan(
        model_path="/models/one", hf_config={"hidden_size": 8}, model="a:B", attention_name="c", attention="d:E",
        processors=(), options=EngineOptions(device="cuda", **options),
        policy=PolicyPlan(name="fcfs", target="f:G", params_target="f:H", params={}, origin="built in"),
    )  # fmt: skip


def test_what_was_measured_is_read_again(gpu: SimpleNamespace) -> None:
    path = notes_path(plan(), CUDA)
    assert path is not None
    assert ProfileNotes.read(path) is None
    ProfileNotes(12, 34, 5).write(path)
    assert ProfileNotes.read(notes_path(plan(), CUDA)) == ProfileNotes(12, 34, 5)
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # no draft is left


def test_notes_are_those_of_the_same_plan_gpu_and_sources(gpu: SimpleNamespace, monkeypatch: Any) -> None:
    base = plan()
    paths = [notes_path(base, CUDA)]
    paths.append(notes_path(replace(base, hf_config={"hidden_size": 16}), CUDA))
    paths.append(notes_path(replace(base, model_path="/models/two"), CUDA))
    paths.append(notes_path(plan(max_num_seqs=8), CUDA))
    gpu.name = "NVIDIA H100"
    paths.append(notes_path(base, CUDA))
    monkeypatch.setattr(profile_notes, "_changed", lambda path: (1, 2))
    paths.append(notes_path(base, CUDA))
    assert len(set(paths)) == len(paths)
    dummy = plan(load_format="dummy")
    assert notes_path(dummy, CUDA) == notes_path(replace(dummy, model_path="/tmp/other"), CUDA)


def test_no_notes_on_a_cpu_or_where_they_are_not_wanted(gpu: SimpleNamespace) -> None:
    assert notes_path(plan(), torch.device("cpu")) is None
    assert notes_path(plan(reuse_profile=False), CUDA) is None
    assert ProfileNotes.read(None) is None
    ProfileNotes(1, 2, 3).write(None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"prefill": "x", "sampling": 1}'])
def test_broken_notes_are_none(gpu: SimpleNamespace, tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    assert ProfileNotes.read(path) is None


def test_a_folder_that_cannot_be_written_is_no_error(gpu: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ProfileNotes(1, 2, 3).write(tmp_path / "file" / "notes.json")
