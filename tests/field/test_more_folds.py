"""What real models do between a norm and its readers, and what changes nothing of the norm's channels."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabnorm import apply_manifest, fold_norms
from stabnorm.nn import RepBN
from tests.fold.nets import Net, draw, error_of, ready

C, D = 6, 5
Build = Callable[[], nn.Module]


def net(function: Callable[..., Any], **parts: Any) -> nn.Module:
    return ready(Net(function, **{"norm": RepBN(C), "fc": nn.Linear(C, D), **parts}))


def folds(model: nn.Module, *inputs: Tensor) -> Any:
    """Fold, and compare on other inputs in float64; the norm's entry."""
    result = fold_norms(model, inputs)
    others = tuple(1.7 * x + 0.3 if x.is_floating_point() else x for x in inputs)
    assert error_of(result.model, model, [inputs, others]) < 1e-12
    return next(norm for norm in result.norms if norm.name == "norm")


# --- memory formats ---


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_pooled_norm_folds_in_either_memory_format(memory: torch.memory_format, size: int) -> None:
    pool = nn.AdaptiveAvgPool2d(1) if size == 1 else nn.AvgPool2d(size)
    model = net(lambda m, x: m.fc(m.pool(m.norm(x.relu()))), norm=nn.BatchNorm2d(C), pool=pool, fc=nn.Conv2d(C, D, 1))
    model = model.to(torch.float64, memory_format=memory)  # type: ignore[call-overload]
    x = draw(2, C, 10, 10).to(memory_format=memory)
    assert folds(model, x).status == "forward"


# --- what reads a shape only ---


LIKE: dict[str, Callable[[Any, Tensor], Any]] = {
    "zeros_like": lambda m, h: torch.zeros_like(h),
    "ones_like": lambda m, h: torch.ones_like(h),
    "full_like": lambda m, h: torch.full_like(h, 2.0),
    "new_zeros": lambda m, h: h.new_zeros(h.shape),
    "new_ones": lambda m, h: h.new_ones(h.shape),
    "new_full": lambda m, h: h.new_full(h.shape, 2.0),
    "a mask": lambda m, h: torch.ones(h.shape[:-1], dtype=h.dtype)[..., None],
}


@pytest.mark.parametrize("like", LIKE)
def test_a_tensor_made_in_the_shape_of_a_norm_s_output_reads_no_number_of_it(like: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.fc(h) + LIKE[like](m, h)[..., :1]

    assert folds(net(forward), draw(3, 4, C)).status == "forward"


# --- conditions that are broadcast ---


def modulated(m: Any, x: Tensor, c: Tensor) -> Any:
    shift, scale = m.ada(c).unsqueeze(1).chunk(2, -1)
    return m.fc(m.norm(x) * (1 + scale) + shift)


def test_a_shift_that_is_broadcast_over_the_tokens_goes_with_the_stream() -> None:
    model = net(lambda m, x, c: m.fc(m.norm(x) + m.ada(c).unsqueeze(1)), ada=nn.Linear(D, C))
    assert folds(model, draw(2, 3, C), draw(2, D)).status == "residual"


def test_a_shift_and_a_scale_that_are_broadcast_let_a_norm_without_a_mean_go() -> None:
    model = net(modulated, norm=RepBN(C, center=False), ada=nn.Linear(D, 2 * C))
    assert folds(model, draw(2, 3, C), draw(2, D)).status == "residual"


def test_a_scale_from_the_input_keeps_a_norm_with_a_mean_and_says_why() -> None:
    norm = folds(net(modulated, ada=nn.Linear(D, 2 * C)), draw(2, 3, C), draw(2, D))
    assert norm.status == "affine"
    assert "multiplies it by what depends on the input" in norm.reason


# --- how torch runs a layer ---


def test_a_layer_that_torch_runs_in_two_ways_is_one_layer() -> None:
    """A product and a sum on one input, one call with the bias on another: contiguous or not."""
    model = net(lambda m, x, y: m.fc(m.norm(x)).mean() + m.fc(m.norm(y)).square())
    assert folds(model, draw(3, C), draw(4, 3, C).transpose(0, 1)).status == "forward"


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_experts_in_one_grouped_product_are_linear_layers() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = RepBN(16, center=False), nn.Parameter(torch.empty(3, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([2, 2, len(x)], dtype=torch.int32)
            return torch._grouped_mm(self.norm(x), self.weight.transpose(-2, -1), offs=ends)

    model = ready(Grouped()).float()
    result = fold_norms(model, draw(5, 16).float())
    assert result.norms[0].status == "forward"
    x = draw(6, 16, seed=1).float()
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


# --- memory that the norm had rewritten ---


class Viewed(nn.Module):
    """Patches in channels-first memory, a norm, and a view that needs the norm's contiguous output."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.out = nn.Conv2d(3, C, 4, 4), RepBN(C), nn.Linear(2 * C, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).relu().flatten(2).transpose(1, 2)).contiguous()
        y: Tensor = self.out(x.view(len(x), -1, 2 * C))
        return y


class ViewedAtOnce(Viewed):
    """The same, where only the norm made the memory contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        x = Rewritten.apply_to(self.norm, self.patch(x).relu().flatten(2).transpose(1, 2))
        y: Tensor = self.out(x.view(len(x), -1, 2 * C))
        return y


class Rewritten(RepBN):
    """Returns contiguous memory, as LayerNorm does."""

    @staticmethod
    def apply_to(norm: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = norm(x)
        return y

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).contiguous()


@pytest.mark.parametrize("model", [Viewed, ViewedAtOnce])
def test_a_view_behind_a_norm_finds_the_memory_that_the_norm_returned(model: type[Viewed]) -> None:
    built = model()
    built.norm = Rewritten(C)
    norm = folds(ready(built), draw(2, 3, 8, 8))
    assert norm.status == "forward"


class ChannelsLastNorm(nn.BatchNorm2d):
    """Returns channels-last memory whatever it reads, as a LayerNorm over the channels of an image does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activated", [False, True], ids=["folded", "a multiply-add"])
def test_a_view_of_an_image_in_channels_last_memory_finds_that_memory(
    memory: torch.memory_format, activated: bool
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(m.conv(x).relu()).permute(0, 2, 3, 1)
        return m.fc((h.sigmoid() if activated else h).view(-1, C))

    model = net(forward, conv=nn.Conv2d(3, C, 2), norm=ChannelsLastNorm(C))
    x = draw(2, 3, 5, 5).to(memory_format=memory)
    assert folds(model, x).status == ("affine" if activated else "forward")
    result = fold_norms(model, x)
    stand_in: Any = result.model.norm
    assert stand_in.axes == (1, 3)
    fresh = apply_manifest(ready(Net(forward, **dict(model.named_children()))), json.loads(json.dumps(result.manifest)))
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh(x), result.model(x))
    y = torch.randn(2, C, 4, 4)
    readers: list[Any] = [torch.fx.symbolic_trace(stand_in), torch.jit.script(stand_in)]
    for read in readers:
        assert read(y).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(read(y), stand_in(y))


# --- patches, enlarged images, padding ---

MOVED: dict[str, tuple[Callable[[Any, Tensor], Any], nn.Module, nn.Module]] = {
    "nearest": (
        lambda m, x: m.fc(nn.functional.interpolate(m.norm(x), scale_factor=2)), nn.BatchNorm2d(C), nn.Conv2d(C, D, 1)
    ),
    "nearest-exact": (
        lambda m, x: m.fc(nn.functional.interpolate(m.norm(x), scale_factor=2, mode="nearest-exact")),
        nn.BatchNorm2d(C), nn.Conv2d(C, D, 1),
    ),
    "patches": (
        lambda m, x: m.fc(nn.functional.unfold(m.norm(x), 2, stride=2).mT), nn.BatchNorm2d(C), nn.Linear(4 * C, D)
    ),
    "turned": (lambda m, x: m.fc(m.norm(x).rot90(1, (2, 3))), nn.BatchNorm2d(C), nn.Conv2d(C, D, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
def test_what_only_moves_elements_passes_a_norm_s_channels(case: str) -> None:
    forward, norm, fc = MOVED[case]
    assert folds(net(forward, norm=norm, fc=fc), draw(2, C, 4, 4)).status == "forward"


def test_patches_with_padding_keep_a_shift_and_pass_a_scale() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.norm(x.movedim(1, -1)).movedim(-1, 1)
        return m.fc(nn.functional.unfold(y, 3, padding=1).mT)

    shifted = folds(net(forward, fc=nn.Linear(9 * C, D)), draw(2, C, 4, 4))
    assert shifted.status == "affine"
    assert "zeros of a padding" in shifted.reason
    scaled = folds(net(forward, norm=RepBN(C, center=False), fc=nn.Linear(9 * C, D)), draw(2, C, 4, 4))
    assert scaled.status == "forward"


def test_padding_that_is_set_to_zero_passes_a_scale() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        valid = torch.arange(x.shape[1]) < 3
        return m.fc(torch.where(valid[:, None], m.norm(x), 0.0))

    assert folds(net(forward, norm=RepBN(C, center=False)), draw(2, 4, C)).status == "forward"
    assert folds(net(forward), draw(2, 4, C)).status == "affine"


# --- a bias that is joined on the way ---


class JoinsItsBias(nn.Module):
    """As in BEiT and EVA-02: queries and values have a bias, keys have zeros."""

    k_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = RepBN(C), nn.Linear(C, 3 * C, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("k_bias", torch.zeros(C), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(self.norm(x), self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = y.chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v + k


def test_a_bias_joined_from_parameters_and_zeros_takes_the_shift_in() -> None:
    model = ready(JoinsItsBias())
    model.get_buffer("k_bias").zero_()
    assert folds(model, draw(2, 3, C)).status == "forward"
    result = fold_norms(model, draw(2, 3, C))
    fresh = apply_manifest(JoinsItsBias().double().eval(), result.manifest)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(fresh(draw(2, 3, C)), result.model(draw(2, 3, C)))
    assert not isinstance(model.k_bias, nn.Parameter)


def test_a_joined_bias_that_is_read_elsewhere_keeps_its_norm() -> None:
    class Reads(JoinsItsBias):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.q_bias.exp()

    norm = folds(ready(Reads()), draw(2, 3, C))
    assert norm.status == "affine"
    assert "'q_bias' is also read by" in norm.reason


# --- linear layers of other classes ---


class OwnLinear(nn.Linear):
    """As in Falcon: the same, in two operations."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class LeavesItsBiasOut(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


def test_a_linear_layer_of_another_class_gets_a_bias_if_it_adds_it() -> None:
    assert folds(net(lambda m, x: m.fc(m.norm(x)), fc=OwnLinear(C, D, bias=False)), draw(3, C)).status == "forward"
    norm = folds(net(lambda m, x: m.fc(m.norm(x)), fc=LeavesItsBiasOut(C, D, bias=False)), draw(3, C))
    assert norm.status == "affine"
    assert "rolled back" in norm.reason
