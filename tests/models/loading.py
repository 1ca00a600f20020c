"""Loading a tiny checkpoint, and changing it before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paged_harness import model_class
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoengine.api.parallel import SingleRank
from nanoengine.setup.start.build_model import BuiltModel, build_model
from nanoengine.setup.start.checkpoint import SINGLE_FILE
from nanoengine.setup.start.weights import LoadReport, load_weights


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[BuiltModel, LoadReport]:
    hf = json.loads((path / "config.json").read_text())
    built = build_model(model_class(hf), hf, tp=SingleRank(), dtype=dtype, device="cpu")
    return built, load_weights(built.model, built.config, path, SingleRank())


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    """`change` is applied to the tensors of model.safetensors, by name; returns them."""
    held = load_file(path / SINGLE_FILE)
    change(held)
    save_file(held, path / SINGLE_FILE, {"format": "pt"})
    return held


def parameter(built: BuiltModel, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return built.model.get_submodule(owner).get_parameter(last)
