"""Which tokens are to be drawn for a sequence, and what of those that were is kept. Pure."""

from __future__ import annotations

from collections.abc import Collection

from tidewright.engine.messages import SequenceOutput
from tidewright.engine.plan import NO_HISTORY, Draw, History, SequenceResult
from tidewright.engine.sequence import Sequence
from tidewright.schema import FinishReason


def draw_after(sequence: Sequence, position: int, drafts: Collection[int] = ()) -> Draw:
    """Of the token at `position`, which follows all that it has or expects, and these guesses."""
    banned_ids = () if position >= sequence.shortest else tuple(sorted(sequence.stop_ids))
    history = NO_HISTORY
    if sequence.needs_history:
        history = History(sequence.token_ids, position - len(drafts), sequence.prompt_length, tuple(drafts))
    # By place: names cost half as much again, for each token that is generated.
    return Draw(sequence.request_id, sequence.sampling, position, banned_ids, sequence.bad_words_ids, history)


def guesses(sequence: Sequence, most: int) -> list[int]:
    """Of its next tokens: so many at most."""
    # A draw follows the last guess, and must not go beyond the last token.
    count = min(most, sequence.longest - sequence.num_known - 1)
    if count <= 0 or sequence.sampling.guided:
        return []
    return sequence.lookup.propose(sequence.token_ids, count)


def accept(sequence: Sequence, drafts: tuple[int, ...], computed: SequenceResult) -> tuple[SequenceOutput, int]:
    """Appends the drawn tokens, up to and including the first that is not the one that was guessed.

    Draws after a rejected draft are discarded; all before are what would have been drawn without guessing, for a draw
    depends on the tokens before it and on nothing else.

    Returns:
        The output, with a reason if the sequence ends with it, and how many guesses were right.
    """
    known, sampling = sequence.token_ids, sequence.sampling
    first = len(known) == sequence.prompt_length
    right = 0
    while right < len(drafts) and drafts[right] == computed.drawn[right].token_id:
        right += 1
    accepted: list[int] = []
    reason: FinishReason | None = None
    message = ""
    for drawn in computed.drawn[: right + 1]:
        if drawn.error:
            reason, message = "invalid", drawn.error  # its own parameters: any other engine would say the same
            break
        token_id = drawn.token_id
        known.append(token_id)
        accepted.append(token_id)
        if token_id in sequence.stop_ids:
            reason = "stop"
            break
        if len(known) >= sequence.longest:
            reason = "length"
            break
    count = len(accepted)
    if drafts:
        sequence.num_computed += max(count - 1, 0)  # the guesses that were right
    logprobs = None if sampling.logprobs is None else [drawn.logprobs or [] for drawn in computed.drawn[:count]]
    prompt_logprobs = sequence.prompt_logprobs if first and sampling.prompt_logprobs is not None else None
    cached_tokens = (sequence.cached_tokens or 0) if first else 0
    output = SequenceOutput(
        sequence.request_id, accepted, reason, logprobs, prompt_logprobs, cached_tokens, message
    )  # by place, as above
    return output, min(right, count)


def embedded(sequence: Sequence, computed: SequenceResult) -> SequenceOutput:
    """The output of a prompt that is computed. Only rank 0's result has the embedding."""
    return SequenceOutput(
        sequence.request_id, [], "stop", cached_tokens=sequence.cached_tokens or 0, embedding=computed.embedding
    )
