"""Fused reductions. One name, one op: `<op>.py` checks and dispatches; a faster body lies beside it."""
