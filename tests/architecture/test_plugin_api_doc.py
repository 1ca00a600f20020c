"""docs/plugin-api.md is complete, says nothing that is not there, and its examples run."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_api_tables import rows_of
from source import ROOT
from typer.testing import CliRunner, Result

from nanoengine import api
from nanoengine.api.parallel import SingleRank
from nanoengine.cli.app import app
from nanoengine.setup.config.composer import package_root
from nanoengine.setup.plugins.discover import discover, load_checked
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.build_model import Builder, build_model, kv_groups
from nanoengine.testing.conformance import (
    ParserExample,
    check_drafter,
    check_grammar_backend,
    check_tool_parser,
)

TEXT = (ROOT / "docs" / "plugin-api.md").read_text()
CLASSES = [name for name in api.__all__ if isinstance(getattr(api, name), type)]
EXAMPLES = dict(re.findall(r"^```\w+\n# file: (\S+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL))


def section(name: str, text: str = TEXT) -> str:
    """The text under the name's own heading."""
    found = re.findall(rf"^### `{re.escape(name)}`\n(.*?)(?=^##|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"docs/plugin-api.md must have one heading '### `{name}`', it has {len(found)}"
    return str(found[0])


def documented(name: str, text: str = TEXT) -> dict[str, tuple[str, str]]:
    """Member -> (type and default, meaning) as the section's table has them."""
    table = section(name, text).replace(r"\|", "¦")
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)
    return {member: (kind.strip("` ").replace("¦", "|"), meaning) for member, kind, meaning in rows}


def test_every_name_is_documented_and_no_other() -> None:
    assert sorted(re.findall(r"^### `(\w+)`$", TEXT, flags=re.MULTILINE)) == sorted(api.__all__)
    assert all(len(section(name).strip()) > 30 for name in api.__all__)


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_is_documented_with_its_type_default_and_meaning(name: str) -> None:
    said = documented(name)
    assert {member: kind for member, (kind, _) in said.items()} == dict(rows_of(getattr(api, name)))
    assert [member for member, (_, meaning) in said.items() if len(meaning) < 3] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `seq_lens` |", "| `seq_len` |"),  # a member renamed
        ("| `fill(inputs)` |", "| `fill(inputs, graph)` |"),  # a parameter added
        ("`int = 100` |", "`int = 10` |"),  # a default changed
    ],
)
def test_a_stale_document_would_be_noticed(old: str, new: str) -> None:
    assert TEXT.count(old) == 1
    stale = TEXT.replace(old, new)
    found = {name: {m: kind for m, (kind, _) in documented(name, stale).items()} for name in CLASSES}
    assert [name for name in CLASSES if found[name] != dict(rows_of(getattr(api, name)))] != []


def test_every_hook_is_documented() -> None:
    hooks = re.findall(r"^\| `(register_\w+)\(\)`", TEXT, flags=re.MULTILINE)
    specs = import_module("nanoengine.api.hooks")
    assert sorted(hooks) == sorted(name for name in vars(specs) if name.startswith("register_"))


def test_every_hook_has_an_example() -> None:
    code = "\n".join(EXAMPLES.values())
    for hook in re.findall(r"^\| `(register_\w+)\(\)`", TEXT, flags=re.MULTILINE):
        assert f"def {hook}():" in code, hook


@pytest.fixture
def example(tmp_path: Path) -> Any:
    """example("x.py", "samplers", base): the spec and the class of the one part that the example registers."""

    def load(file: str, kind: str, base: type[Any]) -> tuple[Any, Any]:
        path = tmp_path / file
        path.write_text(EXAMPLES[file])
        registry = discover([path])
        (found,) = [r for r in getattr(registry, kind).values() if r.origin.file == str(path)]
        return found.spec, load_checked(TargetLoader(registry.plugin_files), found.spec.target, base)

    return load


def test_the_processor_example(example: Any) -> None:
    spec, processor_class = example("even_only.py", "samplers", api.LogitsProcessor)
    with pytest.raises(api.ParamsError, match="even_boost must be"):
        spec.params(even_boost=-1.0)
    assert spec.params(even_only=True).active()
    processor = processor_class(
        api.ProcessorContext(max_slots=2, vocab_size=8, max_model_len=4, device=torch.device("cpu"))
    )
    rows = api.ProcessorRows(
        slots=torch.tensor([1, 0]),
        positions=torch.tensor([3, 2]),
        prompt_lens=torch.tensor([3, 2]),
        vocab_start=3,
        vocab_size=8,
        columns={"even_only": torch.tensor([True, False]), "even_boost": torch.tensor([2.0, 0.0])},
    )
    out = processor.apply(torch.zeros(2, 3), rows)  # ids 3, 4, 5
    assert out.tolist() == [[float("-inf"), 2.0, float("-inf")], [0.0, 0.0, 0.0]]


def test_the_grammar_example(example: Any) -> None:
    _, backend = example("choices.py", "grammars", api.GrammarBackend)
    choice = api.Constraint(kind="choice", text='["yes", "no", "nothing"]')
    refused = [api.Constraint(kind="regex", text="a")]
    check_grammar_backend(backend, (choice, ["yes", "no", "nothing"], ["ye", "yesno", "x"]), refused=refused)


def test_the_tool_parser_example(example: Any) -> None:
    _, parser = example("arrows.py", "tool_parsers", api.ToolParser)
    check_tool_parser(
        parser,
        ParserExample(text='Now:\n-> f {"a": 1}\n-> g {}', calls=[("f", {"a": 1}), ("g", {})], content="Now:\n"),
        ParserExample(text="-> f {\na -> g {}\n", content="-> f {\na -> g {}\n"),
        templates=['-> name {"argument": 1}'],
    )


def plain_attention(example: Any, kv: api.KVSpec, block_size: int) -> Any:
    _, backend = example("plain.py", "attention_backends", api.AttentionBackend)
    limits = api.BatchLimits(max_rows=2, max_tokens=8, max_model_len=12, block_size=block_size)
    made = backend(kv, limits, torch.device("cpu"))
    made.allocate(num_layers=2, num_blocks=6)
    expected = made.cache[0, :, 0].numel() * made.cache.element_size()
    assert backend.kv_block_bytes(kv, block_size) == expected
    return made


def step(tables: list[list[int]], lens: list[int], queries: list[int], block_size: int) -> api.StepInputs:
    """Rows whose last `queries` of `lens` tokens are new."""
    positions = [p for n, q in zip(lens, queries, strict=True) for p in range(n - q, n)]
    rows = [row for row, q in enumerate(queries) for _ in range(q)]
    where = [tables[r][p // block_size] * block_size + p % block_size for r, p in zip(rows, positions, strict=True)]
    return api.StepInputs(
        block_tables=torch.tensor(tables, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        query_start_loc=torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32),
        slot_mapping=torch.tensor(where),
        positions=torch.tensor(positions),
        num_decode_rows=sum(q == 1 for q in queries),
        query_lens_host=tuple(queries),
        seq_lens_host=tuple(lens),
    )


def test_the_attention_example_is_attention(example: Any) -> None:
    torch.manual_seed(0)
    kv = api.KVSpec(num_kv_heads=2, head_size=8, dtype="float32")
    layer = api.AttentionLayerSpec(num_heads=4, num_kv_heads=2, head_size=8, scale=0.3)
    backend = plain_attention(example, kv, block_size=4)
    tables, lens = [[5, 2, 0], [1, 3, 0]], [7, 5]
    tokens = [(torch.randn(n, 4, 8), torch.randn(n, 2, 8), torch.randn(n, 2, 8)) for n in lens]
    # 6 and 2 tokens first; then, mixed, 1 (decode) and 3 (prefill) more.
    done = [0, 0]
    for upto in ([6, 2], lens):
        queries = [n - d for n, d in zip(upto, done, strict=True)]
        backend.fill(step(tables, upto, queries, 4))
        q, k, v = (torch.cat([t[i][d:n] for t, d, n in zip(tokens, done, upto, strict=True)]) for i in range(3))
        out = backend.forward(1, layer, q, k, v)
        for row, part in enumerate(out.split(queries)):
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(x[: upto[row]].transpose(0, 1)[None] for x in tokens[row]), is_causal=True, scale=0.3, enable_gqa=True
            )[0].transpose(0, 1)
            torch.testing.assert_close(part, expected[done[row] :])
        done = list(upto)


def test_the_model_example(example: Any) -> None:
    spec, model_class = example("bigram.py", "models", api.Model)
    assert spec.architectures == ("BigramForCausalLM",)
    with pytest.raises(api.ModelError, match="hidden_size is missing"):
        model_class.read_config({"vocab_size": 11})
    hf = {"vocab_size": 11, "hidden_size": 16, "max_position_embeddings": 12, "num_attention_heads": 2}
    built = build_model(model_class, hf, tp=SingleRank(), dtype=torch.float32, device="cpu")
    (group,) = kv_groups(built.attention_layers)
    backend = plain_attention(example, group[0], block_size=4)
    for index, layer in enumerate(group[1]):
        layer.bind(backend, index)
    for parameter in built.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    backend.fill(step([[1, 2, 3]], [5], [5], 4))
    with torch.inference_mode():
        hidden = built.model(torch.arange(5), torch.arange(5), api.ForwardBatch(num_tokens=5))
        logits = built.model.compute_logits(hidden[-1:])
    assert logits.shape == (1, 11)
    assert logits.isfinite().all()


def test_the_source_example(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source_class = example("shelf.py", "model_sources", api.ModelSource)
    monkeypatch.setenv("MODEL_SHELF", str(tmp_path))
    said: list[str] = []
    ctx = api.SourceContext(tmp_path / "cache", said.append)
    assert source_class().resolve("elsewhere", ctx) is None
    with pytest.raises(api.ModelSourceError, match="set MODEL_SHELF"):
        source_class().resolve("shelf:tiny", ctx)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert source_class().resolve("shelf:tiny", ctx) == tmp_path / "tiny"
    assert said == [f"taking {tmp_path / 'tiny'}"]


def test_the_drafter_example(example: Any) -> None:
    spec, drafter_class = example("follower.py", "drafters", api.HostDrafter)
    with pytest.raises(api.ParamsError, match="reach must be"):
        spec.params(reach=0)
    check_drafter(spec)
    ctx = api.DrafterContext(tokens=4, vocab_size=10, max_model_len=100, max_slots=2, device="cpu")
    state = drafter_class(ctx, spec.params()).start([1, 2, 3, 1], api.DraftSample(request="r", index=0, seed=0))
    assert state.draft(2) == [2, 3]
    state.feed([9])
    assert state.draft(2) == []


def test_the_command_example(tmp_path: Path) -> None:
    path = tmp_path / "hello.py"
    path.write_text(EXAMPLES["hello.py"])

    def nanoengine(*words: str) -> Result:
        return CliRunner().invoke(app, ["--plugin", str(path), *words])

    assert "Print a greeting." in nanoengine("--help").stdout
    assert nanoengine("hello", "you", "--times", "2").stdout == "hello you hello you\n"
    refused = nanoengine("hello", "a\nb")
    assert (refused.exit_code, refused.stderr) == (2, "error: the name cannot be printed\n")


def test_the_config_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None) -> None:
    for file, text in EXAMPLES.items():
        if file.startswith("nanoengine_acme/"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = discover(extra=[("acme", import_module("nanoengine_acme"))])
    (root,) = [root for root, origin in registry.config_roots if origin.plugin == "acme"]
    (found,) = package_root(root, "acme")
    assert (found.folder / "sampler" / "careful.yaml").is_file()


def test_the_quantisation_example(example: Any, tmp_path: Path) -> None:
    spec, quantization = example("int8_rows.py", "quantizations", api.Quantization)
    assert spec.online
    method = quantization.read(None).method(
        api.LayerInfo(name="a", kind="linear", shape=(4, 3), parts=(), parallel="replicated")
    )
    layer = api.WeightLayer(Builder(SingleRank(), torch.float32, torch.device("cpu")), "a")
    weight = api.ShardSpec(shape=(4, 3))
    method.create(layer, weight)
    values = torch.randn(4, 3)
    method.load(layer, "weight", weight.shards(0, 1)[0], values)
    x = torch.randn(2, 3)
    torch.testing.assert_close(method.apply(layer, x, None), x @ values.t(), atol=0.1, rtol=0.0)
