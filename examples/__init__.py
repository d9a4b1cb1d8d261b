"""Runnable examples: each has a main(), and runs offline on real data that ships with a dependency."""
