"""Mutated inputs, each run within bounds of time and memory. `harness.py` says what a kind of mutants is."""
