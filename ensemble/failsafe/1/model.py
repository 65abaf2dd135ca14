"""Triton model `failsafe`: the decoder's answer, or the fallback's. Only translates; see `tidewright.failsafe`."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from tidewright import stub
from tidewright.bridge.sampling_parameters import parse_sampling
from tidewright.bridge.tensors import decode_text, single
from tidewright.bridge.traces import origin_of
from tidewright.errors import InvalidRequestError, RequestError
from tidewright.failsafe.failsafe import Failsafe
from tidewright.failsafe.metrics import FAILSAFE_PREFIX, METRICS
from tidewright.failsafe.models import ModelReply, Order
from tidewright.failsafe.translator import Translator, translator
from tidewright.metrics import MetricsMirror
from tidewright.parent_death import end_within
from tidewright.resilience.errors import ModelError
from tidewright.schema import (
    CANCEL,
    CONTROL,
    FAILED,
    FAILSAFE_INPUTS,
    GENERATION_OUTPUTS,
    INPUT_IDS,
    MESSAGES,
    TEXT_INPUT,
    FinishReason,
    SamplingParams,
)
from tidewright.tracing.trace_context import PARAMETER, traceparent_of

log = logging.getLogger("tidewright")

_INPUT_NAMES = tuple(spec.name for spec in FAILSAFE_INPUTS)
_OUTPUT_NAMES = [spec.name for spec in GENERATION_OUTPUTS]
_PROMPTS = {TEXT_INPUT.name, MESSAGES.name, INPUT_IDS.name}
# Written anew for each attempt.
_REPLACED = {"sampling_parameters", CONTROL.name, *_PROMPTS}
KEEP = 5.0  # seconds


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = stub.begin(args)
        self._failsafe = Failsafe(settings, _control)
        self._translator = translator(settings)
        self._started = False
        self._metrics = MetricsMirror(METRICS, self._failsafe.samples, pb_utils.MetricFamily, FAILSAFE_PREFIX)
        self._metrics.start()

    def execute(self, requests: list) -> None:
        if not self._started:
            # Not in `initialize`: Triton allows no calls of other models before its end.
            self._started = True
            self._failsafe.start()
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except RequestError as error:
                self._failsafe.refused(error.reason)
                stub.send_error(sender, str(error), error.reason)
            except Exception:
                # A mistake of ours must not take the stub down: Triton does not restart it.
                log.exception("a request could not be taken")
                stub.send_error(sender, "internal error; see the server's log", "engine_failed")

    def is_ready(self) -> bool:
        """Asked by newer Tritons (not by 2.51) when someone asks whether the model is ready."""
        return not self._failsafe.trouble

    def finalize(self) -> None:
        self._metrics.stop()
        if self._started:
            self._failsafe.stop()
        end_within()

    def _take(self, request: object, sender: object) -> None:
        tensors = stub.inputs_of(request, _INPUT_NAMES)
        if (word := single(tensors, CONTROL.name)) is not None:
            self._obey(sender, decode_text(word, CONTROL.name))
            return
        options = single(tensors, "sampling_parameters")
        text = None if options is None else decode_text(options, "sampling_parameters")
        sampling = parse_sampling(text, request.parameters())  # type: ignore[attr-defined]
        client_id = request.request_id()  # type: ignore[attr-defined]
        streams = bool(single(tensors, "stream"))
        handle = _Request(request, sender, tensors, sampling, self._translator)
        self._failsafe.submit(handle, sampling, client_id, streams=streams)

    def _obey(self, sender: object, word: str) -> None:
        trouble = ""
        if word.startswith(CANCEL):
            client_id = word.removeprefix(CANCEL)
            if not client_id or not self._failsafe.cancel(client_id):
                trouble = f"no request with the id {client_id!r} is in flight; it may have ended"
        elif word == "health":
            trouble = self._failsafe.trouble
        else:
            stub.send_error(sender, f"control is {word!r}; it can be: health, {CANCEL}<request id>", "invalid")
            return
        if trouble:
            stub.send_final(sender, error=stub.error(trouble, "UNAVAILABLE"))
        else:
            stub.send_text(sender, b"ok")


class _Request:
    """One request, as `tidewright.failsafe.models.Request` says."""

    def __init__(
        self,
        request: object,
        sender: object,
        tensors: dict[str, np.ndarray],
        sampling: SamplingParams,
        translator: Translator | None,
    ) -> None:
        if MESSAGES.name in tensors and INPUT_IDS.name not in tensors:
            raise InvalidRequestError("failsafe takes messages only beside their input_ids; send them to generate")
        self._sender = sender
        context = request.trace().get_context()  # type: ignore[attr-defined]
        origin = origin_of(request.parameters(), context)  # type: ignore[attr-defined]
        # Not Triton's own trace, which is gone when `execute` has returned: Triton (2.51) crashes over its child.
        self._parameters = {PARAMETER: traceparent_of(origin.trace)} if origin else {}
        self._returns_reason = bool(single(tensors, "return_finish_reason"))
        self._options = {name: value for name, value in tensors.items() if name not in _REPLACED}
        self._prompts = {name: value for name, value in tensors.items() if name in _PROMPTS}
        self._translator = translator
        self.fits_fallback = translator is None or translator.can(tensors, sampling)
        self.continues = translator is None

    def generate(self, model: str, order: Order) -> Iterator[ModelReply]:
        if self._translator and model == "fallback":
            prompt = self._translator.prompt(self._prompts)
        elif INPUT_IDS.name in self._prompts:
            prompt = {INPUT_IDS.name: self._prompts[INPUT_IDS.name]}
        else:
            prompt = self._prompts
        inputs = [pb_utils.Tensor(name, value) for name, value in (prompt | self._options).items()]
        inputs.append(stub.text_tensor("sampling_parameters", [msgspec.json.encode(order.sampling)]))
        if order.resume_ids:
            inputs.append(pb_utils.Tensor("resume_ids", np.array(order.resume_ids, dtype=np.int32)))
        for response in _call(model, inputs, order.request_id, self._parameters):
            tensors = {tensor.name(): tensor for tensor in response.output_tensors()}  # type: ignore[attr-defined]
            if not tensors:
                continue
            token_ids = tensors["output_ids"].as_numpy().tolist()
            reasons = tensors["finish_reason"].as_numpy() if "finish_reason" in tensors else [b"None"]
            if reasons[0] == FAILED.encode():
                raise ModelError(tensors["text_output"].as_numpy()[0].decode())
            yield ModelReply(tensors, token_ids, all(reason != b"None" for reason in reasons))

    def send(self, reply: ModelReply, served_by: str, fallback_reason: str, names: bool) -> None:
        assert isinstance(reply.content, dict)
        tensors = [tensor for name, tensor in reply.content.items() if name != "finish_reason" or self._returns_reason]
        if names:
            tensors.append(stub.text_tensor("served_by", [served_by.encode()]))
            if fallback_reason:
                tensors.append(stub.text_tensor("fallback_reason", [fallback_reason.encode()]))
        if reply.final:
            stub.send_final(self._sender, output_tensors=tensors)
        else:
            self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))  # type: ignore[attr-defined]

    def fail(self, message: str, reason: FinishReason) -> None:
        stub.send_error(self._sender, message, reason)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())  # type: ignore[attr-defined]


class _Keeper:
    """Holds on to iterators of responses for a while after their end.

    A thread of Triton's stub (2.51) drops its own reference then, without Python's lock. Were it the last one, all
    responses would be freed beside running Python code: memory gets corrupted, after some thousand streams
    (triton-inference-server/server#7517).
    """

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[float, object]] = collections.deque()
        self._lock = threading.Lock()

    def keep(self, responses: object) -> None:
        now = time.monotonic()
        with self._lock:
            self._kept.append((now, responses))
            old = []
            while self._kept[0][0] < now - KEEP:
                old.append(self._kept.popleft())


_keeper = _Keeper()


def _control(model: str, word: str) -> str:
    answer = b""
    for response in _call(model, [stub.text_tensor(CONTROL.name, [word.encode()])]):
        for tensor in response.output_tensors():  # type: ignore[attr-defined]
            answer = tensor.as_numpy()[0]
    return answer.decode()


def _call(model: str, inputs: list, request_id: str = "", parameters: dict[str, str] | None = None) -> Iterator[object]:
    """All responses; raises ModelError once they are read, or Triton could not unload the model."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=_OUTPUT_NAMES,
        inputs=inputs,
        request_id=request_id,
        parameters=parameters or {},
    )
    error = ""
    try:
        responses = request.exec(decoupled=True)
    except pb_utils.TritonModelException as caught:
        raise ModelError(str(caught)) from None
    try:
        for response in responses:
            if response.has_error():
                error = error or response.error().message()
            elif not error:
                yield response
    except GeneratorExit:
        while next(responses, None) is not None:
            pass
        raise
    finally:
        _keeper.keep(responses)
    if error:
        raise ModelError(error)
