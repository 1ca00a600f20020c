"""Engine options: the same names in Python (`LLM(...)`) and in YAML (`engine:`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.kernels.choice import KERNELS
from nanoengine.params.field_types import Bytes

_INT32, _INT64, _YEAR = 2**31 - 1, 2**63 - 1, 365 * 86_400.0
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "max_model_len": (1, 2**30),
    "max_num_seqs": (1, 2**16),
    "max_num_batched_tokens": (1, 2**22),
    "block_size": (1, 2**20),
    "num_gpu_blocks_override": (1, 2**50),
    "kv_cache_memory": (1, 2**50),
    "admission_reserve": (0, 2**16),
    "prompts_together": (0, 2**22),
    "max_n": (1, _INT32),
    "max_logprobs": (-1, _INT32),
    "seed": (-_INT64 - 1, _INT64),
    "tensor_parallel_size": (1, 2**10),
    "spare_slots": (0, 2**16),
    "chat_template_memory": (2**20, 2**40),
}
"""The lowest and the highest value of each option. Above, no device has the memory, or indices do not fit in int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsOptions:
    """How output is constrained.

    Attributes:
        backend: name of a grammar backend; "auto": the installed one of the highest preference.
        timeout: seconds that compiling a constraint may take.
        max_bytes: most bytes of a constraint: of a schema as JSON, of a grammar's text.
        reasoning: text or id of the token after which constraints begin, as "</think>"; None: at once.
        cache_size: most compiled constraints that are kept.
        workers: most threads that compile constraints.
    """

    backend: str = "auto"
    timeout: float = 10.0
    max_bytes: Bytes = 1 << 20
    reasoning: str | int | None = None
    cache_size: int = 128
    workers: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _YEAR:
            raise ConfigError(
                "engine.structured_outputs.timeout is in seconds and must be above 0, at most a year, not "
                f"{self.timeout}"
            )
        for name in ("max_bytes", "cache_size", "workers"):
            value = getattr(self, name)
            if not 1 <= value <= _INT32:
                raise ConfigError(f"engine.structured_outputs.{name} must be from 1 to {_INT32:,}, not {value:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engine runs. `None` means: chosen by the engine, from the model and the device.

    Attributes:
        dtype: "auto" (float32 on a CPU, the checkpoint's on a GPU), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        max_model_len: most tokens of prompt and output together; default: what the model supports.
        max_num_seqs: most requests that run at the same time.
        max_num_batched_tokens: most tokens of a step; default 2048 on a CPU, 8192 on a GPU.
        block_size: tokens in a KV block; default 16, or what the attention backend needs.
        gpu_memory_utilization: share of a GPU's total memory that this engine may use, no matter what other programs
            use; if less is free, it uses what is free.
        num_gpu_blocks_override: number of KV blocks, without regard to the memory.
        kv_cache_memory: bytes for the KV cache, also "1GB" or "512MiB"; default on a CPU: enough for max_num_seqs
            requests of max_model_len tokens, at most 4 GiB.
        enable_prefix_caching: reuse KV blocks of equal prefixes.
        scheduling_policy: name of a policy: "fcfs", "priority" (lower value first, then arrival), "fair" (clients get
            tokens by their weights), or that of a plugin.
        policy_options: the policy's own options, as {"weights": {"acme": 2}}.
        admission_reserve: KV blocks that stay free for each running request when another one is admitted. It gives
            fewer preemptions if blocks are short, and slightly smaller batches.
        prompts_together: where requests wait for a place, those that may take a free one enter together, once their
            prompts have so many tokens, as tokens of larger steps take less time each. They are held back for 8 steps
            at most, and while fewer than 8 places, and a 16th of max_num_seqs, are free. 0: none is held back; default
            1,024 for small models (hidden size up to 1,024) whose steps are graphs, else 0.
        quantization: "auto": the checkpoint's weights as they are, quantised ones by what reads their format; or the
            name of a quantisation, which may also quantise plain weights while they are loaded; or "none": plain
            weights only.
        kv_dtype: how K and V are stored: "auto", in the model's dtype; "fp8" or "int8", in a byte, with a scale for
            each head of each token.
        load_format: "auto", or "dummy" for random weights.
        max_n: highest `n`, the number of samples, that a request may have.
        max_logprobs: highest `logprobs` and `prompt_logprobs`, log-probs per position, that a request may have; -1: no
            limit, and a request may use -1, the whole vocabulary.
        seed: from which requests without a seed get theirs; also the seed of dummy weights.
        tensor_parallel_size: number of ranks that share each layer, each in its own process: rank r on GPU r; on CPUs
            the ranks share the threads.
        enable_expert_parallel: each rank has whole experts, instead of a part of the width of each expert.
        worker_start_timeout: seconds until all ranks must be ready, including loading and the first compilation.
        step_timeout: seconds after which a step counts as hanging.
        enforce_eager: never capture graphs.
        graph_mixed_steps: also run steps with prompt tokens as padded graphs; otherwise these run eagerly.
        lazy_graphs: capture a graph when a step first wants it, which takes that step 20 to 60 milliseconds longer;
            otherwise, and with tensor parallelism, all at the start.
        idle_captures: a server captures the others while it has no request.
        reuse_profile: a start with the model, options, GPU and versions of an earlier one takes the memory of the
            largest steps from it, and compiles nothing ahead; its notes are in the folder of Triton's cache.
        speculation: the drafter and its keys, as {"method": "ngram", "tokens": 4}, or its name alone;
            None: off.
        overlap: prepare step N+1 while step N runs.
        spare_slots: slots in addition to max_num_seqs: a request whose last token is in flight needs no row any more.
        fuse_kernels: layers use fused kernels: Triton's on a GPU, those in C on a CPU; off: plain torch.
        fuse_attention: with fuse_kernels: attention backends that can do so also normalise and rotate q and k, in one
            kernel.
        fuse_products: with fuse_kernels: products of 33 to 512 rows are kernels of our own, with norms and gates in
            them; those with a gate also beyond. GGUF blocks are operands of tensor cores; off: decoded in registers.
        kernels: single kernels and copies to turn on or off, as {"attention_codes": false}. Without one, another
            does its work: `nanoengine.kernels.choice` has their names.
        fuse_sampling: fuse the standard sampler operations (one sort for top-k, top-p and min-p).
        custom_all_reduce: small sums over GPUs are made through the memory of the other GPUs, read or written;
            otherwise all use NCCL.
        skip_tokenizer_init: load no tokenizer; requests and outputs have only token ids.
        chat_template_timeout: seconds that a chat template may take for one conversation.
        chat_template_memory: bytes that the process of a chat template may use in addition to its idle size.
        structured_outputs: how output is constrained to schemas and grammars: the keys of `StructuredOutputsOptions`.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    num_gpu_blocks_override: int | None = None
    kv_cache_memory: Bytes | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    admission_reserve: int = 0
    prompts_together: int | None = None
    quantization: str = "auto"
    kv_dtype: Literal["auto", "fp8", "int8"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    max_n: int = 64
    max_logprobs: int = 20
    seed: int = 0
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    worker_start_timeout: float = 600.0
    step_timeout: float = 60.0
    enforce_eager: bool = False
    graph_mixed_steps: bool = True
    lazy_graphs: bool = True
    idle_captures: bool = True
    reuse_profile: bool = True
    speculation: Mapping[str, Any] | None = None
    overlap: bool = True
    spare_slots: int = 8
    fuse_kernels: bool = True
    fuse_attention: bool = True
    fuse_products: bool = True
    kernels: Mapping[str, bool] = field(default_factory=dict)
    fuse_sampling: bool = True
    custom_all_reduce: bool = True
    skip_tokenizer_init: bool = False
    chat_template_timeout: float = 5.0
    chat_template_memory: Bytes = 512 << 20
    structured_outputs: StructuredOutputsOptions = field(default_factory=StructuredOutputsOptions)

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and value < low:
                rule = f"at least {low:,}" if low else "0 or more"
                raise ConfigError(f"engine.{name} must be {rule}, not {value}")
            if value is not None and value > high:
                raise ConfigError(f"engine.{name} must be at most {high:,}, not {value:,}")
        for name in ("worker_start_timeout", "step_timeout", "chat_template_timeout"):
            seconds = getattr(self, name)
            if not 0 < seconds <= _YEAR:
                rule = "at most a year" if seconds > _YEAR else "above 0"
                raise ConfigError(f"engine.{name} is in seconds and must be {rule}, not {seconds}")
        for name in self.kernels:
            if name not in KERNELS:
                raise ConfigError(f"engine.kernels: no kernel is called {name!r}; {nearest(name, KERNELS)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"engine.gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if not (self.device in ("auto", "cpu", "cuda") or self.device.removeprefix("cuda:").isdigit()):
            raise ConfigError(f"engine.device must be auto, cpu, cuda or cuda:N, not {self.device!r}")
