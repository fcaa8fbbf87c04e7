"""A server of a test's own, in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN = "a-token-for-tests-alone"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Run `medfed serve` on a free port; give its address. At its end it must end, and have had
    nothing to say.
    """
    command = [sys.executable, "-m", "medfed", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MEDFED_TOKEN": TOKEN},
    ) as process:
        try:
            assert process.stdout and process.stderr
            told = process.stdout.readline()
            assert told.startswith("open http"), process.stderr.read()
            yield told.removeprefix("open ").split("/?")[0]
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
            assert said == ""
        finally:
            process.kill()
