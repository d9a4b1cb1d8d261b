"""The benchmark runs; what it measures is for the README, not for a test."""

import pytest

from benchmarks import norm_modules


def test_the_norm_benchmark_prints_a_row_for_each_module(capsys: pytest.CaptureFixture[str]) -> None:
    norm_modules.main(["--rounds", "2", "--shapes", "128x16", "--no-compile"])
    printed = capsys.readouterr().out
    assert "128 x 16, float32" in printed
    assert "128 x 16, bfloat16" in printed
    for module in ("nn.RMSNorm", *(f"published {name}" for name in ("RepBN", "UnifiedNorm", "PRepBN", "PowerNorm"))):
        assert printed.count(f"| {module} |") == 2


def test_a_shape_that_does_not_split_into_batches_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        norm_modules.main(["--shapes", "100x16"])
    assert "'100x16': rows must be a positive multiple of 64" in capsys.readouterr().err
