"""`python -m tidewright.engine FD`: one engine, told what to do over the inherited socket FD. Started by the bridge."""

from __future__ import annotations

import logging
import signal
import sys
from multiprocessing.connection import Connection

from tidewright.engine.process import EngineProcess
from tidewright.parent_death import signal_on_parent_death


def main() -> int:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    # The end of the socket also tells that the bridge died, but not while a step holds the interpreter.
    signal_on_parent_death(signal.SIGKILL)
    # Ctrl-C reaches the whole process group; when the engine ends is for its supervisor to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return EngineProcess(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    sys.exit(main())
