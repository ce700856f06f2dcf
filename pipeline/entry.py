"""Where the command begins: signals are heard before anything is imported that takes time."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GO_ON = ("edit", "evaluate", "basis", "geometry", "demo")  # the commands that go on where they were stopped


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # one that comes now waits
    from pipeline.common import stopping

    stopping.listen(goes_on=bool(given) and given[0] in GO_ON)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    try:
        from pipeline.cli import main as run

        run(given)
    finally:
        stopping.leave()


if __name__ == "__main__":
    main()
