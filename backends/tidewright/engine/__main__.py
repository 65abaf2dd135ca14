"""`python -m tidewright.engine FD`: one engine, told what to do over the inherited socket FD. Started by the bridge."""

from __future__ import annotations

import logging
import signal
import sys
from multiprocessing.connection import Connection

from tidewright.engine.messages import Configure, Failed, decode_to_engine, encode
from tidewright.engine.ranks import RankError, Ranks
from tidewright.parent_death import signal_on_parent_death


def main() -> int:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    # The end of the socket also tells that the bridge died, but not while a step holds the interpreter.
    signal_on_parent_death(signal.SIGKILL)
    # Ctrl-C reaches the whole process group; when the engine ends is for its supervisor to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    ranks: Ranks | None = None
    try:
        first = decode_to_engine(connection.recv_bytes())
        if not isinstance(first, Configure):
            raise RankError(f"the first message must be configure, not {type(first).__name__}")
        if first.config.tensor_parallel_size > 1:
            ranks = Ranks(first.config)
            ranks.start()
    except EOFError:
        return 0
    except RankError as error:
        connection.send_bytes(encode(Failed(str(error))))
        return 1
    # Imports torch, which takes a second; the other ranks do so at the same time.
    from tidewright.engine.process import EngineProcess

    try:
        return EngineProcess(connection).run(first.config, ranks)
    finally:
        if ranks:
            ranks.close()


if __name__ == "__main__":
    sys.exit(main())
