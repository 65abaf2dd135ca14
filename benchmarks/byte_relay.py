"""A TCP relay that counts the connections and bytes which pass, in a thread of its own; it can cut them."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType


class ByteRelay:
    """Listens on `port`. Counts are of payload, as sockets carry it: without the headers of TCP and IP."""

    def __init__(self, target: int) -> None:
        """`target`: the port on this machine that it stands before."""
        self._target = target
        self.port = 0
        self.connections = 0  # ever made
        self.sent = self.received = 0
        """Bytes from and to the clients."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def cut(self) -> None:
        """Breaks the connections that there are; new ones may be made."""
        self._loop.call_soon_threadsafe(self._abort)

    def __enter__(self) -> ByteRelay:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._relay, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._copy(reader, far_writer, True), self._copy(far_reader, writer, False))
        except asyncio.CancelledError:  # asyncio's streams would print it
            pass
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sends: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                if sends:
                    self.sent += len(data)
                else:
                    self.received += len(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.transport.abort()
