"""The Triton side of the bridge: `backend: "tidewright"` runs this in Triton's Python stub process.

Only translates between Triton's objects and `tidewright.bridge`; the model itself runs in the engine process.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from tidewright import stub
from tidewright.bridge.adapter_commands import AdapterCommands
from tidewright.bridge.bridge import Bridge
from tidewright.bridge.intake import Arrival, Intake
from tidewright.bridge.metrics import FALLBACK_PREFIX, METRICS, samples
from tidewright.bridge.request import GenerationRequest, OutputOptions, parse_request
from tidewright.bridge.response import Delta, Response
from tidewright.bridge.start_error import report_start_error
from tidewright.bridge.traces import BridgeTraces, origin_of
from tidewright.cache import find_prepared
from tidewright.engine.messages import TokenLogprob
from tidewright.errors import CancelledError, EngineUnavailableError, InvalidRequestError, RequestError
from tidewright.memory import ledger
from tidewright.metrics import PREFIX, MetricsMirror
from tidewright.onnx_export.manifest import load_manifest
from tidewright.parent_death import end_within
from tidewright.schema import (
    ATTEMPT,
    CANCEL,
    CONTROL,
    CONTROL_WORDS,
    DECODER_INPUTS,
    EMBEDDING,
    FAILED,
    LIMIT,
    LOAD_LORA,
    RESIZE,
    UNLOAD_LORA,
)
from tidewright.served_models import PARAMETER
from tidewright.tokenization import Tokenizer

log = logging.getLogger("tidewright")

_INPUT_NAMES = tuple(spec.name for spec in DECODER_INPUTS)


class NoFallbackError(ValueError):
    """The model `fallback` is loaded, and nothing says which model that is."""


class TritonPythonModel:
    """What Triton calls. Responses go out later, from the bridge's sender thread."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = stub.begin(args)
        try:
            is_fallback = stub.parameter(args, "engine") == "onnx"
            if is_fallback:
                if not settings.fallback:  # its server was told to load all models
                    raise NoFallbackError(
                        "no fallback is configured; load the other models only, or set TIDEWRIGHT_FALLBACK"
                    )
                model_dir, config = Path(settings.fallback), settings.fallback_engine_config
                load_manifest(model_dir)
            else:
                model_dir, config = find_prepared(settings.model), settings.engine_config
            self._tokenizer = Tokenizer(model_dir)
            self._name, self._version = args["model_name"], args["model_version"]
            self._traces = BridgeTraces(settings.otlp_endpoint) if settings.otlp_endpoint else None
            engine_config = config(model_dir)
            if not is_fallback:
                limit = ledger.limit_of(self._name)
                engine_config = msgspec.structs.replace(engine_config, kv_limit=limit)
            self._bridge = Bridge(settings, engine_config, self._tokenizer, self._is_loaded, self._traces)
            self._adapters = AdapterCommands(self._bridge, engine_config.adapter_folder, stub.served_names())
            limit = settings.max_running + settings.max_waiting
            self._intake = Intake(self._take, lambda arrival, error: self._refuse(arrival.sender, error), limit)
            self._bridge.start()
            if not is_fallback:
                self._adapters.load_at_start(settings.adapter_paths, settings.start_timeout)
            self._intake.start()
        except Exception as error:
            report_start_error(error, stub.parameter(args, PARAMETER))
            raise
        prefix = FALLBACK_PREFIX if is_fallback else PREFIX
        name = stub.parameter(args, PARAMETER)  # of a model beside the first, whose series stay as they are when alone
        labels = {"model": name} if name else {}
        self._metrics = MetricsMirror(METRICS, lambda: samples(self._bridge), pb_utils.MetricFamily, prefix, labels)
        self._metrics.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                if word := _control_word(request):
                    self._control(sender, word)
                    continue
                tensors = stub.inputs_of(request, _INPUT_NAMES)
                parameters = request.parameters()
                context = request.trace().get_context() if self._traces else None
                origin = origin_of(parameters, context)
                arrival = Arrival(tensors, parameters, request.request_id(), sender, origin)
                if arrival.is_quick:
                    self._take(arrival)
                else:
                    self._intake.put(arrival)
            except RequestError as error:
                self._refuse(sender, error)
            except Exception:
                # A mistake of ours must not take the stub down: Triton does not restart it.
                log.exception("a request could not be taken")
                self._refuse(sender, RequestError("internal error; see the server's log"))

    def _take(self, arrival: Arrival) -> None:
        """Check a request and hand it to the bridge, or refuse it. Never raises."""
        client_id = arrival.client_id
        try:
            if self._bridge.engine is None:
                raise EngineUnavailableError("the engine has not started")
            request = parse_request(arrival.tensors, arrival.parameters, self._tokenizer, self._bridge.engine)
            if arrival.cancelled:
                raise CancelledError("cancelled by its id")
            responder = _TritonResponder(arrival.sender, request, self._tokenizer, in_band=ATTEMPT in client_id)
            self._bridge.submit(request, responder, client_id, arrival.arrived_at, arrival.origin)
            if arrival.cancelled:  # meanwhile
                self._bridge.cancel(client_id)
        except RequestError as error:
            self._refuse(arrival.sender, error)
        except Exception:
            log.exception("a request could not be taken")
            self._refuse(arrival.sender, RequestError("internal error; see the server's log"))

    def is_ready(self) -> bool:
        """Asked by newer Tritons (not by 2.51) when someone asks whether the model is ready."""
        return not self._bridge.trouble

    def finalize(self) -> None:
        self._metrics.stop()
        self._intake.stop()
        self._bridge.stop()
        if self._traces:
            self._traces.stop()
        end_within()

    def _is_loaded(self) -> bool:
        return bool(pb_utils.is_model_ready(model_name=self._name, model_version=self._version))

    def _control(self, sender: object, word: str) -> None:
        if word.startswith(CANCEL):
            return self._cancel(sender, word.removeprefix(CANCEL))
        for change, resize in ((RESIZE, self._bridge.resize_cache), (LIMIT, self._bridge.limit_cache)):
            if word.startswith(change):
                resize(word.removeprefix(change))
                return self._bridge.reply(lambda: stub.send_text(sender, b"ok"))
        for command, run in ((LOAD_LORA, self._adapters.load), (UNLOAD_LORA, self._adapters.unload)):
            if word.startswith(command):
                return run(word.removeprefix(command), lambda error: self._answer(sender, error))
        if word not in CONTROL_WORDS:
            commands = (
                f"{CANCEL}<request id>",
                f"{RESIZE}<bytes of KV cache>",
                f"{LIMIT}<bytes of KV cache>",
                f"{LOAD_LORA}<JSON>",
                f"{UNLOAD_LORA}<JSON>",
            )
            known = ", ".join((*CONTROL_WORDS, *commands))
            raise InvalidRequestError(f"control is {word!r}; it can be: {known}")
        if word == "status":
            status = self._bridge.status
            active = status.active + self._intake.active
            status = msgspec.structs.replace(status, active=active, adapters=self._adapters.statuses)
            return self._bridge.reply(lambda: stub.send_text(sender, msgspec.json.encode(status)))
        if word == "list_lora":
            adapters = msgspec.json.encode(self._bridge.adapters)
            return self._bridge.reply(lambda: stub.send_text(sender, adapters))
        if word == "memory":
            account = msgspec.json.encode(msgspec.structs.asdict(self._bridge.engine_stats.memory))
            return self._bridge.reply(lambda: stub.send_text(sender, account))
        if word == "drain":
            self._bridge.drain()
        elif trouble := self._bridge.trouble:
            # Not `_refuse`: it is no request that failed.
            return self._bridge.reply(lambda: stub.send_final(sender, error=stub.error(trouble, "UNAVAILABLE")))
        self._bridge.reply(lambda: stub.send_text(sender, b"ok"))

    def _answer(self, sender: object, error: RequestError | None) -> None:
        """To a command about an adapter."""
        if error is None:
            self._bridge.reply(lambda: stub.send_text(sender, b"ok"))
        else:
            self._bridge.reply(lambda: stub.send_error(sender, str(error), error.reason))

    def _cancel(self, sender: object, client_id: str) -> None:
        if not client_id:
            raise InvalidRequestError(f"{CANCEL} must be followed by the id of a request")
        # In this order: what leaves the intake in between is with the bridge.
        if self._intake.cancel(client_id) + self._bridge.cancel(client_id):
            return self._bridge.reply(lambda: stub.send_text(sender, b"ok"))
        message = f"no request with the id {client_id!r} is in flight; it may have ended"
        self._bridge.reply(lambda: stub.send_final(sender, error=stub.error(message, "NOT_FOUND")))

    def _refuse(self, sender: object, error: RequestError) -> None:
        self._bridge.request_stats.finished(error.reason)
        self._bridge.reply(lambda: stub.send_error(sender, str(error), error.reason))


class _TritonResponder:
    """Sends one request's responses as Triton responses.

    Triton (2.51) frees what `is_cancelled` looks at together with the final response, and crashes when asked
    afterwards; so the two exclude each other, and after the end nothing is asked.
    """

    def __init__(
        self, sender: object, request: GenerationRequest, tokenizer: Tokenizer, *, in_band: bool = False
    ) -> None:
        """`in_band`: of an attempt of failsafe, see schema.ATTEMPT."""
        self._sender, self._in_band = sender, in_band
        self._returns = request.returns
        self._num_input_tokens = len(request.prompt_token_ids)
        self._tokenizer = tokenizer
        self._end_lock = threading.Lock()
        self._ended = False

    def send(self, response: Response, final: bool) -> None:
        returns = self._returns
        if final and self._in_band:
            returns = dataclasses.replace(returns, finish_reason=True)  # by it, failsafe knows the last response
        tensors = _output_tensors(response, returns, self._num_input_tokens, self._tokenizer)
        if final and returns.stop_reason:
            reasons = [msgspec.json.encode(delta.stop_reason) for delta in response.deltas]
            tensors.append(stub.text_tensor("stop_reason", reasons))
        if response.timings:
            tensors.append(stub.text_tensor("timings", [msgspec.json.encode(response.timings)]))
        if not final:
            self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))  # type: ignore[attr-defined]
            return
        with self._end_lock:
            self._ended = True
            stub.send_final(self._sender, output_tensors=tensors)

    def fail(self, error: RequestError) -> None:
        with self._end_lock:
            self._ended = True
            if self._in_band:
                tensors = [
                    stub.text_tensor("text_output", [f"{error} [{error.reason}]".encode()]),
                    pb_utils.Tensor("output_ids", np.array([], dtype=np.int32)),
                    stub.text_tensor("finish_reason", [FAILED.encode()]),
                ]
                stub.send_final(self._sender, output_tensors=tensors)
            else:
                stub.send_error(self._sender, str(error), error.reason)

    def is_cancelled(self) -> bool:
        if not self._end_lock.acquire(blocking=False):
            return False  # the end is being sent, which may never return
        try:
            return not self._ended and bool(self._sender.is_cancelled())  # type: ignore[attr-defined]
        finally:
            self._end_lock.release()


def _control_word(request: object) -> str:
    word = stub.inputs_of(request, [CONTROL.name]).get(CONTROL.name)
    return "" if word is None else word[0].decode(errors="replace")


def _output_tensors(response: Response, returns: OutputOptions, num_input_tokens: int, tokenizer: Tokenizer) -> list:
    """The tensors of one response, in the formats of Triton's vLLM backend: an element for each sequence."""
    deltas = response.deltas
    if deltas[0].embedding is not None:
        return _embedding_tensors(deltas[0], deltas[0].embedding, returns, num_input_tokens)
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    tensors = [
        stub.text_tensor("text_output", [delta.text.encode() for delta in deltas]),
        pb_utils.Tensor("output_ids", np.array(token_ids, dtype=np.int32)),
    ]
    if returns.finish_reason:
        tensors.append(stub.text_tensor("finish_reason", [str(delta.finish_reason).encode() for delta in deltas]))
    if returns.num_input_tokens:
        tensors.append(pb_utils.Tensor("num_input_tokens", np.array([num_input_tokens], dtype=np.uint32)))
    if returns.num_output_tokens or len(deltas) > 1:  # else nobody could tell whose output_ids are whose
        counts = np.array([len(delta.token_ids) for delta in deltas], dtype=np.uint32)
        tensors.append(pb_utils.Tensor("num_output_tokens", counts))
    if returns.logprobs and returns.null_logprobs:
        tensors.append(stub.text_tensor("logprobs", [b"null"] * len(deltas)))
    elif returns.logprobs:
        positions = [[_named(entries, tokenizer) for entries in delta.logprobs] for delta in deltas]
        tensors.append(stub.text_tensor("logprobs", [msgspec.json.encode(of_piece) for of_piece in positions]))
    if returns.cumulative_logprob:
        totals = np.array([delta.cumulative_logprob for delta in deltas], dtype=np.float32)
        tensors.append(pb_utils.Tensor("cumulative_logprob", totals))
    if response.prompt_logprobs is not None:
        of_prompt = [None, *(_named(entries, tokenizer) for entries in response.prompt_logprobs)]
        tensors.append(stub.text_tensor("prompt_logprobs", [msgspec.json.encode(of_prompt)]))
    if returns.num_cached_tokens and response.num_cached_tokens is not None:
        tensors.append(pb_utils.Tensor("num_cached_tokens", np.array([response.num_cached_tokens], dtype=np.uint32)))
    return tensors


def _embedding_tensors(delta: Delta, embedding: bytes, returns: OutputOptions, num_input_tokens: int) -> list:
    tensors = [pb_utils.Tensor(EMBEDDING.name, np.frombuffer(embedding, "<f4").astype(np.float32))]
    if returns.finish_reason:
        tensors.append(stub.text_tensor("finish_reason", [str(delta.finish_reason).encode()]))
    if returns.num_input_tokens:
        tensors.append(pb_utils.Tensor("num_input_tokens", np.array([num_input_tokens], dtype=np.uint32)))
    return tensors


def _named(entries: list[TokenLogprob], tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """Log-probabilities at one position, by token id. The chosen token comes first, and keeps its rank at a tie."""
    named: dict[str, dict[str, object]] = {}
    for entry in entries:
        text = tokenizer.token_text(entry.token_id)
        named.setdefault(str(entry.token_id), {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": text})
    return named
