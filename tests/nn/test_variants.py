"""The published modules through the front door: `variant="official"`, and RepBN as it is, equal every recorded step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {
    "norm1.weight": "weight",
    "norm1.bias": "bias",
    "norm2.bn.weight": "rep.weight",
    "norm2.bn.bias": "rep.bias",
    "norm2.alpha": "rep.eta",
    "bn.weight": "weight",
    "bn.bias": "bias",
    "alpha": "eta",
}


def built(name: str, meta: dict[str, float], channels: int) -> nn.Module:
    if name == "repbn":
        return RepBN(channels, meta["eps"], meta["momentum"])
    if name == "prepbn":
        return PRepBN(channels, meta["eps"], momentum=meta["momentum"], variant="official")
    if name == "powernorm":
        settings = meta["alpha_fwd"], meta["alpha_bkw"], meta["eps"]
        return PowerNorm(channels, int(meta["groups"]), int(meta["warmup"]), *settings, variant="official")
    forward = int(meta.get("window", meta.get("window_fwd", 0)))
    return UnifiedNorm(
        channels,
        (forward, int(meta.get("window_bwd", forward))),
        int(meta["warmup"]),
        "official" if meta["filtration"] else None,
        momentum=1 - meta["momentum"],
        eps=meta["eps"],
        variant="official",
    )


def close(got: Tensor | None, want: Tensor, where: str) -> None:
    torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want, rtol=1e-5, atol=1e-5, msg=where)


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_every_recorded_step_is_reproduced(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as file:
        recording = {key: torch.from_numpy(file[key]) for key in file}
    meta = {key[5:]: float(value) for key, value in recording.items() if key.startswith("meta/") and value.numel() == 1}
    norm = built(name, meta, recording["x"].shape[-1])
    parameters = {key[6:]: norm.get_parameter(NAMES.get(key[6:], key[6:])) for key in recording if key[:6] == "param/"}
    for key, parameter in parameters.items():
        parameter.data.copy_(recording[f"param/{key}"])
    for t, (x, dy) in enumerate(zip(recording["x"], recording["gy"], strict=True)):
        if isinstance(norm, PRepBN):
            warm, steps = int(meta["warm"]), int(meta["step"])
            norm.lam.fill_(min(1.0, max(0.0, 1 - (t - warm) / steps)))
            norm.rep.train(t >= warm)  # the published module does not run it before
        x = x.clone().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(dy)
        close(y, recording["y"][t], f"y at step {t}")
        close(x.grad, recording["gx"][t], f"gx at step {t}")
        for key, parameter in parameters.items():
            close(parameter.grad, recording[f"gp/{key}"][t], f"gradient of {key} at step {t}")
    close(norm.eval()(recording["eval_x"]), recording["eval_y"], "eval")
