"""Benchmarks run; what they measure is for the README, not for a test."""

import pytest

from benchmarks import monitor_overhead


def test_the_overhead_benchmark_prints_a_row_for_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    monitor_overhead.main(["--rounds", "2", "--batch", "1"])
    printed = capsys.readouterr().out
    for preset in ("economy", "standard"):
        assert f"| {preset} |" in printed
    assert "bare step:" in printed
