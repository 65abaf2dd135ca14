"""limits/: a parent process that counts for its workers, and what becomes of them when either is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helpers.limiting import ONE, limits_apply, passes, until
from tidewright_gateway.admission.limits import Limiter, LimitServer, Subject, make_limiter
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

pytestmark = pytest.mark.usefixtures("patient_limits")

PARENT = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from tidewright_gateway.admission.limits import LimitServer

    async def main():
        async with LimitServer(Path(sys.argv[1])):
            print("up", flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main())
    """
)
# Takes as often as it can, says how often that was, and holds all of it until its input ends.
WORKER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from tidewright_gateway.auth.callers import Limits
    from tidewright_gateway.config import GatewaySettings
    from tidewright_gateway.openai.errors import ApiError
    from tidewright_gateway.admission.limits import Subject, make_limiter, remote

    remote.TIMEOUT = 3600

    async def main():
        limiter = make_limiter(GatewaySettings(), Path(sys.argv[1]))
        await limiter.start()
        subjects = [Subject("key a", Limits(concurrent=30, tokens_per_day=3000))]

        async def one():
            try:
                return await limiter.reserve(subjects, 100)
            except ApiError:
                return None

        got = await asyncio.gather(*(one() for _ in range(200)))
        print(sum(each is not None for each in got), flush=True)
        await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main())
    """
)


class Process(subprocess.Popen):
    """A Python process that prints a line when it is ready, and is killed at the end."""

    def __init__(self, code: str, path: Path) -> None:
        super().__init__([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def line(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().decode().strip()

    def __exit__(self, *exception: object) -> None:
        self.kill()
        super().__exit__(*exception)  # type: ignore[arg-type]


def test_workers_share_what_their_parent_counts(tmp_path: Path) -> None:
    path = tmp_path / "limits"

    async def what_is_free(places: int) -> None:
        """Exactly so many places, and a hundred tokens for each: nobody knows what the dead used of them."""
        limiter = make_limiter(GatewaySettings(), path)
        await limiter.start()
        subjects = [Subject("key a", Limits(concurrent=30, tokens_per_day=3000))]
        got = [await passes(limiter, subjects, 100) for _ in range(40)]
        assert sum(reservation is not None for reservation in got) == places
        assert limiter.without_store == 0
        await limiter.close()  # and with it all of these

    with Process(PARENT, path) as parent:
        assert parent.line() == "up"
        assert path.stat().st_mode & 0o777 == 0o600
        with Process(WORKER, path) as one, Process(WORKER, path) as other:
            got = [int(one.line()), int(other.line())]
            assert sum(got) == 30
            killed, kept = (one, other) if got[0] > got[1] else (other, one)
            killed.kill()
            killed.wait()
            asyncio.run(what_is_free(max(got)))
            kept.kill()
            kept.wait()
            asyncio.run(what_is_free(30))


@pytest.mark.usefixtures("quick_ticks")
@pytest.mark.parametrize("when_lost", ["open", "closed"])
def test_the_parent_dies_and_comes_back(tmp_path: Path, when_lost: str) -> None:
    path = tmp_path / "limits"

    async def scenario() -> None:
        limiter = make_limiter(GatewaySettings(limits_when_lost=when_lost), path)
        await limiter.start()  # it is not there yet
        assert await is_lost(limiter)
        with Process(PARENT, path) as parent:
            assert parent.line() == "up"
            await until(lambda: limits_apply(limiter))
            held = await limiter.reserve(ONE, 1)
        assert await is_lost(limiter)
        with Process(PARENT, path) as parent:
            assert parent.line() == "up"
            await until(lambda: limits_apply(limiter))
            # The new one knows nothing of it, and lets nobody end another's place with it.
            assert await passes(limiter)
            await limiter.settle(held, 1)
            assert not await passes(limiter)
            await limiter.close()

    async def is_lost(limiter: Limiter) -> bool:
        before = limiter.without_store
        if when_lost == "open":
            assert (await limiter.reserve(ONE, 1)).headers == {}
        else:
            with pytest.raises(ApiError, match="can't be checked"):
                await limiter.reserve(ONE, 1)
        return limiter.without_store == before + 1

    asyncio.run(scenario())


def test_the_parent_keeps_nothing_of_what_was_settled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with LimitServer(tmp_path / "limits") as server:
            limiter = make_limiter(GatewaySettings(), tmp_path / "limits")
            await limiter.start()
            reservation = await limiter.reserve(ONE, 1)
            assert [len(held) for held in server._held.values()] == [1]
            await limiter.settle(reservation, 1)
            assert [len(held) for held in server._held.values()] == [0]
            await limiter.close()

    asyncio.run(scenario())


def test_who_speaks_something_else_is_cut_off_and_nobody_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with LimitServer(tmp_path / "limits"):
            limiter = make_limiter(GatewaySettings(), tmp_path / "limits")
            await limiter.start()
            assert await passes(limiter)
            for garbage in (b"\0\0\0\3abc", b"\0\0\0\0", b"\0\0\1\0short"):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "limits")
                writer.write(garbage)
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            assert not await passes(limiter)
            await limiter.close()

    asyncio.run(scenario())
