"""launch/watchdog.py and model_watch.py against a scripted Triton: what is asked, and what follows from the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from helpers.scripted_triton import DEAD, HANG, ScriptedTriton, fails, scripted_triton, status
from helpers.two_models import WELL
from tidewright.launch import model_watch, watchdog
from tidewright.launch.watchdog import Watchdog
from tidewright.schema import DRAINING, STUCK
from tidewright.served_models import ServedModel

PATIENCE = 20.0  # seconds
STUCK_ANSWER = (503, b'{"error": "%s1 response"}' % STUCK.encode())


class World:
    """A watchdog at work. `end` is what its run returned."""

    def __init__(self, triton: ScriptedTriton, say: Callable[[str], None] | None = None) -> None:
        self.triton = triton
        self.said: list[str] = []
        self.end: bool | None = None
        self.well: list[str] = []
        """Of what was said, what is good news."""
        self._watchdog = Watchdog(triton, None, say or self.said.append, self._say_well)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _say_well(self, text: str) -> None:
        self.well.append(text)
        self.said.append(text)

    def _run(self) -> None:
        self.end = self._watchdog.run()

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, (self.said, self.triton.asked[-20:])
            time.sleep(0.01)

    def hears(self, text: str) -> None:
        self.until(lambda: any(text in line for line in self.said))

    def asks(self, question: str, times: int = 2) -> None:
        before = self.triton.count(question)
        self.until(lambda: self.triton.count(question) >= before + times)

    def stop(self) -> None:
        self.triton.running, self.triton.asked_to_end = False, True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedTriton]:
    for name, value in {"ROUND": 0.005, "LIVE_INTERVAL": 0.05, "LIVE_PATIENCE": 1.0, "HANG_AFTER": 3.0}.items():
        monkeypatch.setattr(watchdog, name, value)
    times = {"PROBE_INTERVAL": 0.02, "PROBE_PATIENCE": 2.0, "LOOK_PATIENCE": 2.0, "SUSPECT_PATIENCE": 2.0}
    times |= {"RELOAD_INTERVAL": 0.05, "RELOAD_PATIENCE": 0.3, "DOWN_INTERVAL": 0.1}
    for name, value in times.items():
        monkeypatch.setattr(model_watch, name, value)
    intervals = {"failsafe": 0.05, "decoder": 0.05, "fallback": 0.05}
    monkeypatch.setattr(model_watch, "GENERATION_INTERVALS", intervals)
    with scripted_triton() as made:
        yield made


@pytest.fixture
def world(triton: ScriptedTriton) -> Iterator[World]:
    made = World(triton)
    yield made
    made.stop()


def test_one_that_is_well_is_asked_and_asked_for_tokens_and_nothing_is_said(world: World) -> None:
    for question in ("live", "infer tokenizer", "health failsafe", "health decoder", "health fallback"):
        world.asks(question)
    for model in ("failsafe", "decoder", "fallback"):
        world.asks(f"token {model}")
    assert world.said == []


def test_one_that_embeds_is_asked_for_an_embedding(triton: ScriptedTriton) -> None:
    triton.settings.task = "embed"
    world = World(triton)
    world.asks("embedding decoder")
    world.asks("token failsafe")
    assert not triton.count("token decoder")
    assert world.said == []
    world.stop()


def test_a_further_model_is_watched_by_its_own_answers(triton: ScriptedTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first has answered says nothing of it."""
    triton.models_with_engine = {"decoder", "decoder_small"}
    answer, served = triton.answer, iter(range(10**6))

    def busy(path: str, body: dict) -> object:
        found = answer(path, body)
        if path != "/metrics":
            return found
        lines = (
            '{reason="stop"} 5',
            f'{{model="small",reason="stop"}} {next(served)}',
            '{model="other",reason="stop"} 5',
        )
        return 200, "".join(f"tidewright_requests_finished_total{line}\n" for line in lines).encode()

    monkeypatch.setattr(triton, "answer", busy)
    world = World(triton)
    world.asks("token decoder", 5)
    before = triton.count("token decoder_small")
    world.asks("token decoder", 10)
    assert triton.count("token decoder_small") == before
    for question in ("infer tokenizer_small", "health decoder_small"):
        world.asks(question)
    triton.broken["health decoder_small"] = DEAD
    world.hears("the stub of decoder_small died")
    world.asks("load decoder_small", 1)
    assert set(triton.killed) == {"decoder_small"}
    world.stop()


def test_a_question_that_meets_a_model_being_loaded_blames_nobody(world: World) -> None:
    """One of Triton's threads answers nothing meanwhile, though all is well."""
    world.triton.broken = {"index": (200, b'[{"name": "x", "state": "LOADING"}]'), "health decoder": HANG}
    world.asks("index", 1)
    world.asks("health decoder", 1)
    assert world.said == []


def test_who_answers_others_is_not_asked_for_a_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, served = world.triton.answer, iter(range(10**6))

    def busy(path: str, body: dict) -> object:
        found = answer(path, body)
        if path == "/metrics":
            return 200, f'tidewright_requests_finished_total{{reason="stop"}} {next(served)}\n'.encode()
        return found

    monkeypatch.setattr(world.triton, "answer", busy)
    world.asks("token failsafe", 5)
    before = world.triton.count("token decoder")
    world.asks("token failsafe", 10)
    assert world.triton.count("token decoder") == before


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        ("health decoder", DEAD, "the stub of decoder died"),
        ("infer tokenizer", DEAD, "the stub of tokenizer died"),
        ("health failsafe", HANG, "the stub of failsafe does not answer"),
        ("health fallback", STUCK_ANSWER, f"the stub of fallback is {STUCK}"),
        ("token decoder", HANG, "the stub of decoder generated nothing for 2 s"),
        ("token failsafe", HANG, "the stub of failsafe generated nothing for 2 s"),
        ("token decoder", DEAD, "the stub of decoder died"),
    ],
)
def test_a_stub_that_is_dead_or_stuck_is_replaced(world: World, question: str, answer: object, why: str) -> None:
    model = question.split()[1]
    world.triton.kill_mends = True  # a moment later, the model might be asked again, and found stuck again at once
    world.triton.broken[question] = answer
    world.until(lambda: world.triton.killed)
    world.hears(f"{model} is back")
    assert world.said[0].startswith(why)
    assert world.triton.asked.index(f"unload {model}") < world.triton.asked.index(f"load {model}")
    assert world.triton.removed[0] == f"region of {model}"
    world.asks("health decoder")
    assert world.triton.starts == 0


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("health decoder", (503, b'{"error": "the engine is not available"}')),
        ("health decoder", (400, b'{"error": "Request for unknown model"}')),
        ("token decoder", (503, b'{"error": "running or waiting; try again later [overloaded]"}')),
        ("token failsafe", (503, b'{"error": "timed out [timeout]"}')),
        ("metrics", (500, b"")),
    ],
)
def test_an_answer_that_is_no_is_an_answer(world: World, question: str, answer: object) -> None:
    world.triton.broken[question] = answer
    world.asks(question, 4)
    world.asks("infer tokenizer")
    assert world.said == []


def test_a_model_that_someone_unloads_stays_so_and_that_is_said_once(world: World) -> None:
    index = b'[{"name": "decoder", "version": "1", "state": "UNAVAILABLE", "reason": "%s"}]'
    world.triton.broken |= {
        "health decoder": (400, b'{"error": "Request for unknown model: \'decoder\' has no available versions"}'),
        "token decoder": (400, b'{"error": "Request for unknown model"}'),
        "index": (200, index % b"unloaded"),
    }
    world.asks("health decoder", 5)
    load = f"load it again with: curl -X POST {world.triton.http_url}/v2/repository/models/decoder/load"
    assert world.said == [f"decoder was unloaded by request; {load}; until then it takes no requests"]
    world.triton.broken["index"] = (200, index % b"no memory")
    world.hears("decoder could not be loaded: no memory")
    world.triton.broken.clear()
    world.hears("decoder is loaded again")
    assert len(world.said) == 3
    assert world.well == ["decoder is loaded again"]
    assert not world.triton.count("load decoder")


@pytest.mark.parametrize(
    "answer", [(200, b"{}"), (200, b"[1]"), (200, b"<"), (200, b'[{"name": "decoder", "state": "READY"}]'), (500, b"")]
)
def test_an_index_that_says_nothing_is_nothing_to_say(world: World, answer: object) -> None:
    world.triton.broken |= {"health decoder": (400, b'{"error": "unknown model"}'), "index": answer}
    world.asks("index", 4)
    assert world.said == []


def test_an_engine_that_is_silent_is_left_to_its_bridge(world: World) -> None:
    silent = status(msgspec.structs.replace(WELL, silence=9.0))
    world.triton.broken |= {"token decoder": HANG, "status decoder": (200, silent)}
    world.asks("status decoder")
    assert world.said == []


def test_what_the_failsafe_called_is_asked_for_a_token_once_it_is_gone(
    triton: ScriptedTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "GENERATION_INTERVALS", dict.fromkeys(("failsafe", "decoder", "fallback"), 3600.0))
    world = World(triton)
    world.asks("health decoder")
    assert not triton.count("token decoder")
    triton.broken |= {"health failsafe": DEAD, "token decoder": HANG}
    world.until(lambda: triton.killed)
    del triton.broken["health failsafe"]
    world.hears("the stub of decoder generated nothing")
    triton.broken.clear()
    world.hears("decoder is back")
    world.until(lambda: triton.count("token fallback"))
    world.stop()


def test_while_a_model_is_loaded_no_other_is_judged(world: World) -> None:
    """Its HTTP thread in Triton answers nobody else meanwhile."""
    world.triton.broken |= {"infer tokenizer": DEAD, "load tokenizer": HANG}
    world.hears("the stub of tokenizer died")
    world.triton.broken |= {"health decoder": HANG, "token decoder": HANG}
    world.asks("live", 5)
    assert not any("decoder" in line for line in world.said)


def test_a_triton_that_hangs_is_started_again_and_no_stub_is_blamed(world: World) -> None:
    for question in ("live", "infer tokenizer", "health failsafe", "health decoder", "health fallback"):
        world.triton.broken[question] = HANG
    world.hears("tritonserver is back")
    assert world.said[0] == "tritonserver does not serve: no answer for 3 s; its requests are lost"
    assert world.triton.killed == []
    world.asks("health decoder")


def test_a_model_that_does_not_come_back_means_a_new_triton(world: World) -> None:
    world.triton.broken |= {"health decoder": DEAD, "load decoder": (500, b'{"error": "no memory"}')}
    world.hears("tritonserver is back")
    assert any("decoder could not be loaded again: no memory; trying again" in line for line in world.said)
    assert any("does not serve: could not load decoder again: no memory" in line for line in world.said)
    world.asks("health decoder")


def test_a_model_that_is_stuck_after_a_reload_means_a_new_triton(world: World) -> None:
    world.triton.broken["token decoder"] = HANG
    world.hears("tritonserver is back")
    assert any("does not serve: the stub of decoder generated nothing" in line for line in world.said)
    assert world.triton.count("load decoder") == 1


@pytest.fixture
def two_models(triton: ScriptedTriton) -> ScriptedTriton:
    triton.settings.models = [ServedModel(name="small", model="x"), ServedModel(name="later", model="x", load=False)]
    triton.models_with_engine = {"decoder", "decoder_small", "decoder_later"}
    return triton


def test_one_that_is_unloaded_while_it_stays_away_is_not_tried_again(two_models: ScriptedTriton) -> None:
    """Triton can't say so of its decoder, which is away already, but of its tokenizer."""
    two_models.broken |= {"health decoder_small": DEAD, "load decoder_small": (500, b'{"error": "no memory"}')}
    world = World(two_models)
    world.hears("it stays unloaded, and the other models go on")
    away = (400, b'{"error": "Request for unknown model"}')
    index = b"""[{"name": "tokenizer_small", "state": "UNAVAILABLE", "reason": "unloaded"},
                 {"name": "decoder_small", "state": "UNAVAILABLE", "reason": "unloaded"}]"""
    two_models.broken |= {"infer tokenizer_small": away, "health decoder_small": away, "index": (200, index)}
    world.hears("decoder_small was unloaded by request, and is not tried again")
    before = two_models.count("load decoder_small")
    world.asks("health decoder_small", 5)
    world.asks("token decoder", 5)
    assert two_models.count("load decoder_small") == before
    two_models.broken.clear()  # somebody loads it
    world.hears("decoder_small is loaded again")
    world.stop()


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (
            {"health decoder_small": DEAD, "load decoder_small": (500, b'{"error": "no memory"}')},
            "could not load decoder_small again: no memory; it stays unloaded",
        ),
        ({"health decoder_small": STUCK_ANSWER}, f"the stub of decoder_small is {STUCK}1 response after it was loaded"),
        ({"infer tokenizer_small": DEAD}, "the stub of tokenizer_small died after it was loaded again; it stays unl"),
    ],
)
def test_a_further_model_that_does_not_come_back_costs_the_others_nothing(
    two_models: ScriptedTriton, broken: dict[str, object], why: str
) -> None:
    two_models.broken |= broken
    world = World(two_models)
    model = next(iter(broken)).split()[1]
    world.hears(why)
    world.hears("trying again in 0.2 s")  # the second wait is twice as long
    assert any("stays unloaded, and the other models go on; trying again in 0.1 s" in line for line in world.said)
    assert two_models.asked.index(f"unload {model}") < two_models.asked.index(f"load {model}")
    world.asks("token decoder")
    two_models.broken.clear()
    world.until(lambda: f"{model} is back" in world.said[-1])
    world.asks(f"{'token' if model.startswith('decoder') else 'infer'} {model}")
    assert (two_models.starts, set(two_models.killed), world.end) == (0, {model}, None)
    world.stop()


def test_a_restart_needs_the_first_model_alone_and_brings_back_what_was_loaded(two_models: ScriptedTriton) -> None:
    away = (400, b'{"error": "Request for unknown model"}')
    two_models.broken["health decoder_later"] = away
    world = World(two_models)
    world.asks("health decoder_later", 3)
    two_models.fails_after_start = {
        "load decoder_small": (500, b'{"error": "no memory"}'),
        "health decoder_later": away,
    }
    two_models.running = False
    world.hears("tritonserver is back")
    world.hears("could not load decoder_small: no memory; it stays unloaded, and the other models go on")
    world.asks("token decoder")
    two_models.broken.clear()
    world.hears("decoder_small is back")
    chain = ["load tokenizer_small", "load decoder_small", "load generate_small"]
    assert [question for question in two_models.asked if question.startswith("load ")][-3:] == chain
    assert two_models.starts == 1

    # Somebody loads the one and unloads the other: so it stays.
    world.asks("health decoder_later")
    index = b'[{"name": "decoder_small", "state": "UNAVAILABLE", "reason": "unloaded"}]'
    two_models.broken |= {"health decoder_small": away, "index": (200, index)}
    world.hears("decoder_small was unloaded by request")
    before = two_models.count("load decoder_small")
    two_models.running = False
    world.asks("load generate_later", 1)
    world.asks("token decoder_later")
    assert two_models.count("load decoder_small") == before
    world.stop()


def test_while_a_further_model_is_loaded_the_first_is_asked_how_it_is(two_models: ScriptedTriton) -> None:
    two_models.broken |= {"health decoder_small": DEAD, "load decoder_small": HANG}
    world = World(two_models)
    world.asks("load decoder_small", 1)
    tokens = two_models.count("token decoder")
    world.asks("health decoder", 5)
    assert two_models.count("token decoder") <= tokens + 1  # one may have been on its way
    two_models.broken["health decoder"] = DEAD
    world.hears("the stub of decoder died")
    world.stop()


def test_a_start_that_fails_is_tried_again_but_not_for_ever(world: World) -> None:
    world.triton.start_errors = fails("port is taken")
    world.triton.running = False
    world.hears("tritonserver is back")
    assert "tritonserver could not be started again: port is taken" in world.said
    world.triton.start_errors = fails("a", "b")
    world.triton.running = False
    world.until(lambda: world.end is False)
    assert world.triton.starts == watchdog.MAX_RESTARTS
    assert "giving up" in world.said[-1]


def test_a_drain_ends_it(world: World) -> None:
    world.triton.broken["health decoder"] = (503, b'{"error": "%s"}' % DRAINING.encode())
    world.until(lambda: world.end)
    assert world.said == []


def test_mistakes_of_ours_end_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(model_watch, "ask", fail)
        broken.setattr(watchdog, "ask", fail)
        world.hears("the watchdog failed, and goes on: OSError(")
    with monkeypatch.context() as broken:
        broken.setattr(model_watch, "ask", fail)
        world.hears("watching tokenizer failed, and goes on: OSError(")
    world.asks("health decoder")
    # Also in the middle of a reload.
    with monkeypatch.context() as broken:
        broken.setattr(world.triton, "remove_region", fail)
        world.triton.broken["health decoder"] = DEAD
        before = len(world.said)
        world.until(lambda: any("watching decoder failed" in line for line in world.said[before:]))
        world.triton.broken.clear()
    world.hears("decoder is back")
    world.asks("health decoder")


def test_it_goes_on_though_nobody_can_read_what_it_says(triton: ScriptedTriton) -> None:
    def broken_pipe(_: str) -> None:
        raise SystemExit(1)

    world = World(triton, broken_pipe)
    triton.broken["health decoder"] = DEAD
    world.until(lambda: triton.count("load decoder"))
    triton.broken.clear()
    world.asks("health decoder")
    world.stop()
