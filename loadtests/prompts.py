"""Prompts of about as many tokens as asked for, never twice the same: no cache answers in place of the model.

Each word is one token of the vocabularies that common models have. What the server counted is what the report shows.
"""

from __future__ import annotations

import random

WORDS = (  # noqa: SIM905 - a list of one word a line is no better to read
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "body information back parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education foot boy age policy music market sense "
    "nation plan college interest death experience effect use class control care field development role effort rate "
    "heart drug show leader light voice wife police mind price report decision son view relationship town road arm "
    "difference value building action season society tax director position player record paper space ground form "
    "event official matter center couple site project activity star table need court oil situation cost industry "
    "figure street image phone data picture practice piece land product doctor wall patient worker news test movie "
    "north love support technology"
).split()
FIRST_ID, LAST_ID = 100, 30_000
"""Token ids for requests that carry ids: above the special ones, within the vocabularies of common models."""


def text(rng: random.Random, tokens: int) -> str:
    return " ".join(rng.choices(WORDS, k=tokens))


def ids(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(tokens)]
