"""The diffusion core on real data: handwritten digits, trained and measured on a CPU by one command.

`python -m benchmarks.digits` writes docs/core-results.md and its pictures; `__main__.py` says how.
"""
