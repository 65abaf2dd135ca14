"""Log-probabilities as chats have them: an entry for each token, with the bytes of its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidewright.tokenization import Tokenizer

Position = dict[str, Any]
"""`{id: {logprob, rank, decoded_token}}`, the chosen token first."""


class TokenEntries:
    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool = True) -> None:
        """
        Args:
            num_top: most likely tokens that are told at each position.
            skip_special_tokens: special tokens are no part of the text.
        """
        self._tokenizer, self._num_top, self._skips = tokenizer, num_top, skip_special_tokens

    def of(self, positions: Sequence[Position]) -> list[dict[str, Any]]:
        found = []
        for position in positions:
            chosen = self._entry(*next(iter(position.items())))
            ranked = sorted(position.items(), key=lambda item: item[1]["rank"])[: self._num_top]
            found.append({**chosen, "top_logprobs": [self._entry(*item) for item in ranked]})
        return found

    def _entry(self, token_id: str, entry: dict[str, Any]) -> dict[str, Any]:
        known = int(token_id)
        # The bytes of all tokens are the text, so what is no part of it has none.
        has_text = not self._skips or self._tokenizer.is_text(known)
        raw = list(self._tokenizer.token_bytes(known)) if has_text else []
        return {"token": entry["decoded_token"], "logprob": entry["logprob"], "bytes": raw}
