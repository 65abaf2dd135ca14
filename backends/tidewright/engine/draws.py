"""Which tokens are to be drawn for a sequence, and what of those that were is kept. Pure."""

from __future__ import annotations

from collections.abc import Collection

from tidewright.engine.messages import SequenceOutput
from tidewright.engine.plan import NO_HISTORY, Draw, DrawnToken, History, SequenceResult
from tidewright.engine.sequence import Sequence
from tidewright.schema import FinishReason


def draw_after(sequence: Sequence, drafts: Collection[int] = ()) -> Draw:
    """Of the token after all that it has or expects, and after these guesses."""
    num_expected, prompt_length = sequence.num_expected, len(sequence.prompt_token_ids)
    position, sampling = num_expected + len(drafts), sequence.sampling
    may_stop = position - prompt_length >= sampling.min_tokens
    banned_ids = () if may_stop else tuple(sorted(sequence.stop_ids))
    history = NO_HISTORY
    if sequence.needs_history:
        history = History(sequence.token_ids, num_expected, prompt_length, tuple(drafts))
    # By place: names cost half as much again, for each token that is generated.
    return Draw(sequence.request_id, sampling, position, banned_ids, sequence.bad_words_ids, history)


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
    first = sequence.num_generated == 0
    right = 0
    while right < len(drafts) and drafts[right] == computed.drawn[right].token_id:
        right += 1
    accepted: list[DrawnToken] = []
    reason: FinishReason | None = None
    message = ""
    for drawn in computed.drawn[: right + 1]:
        if drawn.error:
            reason, message = "invalid", drawn.error  # its own parameters: any other engine would say the same
            break
        sequence.token_ids.append(drawn.token_id)
        accepted.append(drawn)
        reason = _finish_reason(sequence)
        if reason:
            break
    sequence.num_computed += max(len(accepted) - 1, 0)  # the guesses that were right
    asked = sequence.sampling.prompt_logprobs is not None
    output = SequenceOutput(
        request_id=sequence.request_id,
        token_ids=[drawn.token_id for drawn in accepted],
        finish_reason=reason,
        logprobs=None if sequence.sampling.logprobs is None else [drawn.logprobs or [] for drawn in accepted],
        prompt_logprobs=sequence.prompt_logprobs if first and asked else None,
        cached_tokens=(sequence.cached_tokens or 0) if first else 0,
        message=message,
    )
    return output, min(right, len(accepted))


def embedded(sequence: Sequence, computed: SequenceResult) -> SequenceOutput:
    """The output of a prompt that is computed. Only rank 0's result has the embedding."""
    return SequenceOutput(
        sequence.request_id, [], "stop", cached_tokens=sequence.cached_tokens or 0, embedding=computed.embedding
    )


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    if sequence.token_ids[-1] in sequence.stop_ids:
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.longest else None
