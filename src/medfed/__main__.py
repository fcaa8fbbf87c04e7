"""`python -m medfed` is `medfed`."""

from medfed.cli import main

main()
