"""Answers in OpenAI's two formats, whole and in pieces. No I/O; a piece costs microseconds, as there are many."""

from __future__ import annotations

import functools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tidewright_gateway.openai.offsets import Offsets
from tidewright_gateway.replicas.triton import Reply


@dataclass
class Choice:
    """One generation's output so far."""

    index: int
    keeps_logprobs: bool = False
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    served_by: str = "decoder"

    def take(self, reply: Reply) -> list[dict[str, Any]]:
        """Adds a reply; returns its log-probabilities, a position each: `{id: {logprob, rank, decoded_token}}`."""
        self.text += reply.text
        self.num_tokens += len(reply.token_ids)
        self.finish_reason, self.served_by = reply.finish_reason, reply.served_by
        positions: list[dict[str, Any]] = msgspec.json.decode(reply.logprobs) if reply.logprobs else []
        if self.keeps_logprobs:
            self.logprobs += positions
        return positions


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int

    def json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Answer(ABC):
    """What all parts of one answer share."""

    prefix = ""
    whole_object = piece_object = ""

    def __init__(
        self,
        request_id: str,
        model: str,
        num_logprobs: int | None,
        with_usage: bool,
        echoes: Sequence[str],
        offsets: Callable[[int], Offsets],
    ) -> None:
        """
        Args:
            num_logprobs: most likely tokens to tell at each position; None for no log-probabilities.
            echoes: for each choice what is put before its text; empty if that was not asked for.
            offsets: makes those of a choice.
        """
        self._offsets = functools.cache(offsets)
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._num_logprobs, self._with_usage, self._echoes = num_logprobs, with_usage, echoes
        self._served_by = "decoder"

    def whole(self, choices: Sequence[Choice], usage: Usage, limited_by: str | None = None) -> bytes:
        """`limited_by`: the limit that cut it short."""
        models = {choice.served_by for choice in choices}
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole_object,
                "choices": [self._whole_choice(choice) for choice in choices],
                "usage": usage.json(),
                "served_by": "fallback" if "fallback" in models else "decoder",
                **({"limited_by": limited_by} if limited_by else {}),
            }
        )

    def piece(
        self, choice: Choice, reply: Reply, positions: list[dict[str, Any]], limited_by: str | None = None
    ) -> bytes:
        """For a reply that `choice` has taken."""
        if choice.served_by == "fallback":
            self._served_by = "fallback"
        parts = [self._piece_choice(choice, reply, positions)]
        return self._event(parts, served_by=choice.served_by, limited_by=limited_by if reply.finish_reason else None)

    def opening(self, index: int) -> bytes:
        """What a choice begins with, if anything."""
        return b""

    def usage(self, usage: Usage) -> bytes:
        """The event before the end, if it was asked for."""
        return self._event([], usage.json(), self._served_by) if self._with_usage else b""

    def _event(
        self,
        choices: list[dict[str, Any]],
        usage: dict[str, int] | None = None,
        served_by: str = "decoder",
        limited_by: str | None = None,
    ) -> bytes:
        piece: dict[str, Any] = {**self._head, "object": self.piece_object, "choices": choices, "served_by": served_by}
        if limited_by:
            piece["limited_by"] = limited_by
        if self._with_usage:
            piece["usage"] = usage
        return event(msgspec.json.encode(piece))

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _piece_choice(self, choice: Choice, reply: Reply, positions: list[dict[str, Any]]) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _piece_choice(self, choice: Choice, reply: Reply, positions: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": {"content": reply.text} if reply.text or reply.token_ids else {},
            "logprobs": self._logprobs(positions),
            "finish_reason": reply.finish_reason,
        }

    def _logprobs(self, positions: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self._num_logprobs is None:
            return None
        content = []
        for position in positions:
            chosen = _chat_entry(next(iter(position.values())))
            ranked = sorted(position.values(), key=lambda entry: entry["rank"])[: self._num_logprobs]
            content.append({**chosen, "top_logprobs": [_chat_entry(entry) for entry in ranked]})
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def opening(self, index: int) -> bytes:
        if not self._echoes:
            return b""
        return self._event([{"index": index, "text": self._echoes[index], "logprobs": None, "finish_reason": None}])

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": (self._echoes[choice.index] if self._echoes else "") + choice.text,
            "logprobs": self._logprobs(choice, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _piece_choice(self, choice: Choice, reply: Reply, positions: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": reply.text,
            "logprobs": self._logprobs(choice, positions),
            "finish_reason": reply.finish_reason,
        }

    def _logprobs(self, choice: Choice, positions: list[dict[str, Any]]) -> dict[str, Any] | None:
        """`positions`: those that `choice` has taken, or taken last."""
        if self._num_logprobs is None:
            return None
        chosen = [next(iter(position.items())) for position in positions]
        # No text follows what has ended, also where tokens of a stop string were cut off.
        end = len(choice.text) if choice.finish_reason else sys.maxsize
        offsets = self._offsets(choice.index)
        return {
            "tokens": [entry["decoded_token"] for _, entry in chosen],
            "token_logprobs": [entry["logprob"] for _, entry in chosen],
            "top_logprobs": [_by_text(position) for position in positions] if self._num_logprobs else None,
            "text_offset": [min(offsets.next(int(id), entry["decoded_token"]), end) for id, entry in chosen],
        }


def _by_text(position: dict[str, Any]) -> dict[str, float]:
    """Two tokens can have the same text: the less likely one is named by its id, as vLLM does."""
    found: dict[str, float] = {}
    for id, entry in sorted(position.items(), key=lambda item: item[1]["rank"]):
        text = entry["decoded_token"]
        found[f"token_id:{id}" if text in found else text] = entry["logprob"]
    return found


def _chat_entry(entry: dict[str, Any]) -> dict[str, Any]:
    token = entry["decoded_token"]
    # A part of a character has no text of its own, and its bytes are not told.
    raw = None if "\ufffd" in token else list(token.encode())
    return {"token": token, "logprob": entry["logprob"], "bytes": raw}


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")
