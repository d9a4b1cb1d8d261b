"""What the oldest promised versions of torch and Lightning lack, as reasons to skip a test."""

import importlib.util

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

needs_fsdp_on_cpu = pytest.mark.skipif(TORCH < (2, 7), reason="FSDP2 of torch before 2.7 does not run on a CPU")
needs_quantiles_on_the_device = pytest.mark.skipif(
    TORCH < (2, 7), reason="nanquantile of torch before 2.7 reads a value from the device"
)
needs_stable_hook_guards = pytest.mark.skipif(
    TORCH < (2, 7), reason="Dynamo before torch 2.7 recompiles whenever the same hooks are registered again"
)
needs_triton_without_driver = pytest.mark.skipif(
    TORCH < (2, 7), reason="Triton of torch before 2.7 needs a GPU to trace a kernel"
)
needs_weight_averaging = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_lightning.callbacks.weight_averaging") is None,
    reason="Lightning before 2.6 has no WeightAveraging",
)
