"""What the bridge and the engine process say to each other: msgpack structs over one local socket.

Bridge to engine: one `Configure`, one `Begin`, then `Submit`, `Abort`, `ResizeCache`, `LimitCache`, `LoadAdapter`,
`UnloadAdapter`, `Shutdown`.
Engine to bridge: `Ready`, then `StepOutputs`, `AdapterChanged` and `Heartbeat`; at any time `Failed`, as the last.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import msgspec

from tidewright.address import MAX_PORT, host_and_port
from tidewright.memory.account import MemoryAccount
from tidewright.schema import FinishReason, Pooling, SamplingParams, Task

AsyncScheduling = Literal["auto", "on", "off"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs to know; made from `tidewright.config.Settings`."""

    model_dir: str
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one
    dtype: str = "bfloat16"  # "bfloat16", "float16", "float32"
    kv_cache_dtype: str = "auto"  # "fp8", "int8", or as dtype; "auto" is dtype
    quantization: str = "auto"  # as tidewright.quantization.choice reads it
    quantize_head: str = "int8"  # and the embedding; "same" as the layers, or "keep"
    threads: int = 0  # of each rank; 0: as many as it can keep busy (devices/cpu/step_threads.py)
    niceness: int = 0  # of the process; 10 gets a tenth of a core that another wants as well
    attention: str = "auto"
    block_size: int = 16  # tokens a block
    kv_cache_memory: str = "auto"  # as tidewright.kv_cache.budget reads it
    kv_cache_share: float = 1.0  # of it, for this engine; other models of the server have the rest
    memory_share: float = 1.0  # that was taken of the two, by distributed/placement.py
    kv_limit: int = 0  # bytes that the KV cache may have at first, by memory/ledger.py; 0: what its share pays for
    memory_budget: str = "auto"  # of all that the engine takes, as tidewright.kv_cache.budget reads it
    replayed_tokens: int = 0  # this and the next: as `Begin` says
    num_blocks: int = 0
    most_blocks: int = 0
    wished_blocks: int = 0
    first_max_model_len: int = 0
    max_model_len: int = 0  # tokens; 0: the model's own limit
    max_batched_tokens: int = 2048  # token budget of one step
    prefill_step_time: float = 0.25  # seconds of a step that computes prompts beside running streams, about; 0: any
    ttft_target: float = 0.0  # seconds from arrival to the first token; 0: none
    tpot_target: float = 0.0  # seconds between two tokens of a stream; it replaces prefill_step_time; 0: none
    class_targets: str = ""  # of priorities, as tidewright.engine.targets reads them
    max_running: int = 64  # sequences in one step
    max_waiting: int = 512  # requests beyond those that run; one more is refused
    prefix_caching: bool = True
    speculative_tokens: int = 0  # guessed in a step, at most; 0: no speculative decoding
    async_scheduling: AsyncScheduling = "auto"  # a step is planned while the device computes the one before
    heartbeat_interval: float = 0.5  # seconds
    heartbeat_timeout: float = 30.0  # seconds after which the bridge takes the engine for dead
    start_timeout: float = 120.0  # seconds
    tensor_parallel_size: int = 1  # ranks, this engine being rank 0
    nodes: int = 1  # hosts, with equally many ranks each; rank 0 is on the first
    rendezvous: str = ""  # HOST:PORT where ranks come to; empty: a free port of the loopback
    rendezvous_secret_file: str = ""  # of a secret that ranks must know; empty: none
    standby: bool = True  # a next engine gets ready as soon as one is up
    is_onnx: bool = False  # model_dir holds an exported model
    max_output_tokens: int = 0  # the bridge asks for no more, see `Ready`
    task: Task = "generate"  # "embed": a request ends after its prompt, with the embedding
    pooling: Pooling = "last"
    normalize: bool = True  # embeddings have length 1
    adapter_folder: str = ""  # LoRA adapters are loaded from below it, and from nowhere else; empty: LoRA is off
    max_adapters: int = 8  # LoRA adapters that sequences of one step may use
    max_lora_rank: int = 64  # of an adapter
    adapter_memory: str = "1GiB"  # of the host, for all adapters, as tidewright.kv_cache.budget reads it

    @property
    def cache_format(self) -> str:
        """Names the number format of the KV cache; "auto" is resolved."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def local_ranks(self) -> int:
        """Ranks on each host."""
        return self.tensor_parallel_size // self.nodes

    @property
    def rendezvous_address(self) -> tuple[str, int]:
        return parse_rendezvous(self.rendezvous) if self.rendezvous else ("127.0.0.1", 0)


def parse_rendezvous(text: str) -> tuple[str, int]:
    """Raises ValueError: it is not HOST:PORT, or not one that others can come to."""
    with contextlib.suppress(ValueError):  # as UnicodeError is
        host, port = host_and_port(text)
        if host != "0.0.0.0" and ":" not in host:
            host.encode("idna")  # as looking it up will
            return host, port
    raise ValueError(
        f"rendezvous is {text!r}, but must be HOST:PORT, an address of rank 0's host that the others reach, and a port "
        f"from 1 to {MAX_PORT}"
    )


class Configure(msgspec.Struct, frozen=True, tag="configure", array_like=True):
    config: EngineConfig


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """Load the model. Until then the process has imported what it needs, and stands by in case another dies."""

    replayed_tokens: int = 0  # of the longest request that will come again, at its end
    num_blocks: int = 0  # of the KV cache, as the first engine counted them or `ResizeCache` says; 0: this is the first
    most_blocks: int = 0  # that it may have
    wished_blocks: int = 0  # that it should not exceed, as `ResizeCache` says; 0: nobody said anything
    first_max_model_len: int = 0  # tokens that the first engine's pool let a request have: no later one takes more


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """A validated request. `sampling.seed` is always set; `sampling.n` has no meaning here: each is its own request."""

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    deadline: float | None = None  # on time.monotonic(), which is one clock for all processes of a host
    bad_words_ids: list[list[int]] = []
    output_token_ids: list[int] = []  # what an engine that died had generated already
    trace_id: str = ""  # for logs
    adapter: str = ""  # name of the LoRA adapter; empty: the base model
    accepted_before: bool = False  # an earlier engine had it, or the bridge held it: no lack of room refuses it now


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """Stop a request without a further output; unknown ids are ignored (it may just have ended)."""

    request_id: int


class LimitCache(msgspec.Struct, frozen=True, tag="limit_cache", array_like=True):
    """The KV cache may have so many blocks from now on, and the budget changes with it: other models have the rest."""

    most_blocks: int


class ResizeCache(msgspec.Struct, frozen=True, tag="resize_cache", array_like=True):
    """The KV cache gets so many blocks between two steps, within the bounds of `MemoryAccount`. Requests go on."""

    num_blocks: int


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter", array_like=True):
    """Answered by `AdapterChanged`. Requests for the adapter that come behind it wait until it is loaded."""

    name: str
    path: str  # a folder in Hugging Face PEFT format, below `adapter_folder`
    digest: str = ""  # of its files, if an engine before this one had it: they must be the same


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter", array_like=True):
    """No request gets the adapter from here on; when none has it any longer, it goes, as `AdapterChanged` says."""

    name: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    pass


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    pid: int
    device: str
    dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    vocab_size: int
    load_seconds: float
    max_output_tokens: int = 0  # 0: as many as a request asks for
    eos_ids: list[int] = []
    embedding_size: int = 0  # numbers; 0: the engine generates text
    memory: MemoryAccount = MemoryAccount()


class AdapterChanged(msgspec.Struct, frozen=True, tag="adapter", array_like=True):
    """What came of `LoadAdapter` or `UnloadAdapter`."""

    name: str
    loaded: bool  # requests can have it now
    error: str = ""  # why it could not be loaded, for the caller
    rank: int = 0  # the highest of its matrices
    bytes: int = 0  # that it takes in all ranks' memory
    digest: str = ""  # of its files


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """The engine can't start, or can't go on; `message` is one line that says why and, if it can, what to change."""

    message: str
    step_tokens: int = 0  # memory did not suffice for a step: the next engine's must not have more; 0: it was not that


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token


class StepTimes(msgspec.Struct, frozen=True, array_like=True):
    """What of a request's times is news, on time.monotonic(). 0: told before."""

    began: float = 0.0  # the first step that it was part of
    chunks: int = 0  # steps up to its first token
    first_token: float = 0.0
    preempted: list[float] = []


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. `logprobs[i]` is of `token_ids[i]`: the chosen token first, then the top n."""

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[list[TokenLogprob]] | None = None
    # With the first tokens: of prompt tokens 1, 2, …, if asked for.
    prompt_logprobs: list[list[TokenLogprob]] | None = None
    cached_tokens: int = 0  # with the first tokens: prompt tokens that the prefix cache had
    message: str = ""  # says more about a finish_reason, for the caller
    queued_seconds: float = 0.0  # with the first tokens: from `Submit` to the first step that it was part of
    embedding: bytes | None = None  # of the prompt: little-endian float32
    times: StepTimes | None = None  # with the first tokens, and with those after a preemption


class StepOutputs(msgspec.Struct, frozen=True, tag="step", array_like=True):
    outputs: list[SequenceOutput]


# Parts of a step whose seconds EngineStats counts, as `<phase>_seconds`.
STEP_PHASES = ("schedule", "agree", "forward", "sample", "send")


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges at one moment, and counters since the engine started."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    # Prompt tokens looked up in the prefix cache, found there, and cached blocks that were given to others.
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_evictions: int = 0
    blocks_cached: int = 0  # free, but their content can still be found
    # Slots of running sequences' blocks that hold no token.
    slots_unused: int = 0
    # Speculative decoding: tokens guessed, and guesses that were right.
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    step_tokens: int = 0  # that a step may compute, at most: fewer once one ran out of memory
    steps_out_of_memory: int = 0  # each computed anew, in smaller steps
    may_run: int = 0  # sequences: max_running, or fewer to keep tpot_target
    # Requests whose first token was expected too late.
    refused_by_timeout: int = 0
    refused_by_target: int = 0
    # Seconds spent in all steps.
    schedule_seconds: float = 0.0
    agree_seconds: float = 0.0  # telling the other ranks what a step depends on
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    send_seconds: float = 0.0
    memory: MemoryAccount = MemoryAccount()
    cache_resizes: int = 0
    # Bytes that were taken back, by memory.reclaim.STAGES.
    reclaimed: dict[str, int] = {}

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that requests use."""
        return 1 - self.blocks_free / self.blocks_total if self.blocks_total else 0.0


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", array_like=True):
    """Sent every `heartbeat_interval` while the engine's loop turns, busy or idle."""

    stats: EngineStats


ToEngine = Configure | Begin | Submit | Abort | LimitCache | ResizeCache | LoadAdapter | UnloadAdapter | Shutdown
ToBridge = Ready | Failed | StepOutputs | AdapterChanged | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_bridge = msgspec.msgpack.Decoder(ToBridge).decode
