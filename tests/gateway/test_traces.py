"""Traces of a real gateway before replicas that echo: refused, failed, moved, fallen back; collectors that are down."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from helpers.otlp import OtlpReceiver, ReceivedSpan
from tidewright.tracing.catalogue import ATTRIBUTES, EVENTS, SPANS
from tidewright_gateway.auth.callers import Limits, Role
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import open_store

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DOWN = "the engine is not available (killed) [engine_failed]"
PARENT = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[EchoReplica]]:
    with EchoReplica() as one, EchoReplica() as other:
        yield [one, other]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    file, found = tmp_path_factory.mktemp("keys") / "keys.yaml", {}
    store = open_store(str(file))
    for name, limits in {"plain": Limits(), "slow": Limits(requests_per_second=0.01)}.items():
        found[name], hashed = make_key(name)
        entry = KeyEntry(name, (hashed,), Role.USE, limits)
        store.change(name, lambda _, entry=entry: entry)
    return file, found


@pytest.fixture(scope="module")
def gateway(
    model_dir: Path, receiver: OtlpReceiver, replicas: list[EchoReplica], keys: tuple[Path, dict[str, str]]
) -> Iterator[RunningGateway]:
    options = {
        "otlp_endpoint": receiver.url,
        "trace_callers": True,
        "keys": keys[0],
        "fallback": True,
        "routing": "round_robin",
        "retry_base_delay": 0.01,
        "breaker_consecutive_failures": 1000,
        "breaker_failure_rate": 1.0,
    }
    with RunningGateway(model_dir, *replicas, **options) as running:
        yield running


class Asking:
    """`ask` sends a request whose trace is sampled or not, and returns its answer."""

    def __init__(self, gateway: RunningGateway, receiver: OtlpReceiver, keys: dict[str, str]) -> None:
        self.gateway, self.receiver, self._keys, self._number = gateway, receiver, keys, int(time.time() * 1e6)

    def ask(self, path: str = COMPLETIONS, sampled: bool = True, key: str = "plain", **body: object) -> httpx.Response:
        self._number += 1
        headers = {
            "traceparent": f"00-{self._number:032x}-{PARENT}-0{sampled:d}",
            "Authorization": f"Bearer {self._keys[key]}",
        }
        body = {"prompt": "Hi", "max_tokens": 4, **body}
        answer = self.gateway.post(path, body, headers=headers)
        assert answer.headers["X-Trace-Id"] == f"{self._number:032x}"
        return answer

    def spans(self, answer: httpx.Response) -> list[ReceivedSpan]:
        """All of its trace; they leave the gateway together."""
        trace_id = answer.headers["X-Trace-Id"]
        found = self.receiver.wait(lambda traces: traces.of(trace_id))
        check(found)
        return found

    def kept(self, *answers: httpx.Response) -> list[bool]:
        """Whether each was; asks for one more, which leaves behind them all."""
        self.spans(self.ask())
        return [bool(self.receiver.traces.of(answer.headers["X-Trace-Id"])) for answer in answers]


@pytest.fixture
def asking(gateway: RunningGateway, receiver: OtlpReceiver, replicas: list[EchoReplica], keys: tuple) -> Asking:
    for replica in replicas:
        replica.errors.clear()
        replica.pause = 0.0
    return Asking(gateway, receiver, keys[1])


def check(spans: list[ReceivedSpan]) -> None:
    """What holds for each trace: one root, all below it, within its time, and nothing that is not documented."""
    by_id = {span.span_id: span for span in spans}
    (root,) = [span for span in spans if span.parent_id not in by_id]
    assert root.parent_id in (PARENT, "")
    assert len(by_id) == len(spans)
    for span in spans:
        assert span is root or span.name in SPANS, span
        assert span.attributes.keys() <= ATTRIBUTES.keys(), span
        assert set(span.events) <= EVENTS.keys(), span
        assert root.began <= span.began <= span.ended <= root.ended, span


def names(spans: list[ReceivedSpan]) -> list[str]:
    return [span.name for span in sorted(spans, key=lambda span: span.began)]


def one(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def attempts(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    return sorted((span for span in spans if span.name == "attempt"), key=lambda span: span.began)


def test_a_request_from_its_arrival_to_its_end(asking: Asking, replicas: list[EchoReplica]) -> None:
    answer = asking.ask(CHAT, messages=[{"role": "user", "content": "Hi"}], prompt=None, temperature=0.5)
    spans = asking.spans(answer)
    assert names(spans) == [f"POST {CHAT}", "admit", "tokenize", "queue", "attempt", "stream"]
    root = one(spans, f"POST {CHAT}")
    assert {span.parent_id for span in spans if span is not root} == {root.span_id}
    usage = answer.json()["usage"]
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "tidewright.request_id": answer.headers["X-Request-Id"],
        "tidewright.key_id": "plain",
        "tidewright.kept_because": "sampled",
        "tidewright.served_by": "decoder",
        "tidewright.cache": "BYPASS",
        "gen_ai.provider.name": "tidewright",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smollm2-135m",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert (root.kind, root.failed, root.events) == (
        2,
        False,
        ["authenticated", "reserved", "tokens_reserved", "settled"],
    )
    attempt = one(spans, "attempt")
    assert attempt.kind == 3
    told = next(told for replica in replicas for told in replica.metadata if root.trace_id in str(told))
    assert told["traceparent"] == f"00-{root.trace_id}-{attempt.span_id}-01"


def test_each_choice_and_each_prompt_has_its_own_attempt(asking: Asking) -> None:
    spans = asking.spans(asking.ask(prompt=["a", "b"], n=2))
    assert sorted(span.attributes["tidewright.choice"] for span in attempts(spans)) == [0, 1, 2, 3]
    assert len({span.span_id for span in attempts(spans)}) == names(spans).count("queue") == 4
    assert spans[0].attributes["gen_ai.request.choice.count"] == 4


def test_what_moves_to_another_replica_is_kept_and_shows_both(asking: Asking, replicas: list[EchoReplica]) -> None:
    replicas[0].errors["decoder"] = DOWN
    answers = [asking.ask(sampled=False) for _ in range(2)]  # by turns, so one of them meets it first
    kept = asking.kept(*answers)
    assert sum(kept) == 1
    spans = asking.spans(answers[kept.index(True)])
    failed, well = attempts(spans)
    assert (failed.failed, failed.message, failed.attributes["tidewright.replica"]) == (
        True,
        failed.attributes["tidewright.outcome"],
        replicas[0].grpc_url,
    )
    assert (well.failed, well.attributes["tidewright.replica"]) == (False, replicas[1].grpc_url)
    assert failed.ended <= well.began
    root = one(spans, f"POST {COMPLETIONS}")
    assert (root.failed, root.attributes["tidewright.kept_because"]) == (False, "failover")


def test_the_fallback_shows_as_such(asking: Asking, replicas: list[EchoReplica]) -> None:
    for replica in replicas:
        replica.errors["decoder"] = DOWN
    spans = asking.spans(asking.ask(sampled=False))
    assert [span.attributes["tidewright.model"] for span in attempts(spans)][-1] == "fallback"
    assert one(spans, f"POST {COMPLETIONS}").attributes["tidewright.served_by"] == "fallback"


def test_all_errors_are_kept_and_refusals_are_sampled(asking: Asking, replicas: list[EchoReplica]) -> None:
    for replica in replicas:
        replica.errors.update(decoder=DOWN, fallback=DOWN)
    answer = asking.ask(sampled=False)
    assert answer.status_code == 503
    root = one(asking.spans(answer), f"POST {COMPLETIONS}")
    assert (root.failed, root.message) == (True, answer.json()["error"]["code"])
    assert root.attributes["tidewright.kept_because"] == "error"
    for replica in replicas:
        replica.errors.clear()
    bad = [asking.ask(sampled=sampled, temperature=1000) for sampled in (False, True)]
    assert asking.kept(*bad) == [False, True]
    spans = asking.spans(bad[1])
    assert names(spans) == [f"POST {COMPLETIONS}", "admit", "tokenize"]
    assert [span.name for span in spans if span.failed] == ["tokenize"]  # a refusal is no error of the server
    assert one(spans, f"POST {COMPLETIONS}").attributes["error.type"] == bad[1].json()["error"]["code"]


def test_one_refused_by_a_limit_ends_where_it_was_refused(asking: Asking) -> None:
    assert asking.ask(key="slow").status_code == 200
    answer = asking.ask(key="slow")
    assert answer.status_code == 429
    root, admit = sorted(asking.spans(answer), key=lambda span: len(span.name), reverse=True)
    assert (admit.name, admit.failed, root.events) == ("admit", True, ["authenticated"])
    assert (root.attributes["tidewright.key_id"], root.attributes["http.response.status_code"]) == ("slow", 429)


def test_one_whose_client_leaves_ends_with_it(asking: Asking, replicas: list[EchoReplica]) -> None:
    for replica in replicas:
        replica.pause = 0.05
    trace_id = "ab" * 16
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01", "Authorization": f"Bearer {asking._keys['plain']}"}
    body = {"model": "smollm2-135m", "prompt": "Hi", "max_tokens": 500, "stream": True}
    with asking.gateway.http.stream("POST", COMPLETIONS, json=body, headers=headers) as answer:
        next(answer.iter_bytes())
    spans = asking.receiver.wait(lambda traces: traces.of(trace_id))
    check(spans)
    attempt = one(spans, "attempt")
    assert (attempt.attributes["tidewright.outcome"], attempt.failed) == ("cancelled", False)
    assert 0 < attempt.attributes["gen_ai.usage.output_tokens"] < 500


def test_slow_ones_are_kept(model_dir: Path, replicas: list[EchoReplica], receiver: OtlpReceiver) -> None:
    replicas[0].pause = 0.02
    options = {"otlp_endpoint": receiver.url, "trace_slow": 0.1}
    with RunningGateway(model_dir, replicas[0], **options) as gateway:
        answers = [gateway.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": count}) for count in (1, 10)]
        trace_id = answers[1].headers["X-Trace-Id"]
        spans = receiver.wait(lambda traces: traces.of(trace_id))
        assert spans[0].attributes["tidewright.kept_because"] == "slow"
        root = answers[0].elapsed.total_seconds()
        assert bool(receiver.traces.of(answers[0].headers["X-Trace-Id"])) <= (root > 0.1)
    replicas[0].pause = 0.0


@pytest.mark.parametrize("trouble", ["refused", "hangs", "500"])
def test_requests_are_unharmed_by_a_collector_that_is_down(
    trouble: str, model_dir: Path, replicas: list[EchoReplica]
) -> None:
    go_on = threading.Event()
    with OtlpReceiver() as collector:
        collector.answer = {"hangs": lambda: 200 if go_on.wait(60) else 500}.get(trouble, lambda: 500)
        url = "http://127.0.0.1:9" if trouble == "refused" else collector.url  # the port of `discard`
        options = {"otlp_endpoint": url, "trace_sample_ratio": 1}
        with RunningGateway(model_dir, replicas[0], **options) as gateway:
            for _ in range(20):
                answer = gateway.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2})
                assert answer.json()["choices"][0]["text"] == " word word"
            deadline = time.monotonic() + 30
            while trouble != "hangs" and not gateway.metric("spans_dropped_total", reason="export_failed"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert gateway.metric("spans_exported_total") == 0
            began = time.monotonic()
        go_on.set()
        assert time.monotonic() - began < 30  # it ends, whatever the collector does


def test_an_endpoint_that_is_none_is_named(model_dir: Path, replicas: list[EchoReplica]) -> None:
    for wrong, why in (("nowhere", "must be http://"), ("file:///no/such/file", "No such file")):
        ended = RunningGateway(model_dir, replicas[0], otlp_endpoint=wrong).run_to_its_end()
        assert ended.returncode != 0
        assert "otlp_endpoint" in ended.stderr
        assert why in ended.stderr


def test_documents_follow_the_catalogue() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    expected = [f"| `{name}` | {text} |" for table in (SPANS, EVENTS, ATTRIBUTES) for name, text in table.items()]
    assert rows == expected
