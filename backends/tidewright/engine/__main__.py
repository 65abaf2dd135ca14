"""`python -m tidewright.engine FD`: one engine, told what to do over the inherited socket FD. Started by the bridge."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection
from typing import NoReturn, TypeVar

import msgspec

from tidewright import logs
from tidewright.distributed.ranks import RankError, Ranks
from tidewright.engine.messages import Begin, Configure, Failed, ToEngine, decode_to_engine, encode
from tidewright.engine.torch_import import importing_torch
from tidewright.parent_death import end_now, signal_on_parent_death


def main() -> NoReturn:
    end_now(_run())


def _run() -> int:
    logs.set_up_child("spare_engine")
    # The end of the socket also tells that the bridge died, but not while a step holds the interpreter.
    signal_on_parent_death(signal.SIGKILL)
    # Ctrl-C reaches the whole process group; when the engine ends is for its supervisor to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    ranks: Ranks | None = None
    try:
        config = _expect(Configure, connection).config
        # While one stands by, another may still have the one address where the ranks of other hosts come to.
        if config.tensor_parallel_size > 1 and config.nodes == 1:
            ranks = Ranks(config)
        # Imports torch, which takes a second; the other ranks do so at the same time.
        with importing_torch():
            from tidewright.engine.process import EngineProcess

        begin = _expect(Begin, connection)
        config = msgspec.structs.replace(config, **msgspec.structs.asdict(begin))
        logs.rename("fallback_engine" if config.is_onnx else "engine")
        if config.nodes > 1:
            ranks = Ranks(config)
        return EngineProcess(connection).run(config, ranks)
    except EOFError:
        return 0
    except (RankError, msgspec.ValidationError) as error:
        connection.send_bytes(encode(Failed(str(error))))
        return 1
    finally:
        if ranks:
            ranks.close()


_Message = TypeVar("_Message", bound=ToEngine)


def _expect(kind: type[_Message], connection: Connection) -> _Message:
    """Raises EOFError, or a ValidationError if the bridge says something else."""
    message = decode_to_engine(connection.recv_bytes())
    if not isinstance(message, kind):
        raise msgspec.ValidationError(f"expected {kind.__name__}, not {type(message).__name__}")
    return message


if __name__ == "__main__":
    main()
