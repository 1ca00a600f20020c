"""What readers of `quantization_config` share: its keys with good errors, and which layers are quantised online."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from nanoengine.api import ExpertsMethod, LayerInfo, LinearMethod, ModelError
from nanoengine.layers.hf_config import shown
from nanoengine.plugins.quantizations.eight_bit import EightBitLinear, Scheme
from nanoengine.plugins.quantizations.eight_bit_experts import EightBitExperts

_log = logging.getLogger(__name__)
KV_SCALES = (
    ".kv_scale", ".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point",
    ".k_proj.output_scale", ".v_proj.output_scale",
)  # fmt: skip
"""Ends of the names of tensors by which other engines quantise K and V. Here each head of each token has a scale."""
_LEAST_OUTPUTS = 16  # of a layer that is quantised online: a gate of one output is no weight to save


def _after_mark(target: str) -> str:
    return target[3:] if target.startswith("re:") else ""


class Section:
    """Reads a mapping of config.json. Each key must be read before `finish`; null is as if a key were not there.

    Attributes:
        harmless: keys that need not be read. off: values with which a key need not be read.
    """

    harmless: ClassVar[frozenset[str]] = frozenset()
    off: ClassVar[tuple[Any, ...]] = (None,)

    def __init__(self, data: Any, path: str) -> None:
        self.path = path
        if not isinstance(data, Mapping):
            raise ModelError(f"config.json: {path} must be an object, not {shown(data)}")
        self._data = data
        self._read = {"quant_method"}

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self._data.get(key)
        return default if value is None else value

    def wrong(self, key: str, wanted: str) -> ModelError:
        return ModelError(f"config.json: {self.path}.{key} is {shown(self._data.get(key))}; supported is {wanted}")

    def only(self, key: str, *values: Any) -> None:
        """Raises `ModelError` for another value than these, or null."""
        given = self.get(key)
        if given is not None and not any(given == each and type(given) is type(each) for each in values):
            raise self.wrong(key, " or ".join([*map(shown, values), "null"]))

    def kv(self) -> None:
        """Reads what the file says of a KV cache: nothing that is needed, see `KV_SCALES`."""
        if self.get("kv_cache_scheme") is not None:
            _log.info(
                "config.json: %s.kv_cache_scheme and the scales that belong to it are not used: with "
                "engine.kv_dtype=fp8 or int8 each token has scales of its own", self.path,
            )  # fmt: skip

    def one_of(self, key: str, values: Sequence[str], default: str) -> str:
        given = self.get(key, default)
        if given not in values:
            raise self.wrong(key, " or ".join(map(repr, values)))
        return str(given)

    def flag(self, key: str, *, default: bool) -> bool:
        given = self.get(key, default)
        if not isinstance(given, bool):
            raise self.wrong(key, "true or false")
        return given

    def number(self, key: str, default: float) -> float:
        given = self.get(key, default)
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
            raise self.wrong(key, "a positive number")
        return float(given)

    def patterns(self, key: str, expression: Callable[[str], str] = _after_mark) -> list[str]:
        """A list of names, of which some are regular expressions. expression: what is compiled of one."""
        given = self.get(key, [])
        if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given):
            raise self.wrong(key, "a list of names of modules")
        for each in given:
            self.pattern(key, each, expression(each))
        return given

    def pattern(self, key: str, text: str, expression: str | None = None) -> re.Pattern[str]:
        """The regular expression that `text` is, or that it holds."""
        try:
            return re.compile(text if expression is None else expression)
        except (re.error, RecursionError, OverflowError) as error:
            path = f"config.json: {self.path}.{key}"
            raise ModelError(f"{path} has {shown(text)}, no regular expression: {error}") from error

    def block(self, key: str) -> tuple[int, int] | None:
        """[outputs, inputs] of a block, of which the inputs are a power of two from 32, as kernels need them."""
        given = self.get(key)
        if given is None:
            return None
        sizes = [each for each in given if type(each) is int] if isinstance(given, list) else []
        if len(sizes) != 2 or len(given) != 2 or sizes[0] < 1 or sizes[1] < 32 or sizes[1] & (sizes[1] - 1):
            raise self.wrong(key, "[outputs, inputs] of a block, its inputs a power of two from 32, as in [128, 128]")
        return sizes[0], sizes[1]

    def group(self, key: str) -> int:
        """Inputs that share a scale."""
        given = self.get(key)
        if type(given) is not int or given < 32 or given & (given - 1):
            raise self.wrong(key, "a power of two from 32")
        return int(given)

    def finish(self) -> None:
        """Raises `ModelError` for keys that were not read."""
        known = self._read | self.harmless
        unknown = sorted(key for key, value in self._data.items() if key not in known and value not in self.off)
        if unknown:
            raise ModelError(
                f"config.json: {self.path} has {', '.join(unknown)}, which may mean other values; known: "
                f"{', '.join(sorted(self._read))}"
            )


def online_method(layer: LayerInfo, scheme: Scheme) -> LinearMethod | ExpertsMethod | None:
    """The method of a layer of a plain checkpoint: linear layers and experts are quantised, others not."""
    if layer.kind == "experts":
        return EightBitExperts(layer, scheme)
    return EightBitLinear(scheme) if layer.kind == "linear" and layer.shape[0] >= _LEAST_OUTPUTS else None
