"""failsafe/pulse.py: what the models' answers, and those that don't come, say about them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from helpers.two_models import PATIENCE, STUB_DIED, UNLOADED, WELL, Clock, Gate, until
from tidewright.failsafe import pulse as pulse_module
from tidewright.failsafe.pulse import Kind, Pulse, Trouble
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus

SILENCE = 0.5
WELL_JSON = msgspec.json.encode(WELL).decode()


def status(**changes: Any) -> DecoderStatus:
    return msgspec.structs.replace(WELL, **changes)


class Patient:
    """Answers; `feel` waits until the pulse has heard what it answers now."""

    def __init__(self, has_fallback: bool = True) -> None:
        self.clock = Clock()
        self.decoder: DecoderStatus | str | Callable[[], str] = WELL
        self.fallback = ""
        self.asked: list[tuple[str, str]] = []
        self.pulse = Pulse(self.control, silence=SILENCE, has_fallback=has_fallback)

    def control(self, model: str, word: str) -> str:
        self.asked.append((model, word))
        if model == "fallback":
            if self.fallback:
                raise ModelError(self.fallback)
            return WELL_JSON
        answer = self.decoder
        if isinstance(answer, str):
            raise ModelError(answer)
        return msgspec.json.encode(answer).decode() if isinstance(answer, DecoderStatus) else answer()

    def feel(self, decoder: DecoderStatus | str | Callable[[], str] = WELL, fallback: str = "") -> Trouble | None:
        self.decoder, self.fallback = decoder, fallback
        before = len(self.asked)
        # Two rounds, of which one may have begun before: each asks the decoder, and at its end the fallback.
        until(lambda: self.asked[before:].count(("decoder", "status")) >= 3)
        return self.trouble

    @property
    def trouble(self) -> Trouble | None:
        return self.pulse.trouble


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    monkeypatch.setattr(pulse_module, "INTERVAL", 0.001)
    monkeypatch.setattr(pulse_module, "FALLBACK_EVERY", 1)
    made = Patient()
    monkeypatch.setattr(pulse_module, "time", made.clock)
    made.pulse.start()
    yield made
    made.pulse.stop()


def kind_of(trouble: Trouble | None) -> Kind:
    assert trouble
    return trouble.kind


def test_a_decoder_that_is_well_is_no_trouble(patient: Patient) -> None:
    well = status(silence=SILENCE, waiting=0.3, wait=7.0, kv_usage=0.9)
    assert patient.feel(well) is None
    assert patient.pulse.status == well


@pytest.mark.parametrize(
    ("answer", "kind", "cause"),
    [
        (status(trouble="the engine is starting"), Kind.RESTARTING, "the engine is starting"),
        (status(silence=SILENCE + 0.1), Kind.SILENT, "no sign of life for 0.6 s"),
        (STUB_DIED, Kind.STUB_DIED, "its process died"),
        (UNLOADED, Kind.UNLOADED, UNLOADED),
    ],
)
def test_what_is_wrong(patient: Patient, answer: DecoderStatus | str, kind: Kind, cause: str) -> None:
    trouble = patient.feel(answer)
    assert trouble
    assert (trouble.kind, trouble.cause) == (kind, cause)
    assert patient.pulse.status == (None if isinstance(answer, str) else answer)
    assert patient.feel(WELL) is None


def test_what_was_in_a_stub_that_nobody_saw_end_stays_lost(patient: Patient) -> None:
    assert patient.feel(WELL) is None
    sent = patient.clock.monotonic()
    first = patient.feel(STUB_DIED)
    assert first
    assert sent < first.since == patient.pulse.stubs["decoder"].lost_before
    assert patient.feel(STUB_DIED) == first


def test_what_it_means_for_a_request_there() -> None:
    assert {kind: kind.outcome for kind in Kind} == {
        Kind.RESTARTING: Outcome.UNAVAILABLE,
        Kind.SILENT: Outcome.STALLED,
        Kind.STUB_DIED: Outcome.STUB_DIED,
        Kind.UNLOADED: Outcome.UNAVAILABLE,
    }


def test_one_that_drains_still_answers_what_it_has(patient: Patient) -> None:
    assert patient.feel(status(trouble="draining: no new requests are taken", draining=True)) is None
    assert kind_of(patient.feel(status(draining=True, silence=SILENCE + 1))) is Kind.SILENT


def test_silence_began_when_the_last_sign_came(patient: Patient) -> None:
    before = patient.clock.monotonic()
    trouble = patient.feel(status(silence=100.0))
    assert trouble
    assert before - 100.0 <= trouble.since <= patient.clock.monotonic() - 100.0


def test_the_same_trouble_keeps_its_beginning_and_another_has_its_own(patient: Patient) -> None:
    first = patient.feel(status(trouble="one"))
    patient.clock.ahead += 10
    same = patient.feel(status(trouble="two"))
    assert first
    assert same == Trouble(Kind.RESTARTING, first.since, "two")
    other = patient.feel(UNLOADED)
    assert other
    assert other.since >= first.since + 10
    patient.clock.ahead += 10
    patient.feel(WELL)
    again = patient.feel(UNLOADED)
    assert again
    assert again.since >= other.since + 10


def test_silence_that_gets_known_late_began_earlier(patient: Patient) -> None:
    first = patient.feel(status(silence=1.0))
    longer = patient.feel(status(silence=50.0))
    assert first
    assert longer
    assert longer.since < first.since - 40


def test_a_question_that_is_never_answered_is_asked_anew(patient: Patient) -> None:
    gate = Gate()
    patient.decoder = lambda: gate() or WELL_JSON
    assert gate.reached.wait(PATIENCE)
    patient.clock.ahead += pulse_module.UNANSWERED - 1
    patient.pulse.watch(patient.clock.monotonic(), is_awaited=True)
    asked = len(patient.asked)
    patient.clock.ahead += 1.1
    patient.decoder = UNLOADED
    assert len(patient.asked) == asked
    patient.pulse.watch(patient.clock.monotonic(), is_awaited=True)
    until(lambda: patient.trouble is not None)
    assert kind_of(patient.trouble) is Kind.UNLOADED
    gate.open()  # what is said so late says nothing any more
    assert kind_of(patient.feel(UNLOADED)) is Kind.UNLOADED
    until(lambda: sum(thread.name == "pulse" for thread in threading.enumerate()) == 1)


def test_a_stub_died_at_the_latest_when_that_got_known(patient: Patient) -> None:
    """What was sent to it while it did not answer is lost as well."""
    gate = Gate()

    def dies() -> str:
        gate()
        raise ModelError(STUB_DIED)

    patient.decoder = dies
    assert gate.reached.wait(PATIENCE)
    patient.clock.ahead += 10
    meanwhile = patient.clock.monotonic()
    patient.decoder = STUB_DIED
    gate.open()
    until(lambda: patient.trouble is not None)
    assert kind_of(patient.trouble) is Kind.STUB_DIED
    trouble = patient.trouble
    assert trouble
    assert trouble.since >= meanwhile


@pytest.mark.parametrize("nonsense", ["", "{}", "ok"])
def test_an_answer_that_nobody_understands_does_not_end_the_questions(patient: Patient, nonsense: str) -> None:
    patient.feel(lambda: nonsense)
    assert kind_of(patient.feel(UNLOADED)) is Kind.UNLOADED


def test_the_fallback_is_ready_when_it_says_so(patient: Patient) -> None:
    until(lambda: patient.pulse.fallback_ready)
    patient.feel(fallback="the engine is starting")
    assert not patient.pulse.fallback_ready
    patient.feel()
    assert patient.pulse.fallback_ready
    assert ("fallback", "status") in patient.asked


def test_a_fallback_that_does_not_exist_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_module, "INTERVAL_ALONE", 0.001)
    patient = Patient(has_fallback=False)
    patient.pulse.start()
    until(lambda: len(patient.asked) > 2 * pulse_module.FALLBACK_EVERY)
    assert not patient.pulse.fallback_ready
    patient.pulse.stop()
    assert set(patient.asked) == {("decoder", "status")}


def test_the_fallback_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_module, "INTERVAL", 0.001)
    patient = Patient()
    patient.pulse.start()
    until(lambda: len(patient.asked) > 3 * pulse_module.FALLBACK_EVERY)
    patient.pulse.stop()
    models = [model for model, _ in patient.asked]
    rounds = "".join(model[0] for model in models[1:]).split("f")
    assert {len(decoder) for decoder in rounds[:-1]} == {pulse_module.FALLBACK_EVERY}


def test_it_stops(patient: Patient) -> None:
    patient.feel()
    patient.pulse.stop()
    asked = len(patient.asked)
    assert not patient.pulse._thread.is_alive()
    assert len(patient.asked) == asked


def test_without_a_thread_for_another_question_the_one_that_asks_goes_on(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patient.feel()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            patient.pulse.start()
    assert kind_of(patient.feel(UNLOADED)) is Kind.UNLOADED
