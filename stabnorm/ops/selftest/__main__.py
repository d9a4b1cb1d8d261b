"""`python -m stabnorm.ops.selftest` compares all backends, prints the result and records it.

Args: --device cpu|cuda|cuda:N ... Default: all devices.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from stabnorm.ops import tested
from stabnorm.ops.selftest import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and record; return the number of backends that failed."""
    parser = argparse.ArgumentParser(prog="python -m stabnorm.ops.selftest", description=compare.__module__)
    everything = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    parser.add_argument("--device", nargs="+", default=everything)
    failed = 0
    for device in map(torch.device, parser.parse_args(arguments).device):
        passed = []
        for op, backend, wrong in compare(device):
            print(f"{device}  {op.name:20}  {backend:9}  {wrong[0] if wrong else 'passed'}", flush=True)
            failed += bool(wrong)
            if backend == "triton" and not wrong:
                passed.append(op.name)
        if passed:
            print(f"{device}: recorded in {tested.record(device.index, passed)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
