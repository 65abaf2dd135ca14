"""What to install for the parts of this package that need more than httpx."""

from __future__ import annotations


def missing(what: str, package: str, extra: str) -> ImportError:
    return ImportError(
        f"{what} need {package}: pip install 'PATH/clients/python[{extra}]', with the path of a checkout of Tidewright"
    )
