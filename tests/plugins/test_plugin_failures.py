"""A plugin that fails, wherever it does, is named: its file and line, its class, and what to do about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.api import ModelError, ModelSourceError, NanoEngineError, PluginError
from nanoengine.setup.plugins.discover import discover
from nanoengine.testing import mock_model
from nanoengine.testing.mock_model import write_mock_checkpoint

PLUGIN = """
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar
import sys
import torch
from nanoengine.api import *
from nanoengine.testing.mock_model import MockAttention, MockModel


class PanicException(BaseException):  # as pyo3 raises a Rust panic
    __module__ = "pyo3_runtime"


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class OtherModel(MockModel):
    pass  # MODEL


class OtherBackend(MockAttention):
    pass  # BACKEND


@dataclass(frozen=True)
class OtherParams(ProcessorParams):
    columns: ClassVar = {"other": ColumnSpec(dtype="float32")}
    other: float = 0.0
    # PARAMS


class OtherProcessor(LogitsProcessor):
    phase = Phase.BIAS

    def apply(self, logits, rows):
        return logits
    # PROCESSOR


class OtherSource(ModelSource):
    def resolve(self, source, ctx):
        return None
    # SOURCE


@hookimpl
def register_models():
    return [ModelSpec(name="other", architectures=("OtherForCausalLM",), target=f"{__name__}:OtherModel", api=1)]


@hookimpl
def register_attention_backends():
    return [AttentionSpec(name="other", target=f"{__name__}:OtherBackend", api=1)]


@hookimpl
def register_samplers():
    return [SamplerSpec(name="other", params=OtherParams, target=f"{__name__}:OtherProcessor", api=1)]


@hookimpl
def register_model_sources():
    return [ModelSourceSpec(name="other", target=f"{__name__}:OtherSource", api=1, order=-5)]
"""


def written(folder: Path, place: str, code: str) -> tuple[Path, int]:
    """A plugin file with `code` at `place`, and the line of the mark `# HERE` in it."""
    body = "\n".join("    " + line for line in code.strip("\n").split("\n"))
    text = re.sub(rf"    (pass  )?# {place}\n", lambda _: body + "\n", PLUGIN)
    path = folder / "other.py"
    path.write_text(text)
    marked = [number for number, line in enumerate(text.split("\n"), 1) if "# HERE" in line]
    return path, marked[0]


def start(folder: Path, plugin: Path, **options: Any) -> LLM:
    path = write_mock_checkpoint(folder / "model")
    config = json.loads((path / "config.json").read_text()) | {"architectures": ["OtherForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {"attention": "other", "load_format": "dummy", "num_gpu_blocks_override": 64, **options}
    return LLM(path, block_size=4, plugins=[mock_model, plugin], **given)


MODEL = {
    "constructor": (
        "def __init__(self, config, ctx):\n    raise KeyError('num_widgets')  # HERE",
        "OtherModel.__init__ failed: KeyError: 'num_widgets'",
    ),
    "exit": ("def __init__(self, config, ctx):\n    sys.exit(3)  # HERE", "OtherModel.__init__ failed: SystemExit: 3"),
    "panic": (
        "def __init__(self, config, ctx):\n    raise PanicException('index out of bounds')  # HERE",
        "OtherModel.__init__ failed: PanicException: index out of bounds",
    ),
    "no words": (
        "@classmethod\ndef read_config(cls, hf):\n    raise Unprintable  # HERE",
        "OtherModel.read_config failed: Unprintable: its __str__ raised RuntimeError",
    ),
    "no config": (
        "@classmethod  # HERE\ndef read_config(cls, hf):\n    return 7",
        "OtherModel.read_config returned 7, not a nanoengine.api.ModelConfig",
    ),
    "vocabulary of none": (
        "@classmethod  # HERE\ndef read_config(cls, hf):\n    return replace(super().read_config(hf), vocab_size=0)",
        "OtherModel.read_config returned vocab_size=0, which must be an integer of at least 1",
    ),
    "weight map": (
        "@classmethod  # HERE\ndef weight_map(cls, config):\n    return {}",
        "OtherModel.weight_map returned {}, not a nanoengine.api.WeightMap",
    ),
    "no attention layers": (
        "def __init__(self, config, ctx):  # HERE\n    Model.__init__(self, config, ctx)",
        "OtherModel made no attention layer",
    ),
    "weights": (
        "def __init__(self, config, ctx):\n    super().__init__(config, ctx)\n    self.one = ctx.linear('one', 2, 2)\n"
        "    self.one.load_shard = self.load\n"
        "def load(self, *args):\n    raise LookupError('gone')  # HERE",
        "OtherModel: loading its weights failed: LookupError: gone",
    ),
    "heads": (
        "def __init__(self, config, ctx):\n    super().__init__(config, ctx)\n"
        "    spec = AttentionLayerSpec(num_heads=7, num_kv_heads=2, head_size=2, scale=1.0)\n"
        "    self.more = ctx.attention('more', spec)  # HERE",
        r"more: 7 heads cannot be divided equally over 2 KV heads.* \(in nanoengine_plugin_other_\w+:OtherModel, ",
    ),
    "half a head": (
        "def __init__(self, config, ctx):\n    super().__init__(config, ctx)\n"
        "    spec = AttentionLayerSpec(num_heads=1, num_kv_heads=1, head_size=0.5, scale=1.0)\n"
        "    self.more = ctx.attention('more', spec)  # HERE",
        "more: head_size must be an integer of at least 1, not 0.5",
    ),
    "forward raises": (
        "def forward(self, ids, positions, batch):\n    return torch.zeros(2) @ torch.zeros(3)  # HERE",
        "a dry run of one token failed: RuntimeError: .*OtherModel.forward",
    ),
    "forward exits": (
        "def forward(self, ids, positions, batch):\n    sys.exit()  # HERE",
        r"OtherModel.forward called sys.exit\(\)",
    ),
    "tuple": (
        "def forward(self, ids, positions, batch):  # HERE\n    return (super().forward(ids, positions, batch),)",
        r"OtherModel.forward returned a tuple, not a float Tensor of \[T, hidden size\] = \(1, 2\)",
    ),
    "hidden width": (
        "def forward(self, ids, positions, batch):  # HERE\n    return super().forward(ids, positions, batch)[:, :1]",
        r"OtherModel.forward returned torch.float32 \(1, 1\), not a float Tensor of \[T, hidden size\] = \(1, 2\)",
    ),
    "hidden integers": (
        "def forward(self, ids, positions, batch):  # HERE\n    return super().forward(ids, positions, batch).int()",
        r"OtherModel.forward returned torch.int32 \(1, 2\), not a float Tensor",
    ),
    "logits width": (
        "def compute_logits(self, hidden):  # HERE\n    return super().compute_logits(hidden)[:, :-1]",
        r"OtherModel.compute_logits returned torch.float32 \(1, 96\), not \(1, 97\)",
    ),
    "logits rows": (
        "def compute_logits(self, hidden):  # HERE\n    return super().compute_logits(hidden)[0]",
        r"OtherModel.compute_logits returned torch.float32 \(97,\), not \(1, 97\)",
    ),
    "logits dtype": (
        "def compute_logits(self, hidden):  # HERE\n    return super().compute_logits(hidden).long()",
        r"OtherModel.compute_logits returned torch.int64 \(1, 97\), not .*float32, bfloat16 or float16",
    ),
    "no logits": (
        "def compute_logits(self, hidden):  # HERE\n    super().compute_logits(hidden)",
        "OtherModel.compute_logits returned a NoneType, not",
    ),
}

BACKEND = {
    "constructor": (
        "def __init__(self, spec, limits, device):\n    raise OSError('no kernels')  # HERE",
        "OtherBackend.__init__ failed: OSError: no kernels",
    ),
    "block bytes raise": (
        "@classmethod\ndef kv_block_bytes(cls, spec, block_size):\n    return spec.no_such_thing  # HERE",
        "OtherBackend.kv_block_bytes failed: AttributeError",
    ),
    "block bytes of none": (
        "@classmethod\ndef kv_block_bytes(cls, spec, block_size):\n    return 0",
        "OtherBackend.kv_block_bytes returned 0 for KVSpec",
    ),
    "block bytes of halves": (
        "@classmethod\ndef kv_block_bytes(cls, spec, block_size):\n    return 0.5",
        "OtherBackend.kv_block_bytes returned 0.5 for KVSpec",
    ),
    "capabilities": (
        "capabilities = {'devices': 'cpu'}",
        "OtherBackend.capabilities must be a nanoengine.api.AttentionCapabilities, not {'devices': 'cpu'}",
    ),
    "devices": (
        "capabilities = AttentionCapabilities(devices=['cpu'])",
        r"OtherBackend.capabilities.devices must be a frozenset of torch device types, not \['cpu'\]",
    ),
    "block multiple": (
        "capabilities = replace(MockAttention.capabilities, block_multiple=0)",
        "OtherBackend.capabilities.block_multiple must be an integer of at least 1, not 0",
    ),
    "decode queries": (
        "capabilities = replace(MockAttention.capabilities, decode_queries=True)",
        "OtherBackend.capabilities.decode_queries must be an integer of at least 1, not True",
    ),
    "unsupported raises": (
        "@classmethod\ndef unsupported(cls, need):\n    raise PanicException('driver')  # HERE",
        "OtherBackend.unsupported failed: PanicException: driver",
    ),
    "unsupported says nothing": (
        "@classmethod  # HERE\ndef unsupported(cls, need):\n    return None",
        "OtherBackend.unsupported must return a list of strings, not None",
    ),
    "allocate": (
        "def allocate(self, num_layers, num_blocks):\n    raise ValueError('odd')  # HERE",
        "OtherBackend.allocate failed: ValueError: odd",
    ),
    "fill": (
        "def fill(self, inputs):\n    raise ValueError('odd')  # HERE",
        "a dry run of one token failed: ValueError: odd .*OtherBackend.fill",
    ),
    "forward raises": (
        "def forward(self, layer, spec, q, k, v):\n    raise ValueError('odd')  # HERE",
        r"a dry run of one token failed: ValueError: odd .*in nanoengine_plugin_other_\w+:OtherBackend",
    ),
    "forward gives another width": (
        "def forward(self, layer, spec, q, k, v):  # HERE\n    return super().forward(layer, spec, q, k, v)[..., :1]",
        r"OtherBackend.forward returned torch.float32 \(1, 1, 1\) on cpu, not torch.float32 \(1, 1, 2\)",
    ),
    "forward gives nothing": (
        "def forward(self, layer, spec, q, k, v):  # HERE\n    super().forward(layer, spec, q, k, v)",
        "OtherBackend.forward returned a NoneType, not torch.float32",
    ),
}


def refused(folder: Path, place: str, code: str, words: str, error: type[NanoEngineError]) -> None:
    marked = code if "# HERE" in code else f"# HERE\n{code}"
    plugin, line = written(folder, place, marked)
    with pytest.raises(error, match=words) as caught:
        start(folder, plugin)
    text = str(caught.value)
    assert f"{plugin}, line {line}; fix it there, or leave out --plugin {plugin}" in text or "# HERE" not in code
    assert f"{plugin}, line " in text


@pytest.mark.parametrize("case", MODEL)
def test_a_models_failure_at_start_names_it(tmp_path: Path, case: str) -> None:
    refused(tmp_path, "MODEL", *MODEL[case], ModelError if "call" not in case and "exits" not in case else PluginError)


@pytest.mark.parametrize("case", BACKEND)
def test_a_backends_failure_at_start_names_it(tmp_path: Path, case: str) -> None:
    refused(tmp_path, "BACKEND", *BACKEND[case], NanoEngineError)


LATER = {
    "raises": ("raise ValueError('odd')  # HERE", "ValueError: odd .*OtherModel.forward"),
    "exits": ("sys.exit('bye')  # HERE", r"OtherModel.forward called sys.exit\('bye'\)"),
    "panics": ("raise PanicException('odd')  # HERE", "OtherModel.forward raised PanicException: odd"),
    "narrows": (
        "out = out[:, :1]  # HERE",
        r"OtherModel.forward returned torch.float32 \(\d, 1\), not a float Tensor of",
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_a_model_that_fails_in_a_step_fails_who_met_it(tmp_path: Path, case: str) -> None:
    code, words = LATER[case]
    plugin, line = written(
        tmp_path,
        "MODEL",
        "def forward(self, ids, positions, batch):\n    out = super().forward(ids, positions, batch)\n"
        f"    if (ids == 13).any():\n        {code}\n    return out",
    )
    with start(tmp_path, plugin) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, logit_bias={13: -100.0})
        want = llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].token_ids
        bad, good = llm.generate([[1, 13], [1, 2]], params, use_tqdm=False)
    assert good.outputs[0].token_ids == want
    assert bad.error is not None
    assert re.search(words, str(bad.error))
    assert re.search(rf"{re.escape(str(plugin))}, line {line if case != 'narrows' else '[0-9]+'}", str(bad.error))


PROCESSOR = {
    "narrows": ("return logits[:, :-1]", r"returned torch.float32 \(1, 96\) instead of the torch.float32 \(1, 97\)"),
    "resizes": ("return logits.resize_(len(logits), 3)", r"returned torch.float32 \(1, 3\) instead of .* \(1, 97\)"),
    "transposes": ("return logits.t_()", r"returned torch.float32 \(97, 1\) instead of .* \(1, 97\)"),
    "doubles": ("return logits.double()", r"returned torch.float64 \(1, 97\) instead of the torch.float32 \(1, 97\)"),
    "moves": ("return logits.to('meta')", r"returned torch.float32 \(1, 97\) on meta instead of the"),
    "returns nothing": ("logits += 1", "returned None of type NoneType, not the logits, a Tensor"),
    "reads what is not there": ("return logits + rows.column('mine')", "declare no column 'mine'"),
    "panics": ("raise PanicException('odd')", "raised PanicException: odd"),
    "has no words": ("raise Unprintable", "Unprintable: its __str__ raised RuntimeError"),
}


@pytest.mark.parametrize("case", PROCESSOR)
def test_a_processor_that_breaks_fails_who_asked_for_it_and_is_named(tmp_path: Path, case: str) -> None:
    code, words = PROCESSOR[case]
    plugin, _ = written(tmp_path, "PROCESSOR", f"def apply(self, logits, rows):  # HERE\n    {code}")
    with start(tmp_path, plugin) as llm:
        params = SamplingParams(temperature=0, max_tokens=3)
        want = llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].token_ids
        bad, good = llm.generate(
            [[1, 2], [1, 2]], [SamplingParams(temperature=0, max_tokens=3, other=1.0), params], use_tqdm=False
        )
    assert good.outputs[0].token_ids == want
    assert bad.error is not None
    assert re.search(words, str(bad.error)), str(bad.error)
    assert f"logits processor 'other' (OtherProcessor of plugin file {plugin})" in str(bad.error)
    assert f"{plugin}, line " in str(bad.error)


PARAMS = {
    "pack raises": ("def pack(self, ctx):\n    return {}['x']  # HERE", "OtherParams failed on .*KeyError: 'x'"),
    "pack exits": ("def pack(self, ctx):\n    sys.exit()  # HERE", "OtherParams failed on .*SystemExit"),
    "pack panics": ("def pack(self, ctx):\n    raise PanicException  # HERE", "OtherParams failed on .*PanicException"),
    "pack gives none": ("def pack(self, ctx):\n    return None", "packed None, not a mapping of its columns"),
    "active raises": ("def active(self):\n    raise OSError  # HERE", "OtherParams failed on .*OSError"),
}


@pytest.mark.parametrize("case", PARAMS)
def test_parameters_that_break_are_named(tmp_path: Path, case: str) -> None:
    code, words = PARAMS[case]
    plugin, line = written(tmp_path, "PARAMS", code if "HERE" in code else f"{code}  # HERE")
    with start(tmp_path, plugin) as llm:
        with pytest.raises(PluginError, match=words) as caught:
            llm.generate([[1, 2]], SamplingParams(other=1.0), use_tqdm=False)
        if "# HERE" in code:
            assert f"{plugin}, line {line}; fix it there, or leave out --plugin {plugin}" in str(caught.value)
        assert llm.generate([[1, 2]], SamplingParams(max_tokens=1), use_tqdm=False)[0].error is None


SOURCE = {
    "raises": ("return 1 / 0", "failed in OtherSource.resolve: ZeroDivisionError"),
    "panics": ("raise PanicException('odd')", "failed in OtherSource.resolve: PanicException: odd"),
    "gives text": ("return '/somewhere'", "OtherSource.resolve returned '/somewhere' of type str, not a pathlib.Path"),
    "gives an empty folder": ("return Path(__file__).parent", "OtherSource.resolve returned .*has no config.json"),
}


@pytest.mark.parametrize("case", SOURCE)
def test_a_source_that_breaks_is_skipped_and_named_where_nobody_has_the_model(tmp_path: Path, case: str) -> None:
    code, words = SOURCE[case]
    plugin, _ = written(tmp_path, "SOURCE", f"def resolve(self, source, ctx):  # HERE\n    {code}")
    start(tmp_path, plugin).close()
    with pytest.raises(ModelSourceError, match=f"model source 'other' of plugin file .*{words}") as caught:
        LLM("no-such-model", plugins=[plugin])
    assert f"{plugin}, line " in str(caught.value)
    assert f"fix it there, or leave out --plugin {plugin}" in str(caught.value)


HOOKS = {
    "hook panics": ("raise PanicException('odd')", "register_models: PanicException: odd"),
    "hook exits": ("sys.exit()", "register_models: SystemExit"),
    "hook without end": ("import itertools; return itertools.repeat(None)", "returned more than 10,000 items"),
    "no specs": ("return [3]", "returned a list with 3, which is not a ModelSpec"),
    "name is a list": (
        "return [ModelSpec(name=[], architectures=('A',), target='a:B', api=1)]",
        "ModelSpec.name must be a name without white space",
    ),
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_that_breaks_is_named(tmp_path: Path, case: str) -> None:
    code, words = HOOKS[case]
    head, _, _ = PLUGIN.partition("@hookimpl")
    path = tmp_path / "other.py"
    path.write_text(f"{head}@hookimpl\ndef register_models():\n    {code}\n")
    with pytest.raises(PluginError, match=words) as caught:
        discover([path])
    assert f"plugin file {path}" in str(caught.value)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "GeneratorExit"])
def test_what_means_the_caller_goes_through(tmp_path: Path, error: str) -> None:
    plugin, _ = written(tmp_path, "MODEL", f"def __init__(self, config, ctx):  # HERE\n    raise {error}")
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a KeyboardInterrupt is no Exception
        start(tmp_path, plugin)
    assert type(caught.value).__name__ == error
