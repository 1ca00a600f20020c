"""Choosing an attention backend, and classes passed in Python."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoengine.api import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionNeed,
    AttentionSpec,
    LogitsProcessor,
    PluginError,
    UnsupportedError,
    hookimpl,
)
from nanoengine.setup.plugins.discover import choose_attention, discover, from_class, load_checked
from nanoengine.setup.plugins.targets import TargetLoader

NEED = AttentionNeed(device="madeup", dtype="float32", head_sizes=frozenset({40}))
HERE = __name__


class Complete(AttentionBackend):
    capabilities = AttentionCapabilities(devices=frozenset({"madeup"}))

    @classmethod
    def kv_block_bytes(cls, spec: Any, block_size: int) -> int:
        return 0

    def __init__(self, spec: Any, limits: Any, device: Any) -> None: ...

    def allocate(self, num_layers: int, num_blocks: int) -> None: ...

    def fill(self, inputs: Any) -> None: ...

    def forward(self, layer: int, spec: Any, q: Any, k: Any, v: Any) -> Any: ...


class OnlyHead64(Complete):
    capabilities = AttentionCapabilities(devices=frozenset({"madeup"}), head_sizes=frozenset({64}))


class Raises(Complete):
    @classmethod
    def unsupported(cls, need: AttentionNeed) -> list[str]:
        raise LookupError("table missing")


class AnswersBool(Complete):
    @classmethod
    def unsupported(cls, need: AttentionNeed) -> list[str]:
        return False  # type: ignore[return-value]


class Partial(AttentionBackend):
    capabilities = Complete.capabilities


def spec(name: str, cls: str, **more: Any) -> AttentionSpec:
    return AttentionSpec(name=name, target=f"{HERE}:{cls}", api=1, **more)


def registry_of(*specs: AttentionSpec) -> Any:
    return discover(extra=[("test", SimpleNamespace(register_attention_backends=hookimpl(lambda: list(specs))))])


def test_auto_takes_the_highest_preference_that_can_serve_and_says_why_not_the_others() -> None:
    registry = registry_of(
        spec("low", "Complete", preference=1),
        spec("best", "Complete", preference=50),
        spec("narrow", "OnlyHead64", preference=60),
        spec("absent", "Complete", preference=70, requires=("no_such_kernels",), install="pip install kernels"),
        spec("broken", "Raises", preference=80),
        spec("gone", "NotThere", preference=90),
        spec("odd", "AnswersBool", preference=100),
    )
    chosen, passed = choose_attention(registry, NEED)
    assert chosen.spec.name == "best"
    why = {name: " ".join(reasons) for name, reasons in passed}
    assert list(why) == ["odd", "gone", "broken", "absent", "narrow"]
    assert "must return a list" in why["odd"]
    assert "NotThere" in why["gone"]
    assert "LookupError: table missing" in why["broken"]
    assert "no_such_kernels" in why["absent"]
    assert "pip install kernels" in why["absent"]
    assert "head sizes [40]" in why["narrow"]


def test_equal_preferences_go_by_name() -> None:
    registry = registry_of(spec("b", "Complete", preference=50), spec("a", "Complete", preference=50))
    assert choose_attention(registry, NEED)[0].spec.name == "a"


def test_a_named_backend_that_cannot_serve_gives_every_reason() -> None:
    need = AttentionNeed(device="cpu", dtype="float32", head_sizes=frozenset({40}))
    with pytest.raises(UnsupportedError) as caught:
        choose_attention(registry_of(spec("narrow", "OnlyHead64")), need, "narrow")
    assert len(caught.value.reasons) == 2
    assert "'narrow'" in str(caught.value)


def test_a_named_backend_without_its_library_says_what_to_install() -> None:
    registry = registry_of(spec("absent", "Complete", requires=("no_such.kernels",), install="pip install kernels"))
    with pytest.raises(UnsupportedError, match=r"no_such\.kernels, not installed here \(pip install kernels\)"):
        choose_attention(registry, NEED, "absent")


def test_a_named_backend_that_is_broken_or_unknown_is_a_plugin_error() -> None:
    registry = registry_of(spec("broken", "Raises"), spec("gone", "NotThere"))
    with pytest.raises(PluginError, match="LookupError"):
        choose_attention(registry, NEED, "broken")
    with pytest.raises(PluginError, match="NotThere"):
        choose_attention(registry, NEED, "gone")
    with pytest.raises(PluginError, match="did you mean 'broken'"):
        choose_attention(registry, NEED, "brokn")


def test_none_can_serve_lists_the_reasons_against_each() -> None:
    need = AttentionNeed(device="nowhere", dtype="float32", head_sizes=frozenset({40}))
    with pytest.raises(UnsupportedError, match=r"narrow: runs on madeup, not on nowhere") as caught:
        choose_attention(registry_of(spec("narrow", "OnlyHead64")), need)
    assert any(reason.startswith("narrow: ") for reason in caught.value.reasons)


def test_auto_passes_over_a_name_in_conflict() -> None:
    registry = registry_of(
        spec("twice", "Complete", preference=90), spec("twice", "Complete"), spec("fine", "Complete")
    )
    chosen, passed = choose_attention(registry, NEED)
    assert chosen.spec.name == "fine"
    assert passed[0][0] == "twice"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (f"{HERE}:Partial", r"does not implement AttentionBackend\.__init__, allocate, fill, forward"),
        (f"{HERE}:NEED", "not a class derived from nanoengine.api.AttentionBackend"),
        (f"{HERE}:Path", "not a class derived from nanoengine.api.AttentionBackend"),
        (f"{HERE}:Nothing", "cannot load .*AttributeError"),
        ("no_such_module_q:X", "cannot load .*ModuleNotFoundError"),
    ],
)
def test_a_target_is_checked_when_loaded(target: str, text: str) -> None:
    with pytest.raises(PluginError, match=text):
        load_checked(TargetLoader(), target, AttentionBackend)


def test_a_class_must_set_what_its_base_declares() -> None:
    class NoPhase(LogitsProcessor):
        def apply(self, logits: Any, rows: Any) -> Any: ...

    with pytest.raises(PluginError, match=r"class attribute LogitsProcessor\.phase"):
        from_class(NoPhase, LogitsProcessor)


def test_an_importable_class_travels_by_name() -> None:
    target, local = from_class(Complete, AttentionBackend)
    assert (target, local) == (f"{HERE}:Complete", {})
    assert TargetLoader(local=local).load(target) is Complete


def test_a_local_class_travels_by_hand() -> None:
    class Mine(Complete): ...

    target, local = from_class(Mine, AttentionBackend)
    assert TargetLoader(local=local).load(target) is Mine
    with pytest.raises(PluginError, match="cannot load"):
        TargetLoader().load(target)


def test_a_class_handed_over_is_checked_as_a_plugins_is() -> None:
    with pytest.raises(PluginError, match="does not implement"):
        from_class(Partial, AttentionBackend)
    with pytest.raises(PluginError, match="not a class"):
        from_class(NEED, AttentionBackend)


def test_a_target_module_that_exits_is_a_plugin_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits_at_import.py").write_text("import sys; sys.exit(7)")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(PluginError, match="SystemExit: 7"):
        TargetLoader().load("exits_at_import:X")
    assert "exits_at_import" not in sys.modules
