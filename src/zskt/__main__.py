"""The command `zskt`, also as `python -m zskt`."""

import os
import signal
import sys
import types


def main() -> int:
    """Load and run the command line; a Ctrl-C while torch is loaded, which takes seconds, ends it in one line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from zskt.cli.main import main as command

    signal.signal(signal.SIGINT, before)
    status = command()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # one of several: torch's threads may abort it while it is taken down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _leave(signum: int, frame: types.FrameType | None) -> None:
    """Leave at once: an exception may end up anywhere in what is being imported."""
    os.write(2, b"zskt: interrupted\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
