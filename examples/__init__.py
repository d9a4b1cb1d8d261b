"""Runnable examples. Each has a main(), and runs offline on real data that comes with a dependency."""
