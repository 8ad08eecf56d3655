"""`python -m stages ...` is `videodiff ...`, for places where the command is not on the path."""

from stages.cli import main

main()
