"""Where a norm may stand, and that it folds there exactly: each case against the unfolded model, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabnorm import fold_norms
from stabnorm.fold import FoldedNorm
from stabnorm.nn import RepBN, UnifiedNorm
from tests.fold.nets import Net, draw, error_of, net, ready

C, D = 6, 5  # channels of the norm, width of what reads it


@dataclass(frozen=True)
class Case:
    """A model, the shape of its input, and what becomes of each norm."""

    build: Callable[[], nn.Module]
    statuses: dict[str, str]
    shape: tuple[int, ...] = (3, 4, C)


def norm(channels: int = C, **options: Any) -> RepBN:
    return RepBN(channels, **options)


def reader(function: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """A norm, something between, and a linear layer."""
    return net(function, norm=norm(), fc=nn.Linear(C, D), **parts)


FORWARD, BACKWARD = {"norm": "forward"}, {"norm": "backward"}


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attn = norm(), nn.MultiheadAttention(C, 2, batch_first=True, **options)
        self.memory_norm = norm(options.get("kdim", C))
        self.memory = nn.Linear(C, options.get("kdim", C))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory_norm(F.gelu(self.memory(x)))
        y: Tensor = self.attn(self.norm(x), memory, memory, need_weights=False)[0]
        return y


def conv_net(conv: nn.Module, center: bool = False) -> Callable[[], nn.Module]:
    return net(lambda m, x: m.conv(m.norm(x)), norm=norm(channel_dim=1, center=center), conv=conv)


def before_conv(conv: nn.Module, channels: int) -> Callable[[], nn.Module]:
    return net(lambda m, x: F.gelu(m.norm(m.conv(x))), norm=norm(channels, channel_dim=1), conv=conv)


class PostNorm(nn.Module):
    """Two post-norm blocks, between which there may be a layer scale."""

    def __init__(self, layer_scale: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm() for _ in range(3)])
        self.branches = nn.ModuleList(
            [nn.Sequential(nn.Linear(C, 9), nn.GELU(), nn.Linear(9, C, bias=i > 0)) for i in range(2)]
        )
        self.layer_scale = nn.Parameter(torch.ones(C)) if layer_scale else None
        self.head = nn.Linear(C, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x)
        for after, branch in zip(self.norms[1:], self.branches, strict=True):
            y = branch(x)
            x = after(x + (y if self.layer_scale is None else self.layer_scale * y))
        return self.head(x)  # type: ignore[no-any-return]


IMAGE = (2, C, 6, 8)
CASES = {
    "dropout in eval": Case(reader(lambda m, x: m.fc(m.drop(m.norm(x))), drop=nn.Dropout(0.5)), FORWARD),
    "to and contiguous": Case(reader(lambda m, x: m.fc(m.norm(x).to(torch.float64).mT.contiguous().mT)), FORWARD),
    "two readers": Case(reader(lambda m, x: m.fc(m.norm(x)) + m.o(m.norm(x)), o=nn.Linear(C, D, bias=False)), FORWARD),
    "one norm called twice": Case(reader(lambda m, x: m.fc(m.norm(x)) - m.fc(m.norm(x.square()))), FORWARD),
    "checkpointed": Case(reader(lambda m, x: checkpoint(lambda t: m.fc(m.norm(t)), x, use_reentrant=False)), FORWARD),
    "in inference mode": Case(reader(torch.inference_mode()(lambda m, x: m.fc(m.norm(x)))), FORWARD),
    "class token": Case(reader(lambda m, x: m.fc(m.norm(x)[:, 0])), FORWARD),
    "mean over tokens": Case(reader(lambda m, x: m.fc(m.norm(x).mean(1))), FORWARD),
    "interpolated": Case(
        reader(lambda m, x: m.fc(F.interpolate(m.norm(x).mT, scale_factor=2.0, mode="linear").mT)), FORWARD
    ),
    "python number": Case(reader(lambda m, x: m.fc(m.norm(x) * C**-0.5)), FORWARD),
    "division and sign": Case(reader(lambda m, x: m.fc(-m.norm(x) / 3)), FORWARD),
    "multiplied per channel": Case(reader(lambda m, x: m.fc(m.norm(x) * m.s), s=nn.Parameter(torch.ones(C))), FORWARD),
    "multiplied by what a parameter says": Case(
        reader(lambda m, x: m.fc((1 + m.s.exp()) * m.norm(x)), s=nn.Parameter(torch.ones(C))), FORWARD
    ),
    "beside raw features": Case(
        net(lambda m, x: m.fc(torch.cat([m.norm(x), x], -1)), norm=norm(), fc=nn.Linear(2 * C, D)), FORWARD
    ),
    "two norms side by side": Case(
        net(
            lambda m, x: m.fc(torch.cat([m.norm(x), m.other(x.sin())], -1)),
            norm=norm(),
            other=norm(),
            fc=nn.Linear(2 * C, D),
        ),
        {"norm": "forward", "other": "forward"},
    ),
    "half folds, half was refused": Case(
        net(
            lambda m, x: m.fc(torch.cat([m.norm(x), m.other(x)], -1)) + m.other(x).sum(-1, keepdim=True).sigmoid(),
            norm=norm(),
            other=norm(),
            fc=nn.Linear(2 * C, D),
        ),
        {"norm": "forward", "other": "affine"},
    ),
    "tokens to features": Case(
        net(lambda m, x: m.fc(m.norm(x).flatten(1)), norm=norm(), fc=nn.Linear(4 * C, D)), FORWARD
    ),
    "space to depth": Case(
        net(
            lambda m, x: m.conv(F.pixel_unshuffle(m.norm(x), 2)), norm=norm(channel_dim=1), conv=nn.Conv2d(4 * C, D, 1)
        ),
        FORWARD,
        IMAGE,
    ),
    "bare matrix and bias": Case(
        net(
            lambda m, x: m.norm(x) @ m.w + m.b,
            norm=norm(),
            w=nn.Parameter(torch.ones(C, D)),
            b=nn.Parameter(torch.ones(D)),
        ),
        FORWARD,
    ),
    "matrix from the left": Case(
        net(
            lambda m, x: m.w @ m.norm(x) + m.b,
            norm=norm(channel_dim=1),
            w=nn.Parameter(torch.ones(D, C)),
            b=nn.Parameter(torch.ones(D, 1)),
        ),
        FORWARD,
        (3, C, 4),
    ),
    "einsum": Case(
        net(
            lambda m, x: torch.einsum("blc,chd->bhld", m.norm(x), m.w),
            norm=norm(center=False),
            w=nn.Parameter(torch.ones(C, 2, D)),
        ),
        FORWARD,
    ),
    "experts, scale only": Case(
        net(
            lambda m, x: torch.bmm(m.norm(x).expand(3, -1, -1), m.w),
            norm=norm(center=False),
            w=nn.Parameter(torch.ones(3, C, D)),
        ),
        FORWARD,
        (1, 4, C),
    ),
    "slices of one parameter": Case(
        net(
            lambda m, x: F.linear(m.norm(x), m.w[:D], m.b[:D]) * F.linear(x, m.w[D:], m.b[D:]),
            norm=norm(),
            w=nn.Parameter(torch.ones(2 * D, C)),
            b=nn.Parameter(torch.ones(2 * D)),
        ),
        FORWARD,
    ),
    "one vector": Case(reader(lambda m, x: m.fc(m.norm(x)[0, 0])), FORWARD),
    "frozen behind the stream": Case(
        net(lambda m, x: (lambda h: m.last(h + m.fc(h)))(m.norm(x)), norm=norm(), last=norm(), fc=nn.Linear(C, C)),
        {"norm": "residual", "last": "affine"},
    ),
    "norm into norm": Case(
        reader(lambda m, x: m.fc(m.after(m.norm(x) * 0.5)), after=norm()), {"norm": "forward", "after": "forward"}
    ),
    "cross-attention": Case(SelfAttention, {"norm": "forward", "memory_norm": "forward"}),
    "cross-attention, other width": Case(
        lambda: SelfAttention(kdim=7, vdim=7), {"norm": "forward", "memory_norm": "forward"}
    ),
    "cross-attention, other width, bias-free": Case(
        lambda: SelfAttention(kdim=7, vdim=7, bias=False), {"norm": "forward", "memory_norm": "forward"}
    ),
    "cross-attention, bias-free": Case(
        lambda: SelfAttention(bias=False), {"norm": "forward", "memory_norm": "forward"}
    ),
    "convolution": Case(conv_net(nn.Conv2d(C, D, 3, stride=2), center=True), FORWARD, IMAGE),
    "padded convolution, scale only": Case(conv_net(nn.Conv2d(C, D, 3, padding=1, bias=False)), FORWARD, IMAGE),
    "grouped convolution": Case(conv_net(nn.Conv2d(C, 8, 2, groups=2), center=True), FORWARD, IMAGE),
    "depthwise convolution": Case(conv_net(nn.Conv2d(C, C, 2, groups=C, bias=False), center=True), FORWARD, IMAGE),
    "transposed convolution, scale only": Case(conv_net(nn.ConvTranspose2d(C, 8, 2, 2, groups=2)), FORWARD, IMAGE),
    "one dimension": Case(conv_net(nn.Conv1d(C, D, 2), center=True), FORWARD, (2, C, 9)),
    "after a convolution": Case(before_conv(nn.Conv2d(C, D, 3, padding=1), D), BACKWARD, IMAGE),
    "after a grouped convolution, bias-free": Case(
        before_conv(nn.Conv2d(C, 8, 1, groups=2, bias=False), 8), BACKWARD, IMAGE
    ),
    "after a transposed grouped convolution": Case(
        before_conv(nn.ConvTranspose2d(C, 8, 3, groups=2), 8), BACKWARD, IMAGE
    ),
    "after a linear": Case(net(lambda m, x: m.norm(m.fc(x)).relu(), norm=norm(D), fc=nn.Linear(C, D)), BACKWARD),
    "many features to one channel": Case(
        net(lambda m, x: m.norm(m.fc(x).unflatten(-1, (3, 4))).sin(), norm=norm(4), fc=nn.Linear(C, 12)), BACKWARD
    ),
    "a share of the features": Case(
        net(
            lambda m, x: (lambda h: m.norm(h[..., :D]).tanh() * h[..., D:])(m.fc(x)),
            norm=norm(D),
            fc=nn.Linear(C, 2 * D),
        ),
        BACKWARD,
    ),
    "after a multiplication": Case(
        net(lambda m, x: m.norm(m.fc(x) * m.s).relu(), norm=norm(D), fc=nn.Linear(C, D), s=nn.Parameter(torch.ones(D))),
        BACKWARD,
    ),
    "after a bare matrix and bias": Case(
        net(
            lambda m, x: m.norm(x @ m.w + m.b).relu(),
            norm=norm(D),
            w=nn.Parameter(torch.ones(C, D)),
            b=nn.Parameter(torch.ones(D)),
        ),
        BACKWARD,
    ),
    "post-norm": Case(lambda: PostNorm(False), {"norms.0": "residual", "norms.1": "residual", "norms.2": "forward"}),
    "post-norm with a layer scale": Case(
        lambda: PostNorm(True), {"norms.0": "residual", "norms.1": "residual", "norms.2": "forward"}
    ),
    "padding's zeros, scale only": Case(
        net(lambda m, x: m.fc(F.pad(m.norm(x), (0, 0, 1, 2))), norm=norm(center=False), fc=nn.Linear(C, D)),
        FORWARD,
    ),
    "masked, scale only": Case(
        net(lambda m, x: m.fc(m.norm(x) * (x[..., :1] > 0)), norm=norm(center=False), fc=nn.Linear(C, D)),
        FORWARD,
    ),
    "masked_fill, scale only": Case(
        net(lambda m, x: m.fc(m.norm(x).masked_fill(x[..., :1] > 0, 0.0)), norm=norm(center=False), fc=nn.Linear(C, D)),
        FORWARD,
    ),
    "masked mean, scale only": Case(
        net(
            lambda m, x: m.fc((m.norm(x) * (x[..., :1] > 0)).sum(1) / (x[..., :1] > 0).sum(1).clamp(min=1)),
            norm=norm(center=False),
            fc=nn.Linear(C, D),
        ),
        FORWARD,
    ),
    "recurrent": Case(net(lambda m, x: m.fc(m.norm(x))[0], norm=norm(), fc=nn.LSTM(C, D, batch_first=True)), FORWARD),
    "unified, no bias": Case(
        net(lambda m, x: m.fc(m.norm(x)), norm=UnifiedNorm(C, bias=False), fc=nn.Linear(C, D, bias=False)), FORWARD
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_norm_folds_there_exactly(case: Case) -> None:
    model = ready(case.build())
    result = fold_norms(model, draw(*case.shape))
    assert {n.name: n.status for n in result.norms} == case.statuses, str(result)
    assert not result.vacuous
    assert result.max_rel_error < 1e-12
    assert error_of(result.model, model, [(3 * draw(*case.shape, seed=7) + 1,)]) < 1e-12
    for n in result.norms:
        assert n.status == "affine" or isinstance(result.model.get_submodule(n.name), FoldedNorm)
        assert n.into or n.status == "affine"


def test_a_scale_alone_adds_no_bias() -> None:
    model = ready(Net(lambda m, x: m.fc(m.norm(x)), norm=norm(center=False), fc=nn.Linear(C, D, bias=False)))
    result = fold_norms(model, draw(3, C))
    assert result.model.state_dict().keys() == {"fc.weight"}


def test_a_layer_scale_of_almost_nothing_still_shows_a_fault() -> None:
    model = ready(PostNorm(True))
    with torch.no_grad():
        model.get_parameter("layer_scale").fill_(1e-6)
    result = fold_norms(model, draw(3, 4, C))
    assert [n.status for n in result.norms] == ["residual", "residual", "forward"]
    assert error_of(result.model, model, [(draw(3, 4, C, seed=3),)]) < 1e-12


def test_a_weight_that_autocast_casts_folds() -> None:
    def halved(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.fc(m.norm(x)).float()

    model = ready(Net(halved, norm=norm(), fc=nn.Linear(C, D))).float()
    result = fold_norms(model, draw(3, C).float())
    assert [n.status for n in result.norms] == ["forward"]
    assert error_of(result.model, model, [(draw(3, C, seed=1).float(),)]) < 0.02
