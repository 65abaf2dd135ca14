"""The models that this gateway serves. Each has its own tokenizer, queue and load, and its own view of the replicas.

So one that is overloaded, or that nobody has loaded, costs the others nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tidewright.resilience.degradation import Level
from tidewright.resilience.errors import ModelError
from tidewright.schema import AdapterStatus
from tidewright_gateway.admission.ladder import LoadLadder
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.admission.smaller_variant import SmallerVariant
from tidewright_gateway.openai.errors import MAX_SHOWN, ApiError, invalid
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.replicas.adapters import choices
from tidewright_gateway.replicas.failover import Failover
from tidewright_gateway.replicas.replica import Replica


@dataclass(frozen=True, eq=False)
class Model:
    name: str
    """In the API."""
    created: int
    """When it was prepared, in seconds since 1970."""
    prompts: Prompts
    failover: Failover
    queue: Queue
    ladder: LoadLadder

    def check_task(self, embeds: bool) -> None:
        """Raises ApiError: its replicas have another task (`tidewright serve --task`)."""
        tasks = {bool(size) for size in self.failover.embedding_sizes}
        if not tasks or embeds in tasks:
            return
        if embeds:
            message = "this server generates text; embeddings need one that runs with: tidewright serve --task embed"
        else:
            message = "this server computes embeddings (serve --task embed); use /v1/embeddings or /v1/score"
        raise ApiError(404, message, code="unsupported")


class Models:
    def __init__(self, models: Sequence[Model], smaller: SmallerVariant | None = None) -> None:
        """The first answers requests without a name."""
        self.first, self._smaller = models[0], smaller
        self._by_name = {model.name: model for model in models}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def smaller(self, model: Model) -> Model | None:
        """The variant that is to answer a new request for `model`, because of the load."""
        return self._smaller.of(model) if self._smaller else None

    async def find(self, name: str | None) -> tuple[Model, AdapterStatus | None]:
        """A model, and the LoRA adapter of it that is meant, if one is.

        Raises:
            ApiError: nothing has this name.
        """
        if name is None:
            return self.first, None
        if found := self._by_name.get(name):
            return found, None
        for model in self:
            if adapter := await model.failover.adapters.find(name):
                return model, adapter
        served = ", ".join(map(repr, self.names))
        message = f"there is no model {name[:MAX_SHOWN]!r} here; this gateway serves {served}"
        if loaded := self.adapters:
            message += f" and LoRA adapters {choices(loaded)}"
        raise ApiError(404, message, code="model_not_found", param="model")

    @property
    def adapters(self) -> dict[str, Model]:
        """The model of each LoRA adapter that is loaded."""
        return {name: model for model in self for name in model.failover.adapters.loaded}

    def base(self, name: str | None, field: str) -> Model:
        """The model that a command names in a field. Raises ApiError: no model has this name."""
        if name is None or name in self._by_name:
            return self.first if name is None else self._by_name[name]
        message = f"{field}: there is no model {name[:MAX_SHOWN]!r}; the models are {', '.join(self.names)}"
        raise invalid(message, field)

    async def start(self) -> None:
        """Checks each replica once, then keeps checking."""
        await asyncio.gather(*(model.failover.start() for model in self))

    async def stop(self) -> None:
        await asyncio.gather(*(model.failover.stop() for model in self))

    async def run_ladders(self) -> None:
        """Runs for ever."""
        smaller = [self._smaller.run()] if self._smaller else []
        await asyncio.gather(*smaller, *(model.ladder.run() for model in self))

    @property
    def max_model_len(self) -> int:
        """The longest context of all."""
        return max(model.failover.max_model_len for model in self)

    @property
    def trouble(self) -> str:
        """Why no model has a usable replica; empty if one has."""
        troubles = [model.failover.trouble for model in self]
        return "; ".join(troubles) if all(troubles) else ""

    @property
    def in_trouble(self) -> list[str]:
        """Names of those without a usable replica."""
        return [model.name for model in self if model.failover.trouble]

    @property
    def level(self) -> Level:
        """Of the model that is worst off."""
        return max(model.ladder.level for model in self)

    @property
    def num_running(self) -> int:
        return sum(model.queue.num_running for model in self)

    @property
    def num_waiting(self) -> int:
        return sum(model.queue.num_waiting for model in self)

    @property
    def num_usable(self) -> int:
        """Replicas that can take requests for one of the models."""
        able = (replica for model in self for replica in model.failover.replicas if replica.takes_requests)
        return len({replica.address for replica in able})

    @property
    def replicas(self) -> list[Replica]:
        """As each model sees them."""
        return [replica for model in self for replica in model.failover.replicas]

    def retry_budget(self) -> float:
        """Retries that may be made now."""
        now = time.monotonic()
        return sum(model.failover.retry_budget(now) for model in self)

    async def drain(self, address: str) -> None:
        """Ends a replica gently, with all of its models. Raises ModelError: it did not accept that."""
        seen = [(model, one) for model in self for one in model.failover.replicas if one.address == address]
        # Any of its decoders passes the word on, and one may not be loaded.
        seen.sort(key=lambda pair: not pair[1].takes_requests)
        for number, (model, replica) in enumerate(seen, 1):
            try:
                return await model.failover.drain(replica)
            except ModelError:
                if number == len(seen):
                    raise

    async def change(self, name: str, load: bool) -> None:
        """Loads or unloads a model on all replicas.

        Raises:
            ApiError: there is no such model, or not all replicas could do it; the message says which, and why.
        """
        model = self.base(name, "model")
        replicas = [one for one in model.failover.replicas if not (one.leaving or one.misfit)]
        if not replicas:
            raise ApiError(503, "no replica can be told now; try again later", code="not_ready", retry_after=1)

        async def tell(replica: Replica) -> str:
            try:
                await model.failover.change(replica, load)
            except ModelError as error:
                return f"{replica.address}: {error}"
            return ""

        if failed := [told for told in await asyncio.gather(*map(tell, replicas)) if told]:
            done = f"{len(replicas) - len(failed)} of {len(replicas)} replicas have {'' if load else 'un'}loaded it"
            raise ApiError(503, f"{done}; {'; '.join(failed)}", code="model_not_changed", may_retry=False)
