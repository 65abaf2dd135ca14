"""What the API takes, as OpenAI's clients send it, with the extensions that other engines have as well.

Each field has an effect; a field that would have none is refused by name. Ranges are those of `SamplingParams`, which
checks them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from tidewright.schema import SamplingParams
from tidewright_gateway.openai.errors import invalid

Number = Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictInt
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""Of many wrong items, the first is told; each one's error would cost more than all the rest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Body(_Strict):
    """Of a request; `parsing.parse` makes it."""

    model: StrictStr | None = None


class StreamOptions(_Strict):
    include_usage: StrictBool = False
    """A last event before the end tells the tokens used."""


class JsonSchema(_Strict):
    name: StrictStr = ""
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """The JSON schema that the answer follows."""
    strict: StrictBool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationBody(Body, ABC):
    """What both endpoints share."""

    model: StrictStr
    """Its name, as /v1/models tells it."""
    max_tokens: StrictInt | None = None
    """Longest answer in tokens; without it a chat's may fill the context, a completion's has 16."""
    temperature: Number | None = None
    """0 takes the likeliest token each time; 1, the default, samples as the model says."""
    top_p: Number | None = None
    """Sample from the likeliest tokens that together have this probability."""
    n: StrictInt | None = None
    """Answers to each prompt; with a seed, each further one has the next seed."""
    stop: StrictStr | Many[StrictStr] | None = None
    """The answer ends before any of these texts."""
    seed: StrictInt | None = None
    """Makes sampling repeatable."""
    presence_penalty: Number | None = None
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: Number | None = None
    """The same, for each time that it has them."""
    logit_bias: dict[StrictStr, Number] | None = None
    """Token ids, and what is added to their logits."""
    stream: StrictBool | None = None
    """Answer with server-sent events as tokens come."""
    stream_options: StreamOptions | None = None
    """Only with stream: true."""
    response_format: ResponseFormat | None = None
    """JSON, or JSON of a schema."""
    user: StrictStr | None = None
    """Whom the request is made for: has limits of its own within the key's, and shares no KV cache with others."""

    top_k: StrictInt | None = None
    """Sample from so many of the likeliest tokens; 0 is all."""
    min_p: Number | None = None
    """Leave out tokens less likely than this times the likeliest."""
    repetition_penalty: Number | None = None
    """Divides the logits of tokens that prompt or answer have."""
    min_tokens: StrictInt | None = None
    """No end before so many tokens."""
    stop_token_ids: Many[StrictInt] | None = None
    """The answer ends at any of these tokens."""
    ignore_eos: StrictBool | None = None
    """The model's own end does not end the answer."""
    bad_words: Many[StrictStr] | None = None
    """Texts that the answer does not have."""
    guided_json: dict[str, Any] | StrictStr | None = None
    """A JSON schema that the answer follows."""
    guided_regex: StrictStr | None = None
    """A regular expression that the answer matches."""
    guided_grammar: StrictStr | None = None
    """A Lark grammar that the answer follows."""
    guided_choice: Many[StrictStr] | None = None
    """The answer is one of these."""
    priority: StrictInt | None = None
    """Lower goes first when requests wait; added to the key's own. Only admins may ask for less than 0."""
    timeout: Number | None = None
    """Seconds; what there is by then is the answer."""
    cache_salt: StrictStr | None = None
    """Of one key and user, requests share a KV cache only with those of the same salt."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Top log-probabilities at each token; None if none are asked for."""

    names_of_ours: ClassVar[Mapping[str, str]] = {}
    """What this API calls a sampling parameter that it names otherwise."""

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that it asks for; None if it says nothing."""
        return self.max_tokens

    def sampling(self) -> SamplingParams:
        """With the defaults of completions.

        Raises:
            ApiError: a value is out of its range.
        """
        fields = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.asked_tokens is not None:
            fields["max_tokens"] = self.asked_tokens
        if (logprobs := self.num_logprobs()) is not None:
            fields["logprobs"] = logprobs
        if (schema := self._schema()) is not None:
            if "guided_json" in fields:
                raise invalid("response_format and guided_json both say what the answer is; send one", "guided_json")
            fields["guided_json"] = schema
        try:
            return msgspec.convert(fields, SamplingParams, strict=False)
        except OverflowError:  # msgspec's, for some integers of more than 64 bits
            raise invalid("a number is too large") from None
        except msgspec.ValidationError as error:
            message, _, place = str(error).partition(" - at `$.")
            param = place.rstrip("`").split("[")[0] or None
            param = self.names_of_ours.get(param or "", param)
            raise invalid(f"{param}: {message}" if param else message, param) from None

    def _schema(self) -> dict[str, Any] | None:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return {"type": "object"}
        if asked.json_schema is None:
            raise invalid("response_format of type json_schema needs json_schema", "response_format.json_schema")
        return asked.json_schema.schema_


# Each of n choices is a generation of its own.
_SAMPLING = [name for name in SamplingParams.__struct_fields__ if name in GenerationBody.model_fields and name != "n"]


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class Message(_Strict):
    """Fields that answers of this API have, and their empty values, may come back as history."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Many[TextPart] | None = None
    """May be null or missing in an assistant's message only."""
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    """Empty: tool calls are not supported."""
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} needs content")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationBody):
    names_of_ours = {"logprobs": "top_logprobs"}

    messages: Many[Message] = Field(min_length=1)
    """The chat so far."""
    max_completion_tokens: StrictInt | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: StrictBool | None = None
    """Tell the log-probability of each token."""
    top_logprobs: StrictInt | None = None
    """And those of so many of the likeliest."""

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> SamplingParams:
        if self.asked_tokens is not None and self.max_tokens not in (None, self.asked_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        return super().sampling()


class CompletionRequest(GenerationBody):
    prompt: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    """Text or token ids, or a list of either."""
    logprobs: StrictInt | None = None
    """Tell the log-probability of each token, and of so many of the likeliest."""
    echo: StrictBool | None = None
    """Put the prompt before the answer."""
    best_of: StrictInt | None = None
    """Refused unless it is n."""

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling(self) -> SamplingParams:
        if self.best_of not in (None, self.n or 1):
            raise invalid("best_of other than n is not supported; ask for n and choose", "best_of")
        if self.echo and self.logprobs is not None:
            raise invalid("echo with logprobs is not supported; send one of them", "echo")
        return super().sampling()

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TokenizeRequest(Body):
    prompt: StrictStr | None = None
    messages: Many[Message] | None = None


class DetokenizeRequest(Body):
    tokens: Many[StrictInt]
