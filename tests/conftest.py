"""Fixtures for every test."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: it decides once what its functions are
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
