"""Which tokens of a sequence a step computes, and what is drawn after them. Pure.

Which sequences get any, and how many at most, is the scheduler's choice (scheduler.py).
"""

from __future__ import annotations

from tidewright.engine.draws import draw_after, guesses
from tidewright.engine.limits import SchedulerConfig
from tidewright.engine.plan import PENDING, Draw, ScheduledSequence
from tidewright.engine.running import RunningSequences
from tidewright.engine.sequence import Sequence


class StepTokens:
    def __init__(self, config: SchedulerConfig, running: RunningSequences) -> None:
        self._config, self._running = config, running

    def goes_on(self, sequence: Sequence, index: int) -> bool:
        """There is a token of it to compute, for the last may be in flight, and a block for that."""
        config, expected = self._config, sequence.num_expected
        if config.embeds:
            if sequence.num_computed == expected:
                return False
        elif sequence.num_pending and expected >= sequence.longest:
            return False
        return expected <= len(sequence.block_table) * config.block_size or self._running.grow(sequence, index)

    def take_streams(self, line: list[Sequence], scheduled: list[ScheduledSequence]) -> list[Sequence]:
        """Plans the next token of each stream at the start of `line`, up to the first that needs more, such as a block.

        The same as `goes_on` and `take`, in a third of the time: this is paid for each token that is generated.

        Returns:
            The sequences whose plans were appended to `scheduled`.
        """
        size = self._config.block_size
        for place, sequence in enumerate(line):
            known, start, pending = sequence.token_ids, sequence.num_computed, sequence.num_pending
            expected, num_blocks = len(known) + pending, sequence.num_planned_blocks
            decodes = expected == start + 1 and expected > sequence.prompt_length
            has_block = expected <= num_blocks * size and num_blocks == len(sequence.block_table)
            if not (decodes and has_block) or (pending and expected >= sequence.longest):
                return line[:place]
            draws = (draw_after(sequence, expected),)
            sequence.num_pending = pending + 1
            sequence.num_computed = expected
            if expected >= (sequence.num_registered + 1) * size:
                self._running.register(sequence)
            token_ids = (PENDING if pending else known[start],)
            request_id, slot = sequence.request_id, sequence.adapter_slot
            scheduled.append(
                ScheduledSequence(request_id, start, token_ids, (), draws, None, (), False, num_blocks, slot)
            )
        return line

    def take(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        """Plans as many of its tokens as there are within `budget`, and what is drawn after them."""
        start, known, num_expected = sequence.num_computed, sequence.token_ids, sequence.num_expected
        end = min(num_expected, start + budget)
        token_ids = tuple(known[start:end])
        if end > len(known):
            token_ids += (PENDING,)
        draws: tuple[Draw, ...] = ()
        completes = end == num_expected
        if completes and not self._config.embeds:
            draws = (draw_after(sequence, end),)
            most = min(self._config.speculative_tokens, budget - len(token_ids))
            # Guesses cost nobody a token or a block.
            if most > 0 and (drafts := guesses(sequence, most)) and self._running.grow_by(sequence, len(drafts)):
                draws += tuple(draw_after(sequence, end + count, drafts[:count]) for count in range(1, len(drafts) + 1))
                token_ids += tuple(drafts)
            sequence.num_pending += 1
        sequence.num_computed = end
        if end >= (sequence.num_registered + 1) * self._config.block_size:
            self._running.register(sequence)
        first_block, num_blocks = sequence.num_planned_blocks, len(sequence.block_table)
        sequence.num_planned_blocks = num_blocks
        new_blocks = tuple(sequence.block_table[first_block:]) if num_blocks > first_block else ()
        logprobs = sequence.sampling.prompt_logprobs
        if logprobs is not None and num_expected > sequence.prompt_length:
            logprobs = None
        following = () if logprobs is None else tuple(sequence.prompt_token_ids[start + 1 : end + 1])
        embeds = completes and self._config.embeds
        request_id, slot = sequence.request_id, sequence.adapter_slot
        # By place, as in draw_after.
        return ScheduledSequence(
            request_id, start, token_ids, new_blocks, draws, logprobs, following, embeds, first_block, slot
        )
