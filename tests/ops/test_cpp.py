"""The C++ backend for CPUs: it is built only on request, kept, may be missing, and is the same in compiled graphs."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from stabnorm import StabilityMonitor
from stabnorm.functional.moments import RAW
from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.ops import backends, use_kernels
from stabnorm.ops.cpp import build, library
from stabnorm.ops.moments import Request, add_moments_
from stabnorm.ops.one_pass import affine_with_square
from stabnorm.ops.rows import moments_of_rows, sums_of_rows


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """The kernels share their rows out; the other tests run on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a new process with an empty cache."""
    monkeypatch.setenv("STABNORM_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_failure", None)
    library._load.cache_clear()
    yield tmp_path
    library._load.cache_clear()


@pytest.fixture
def compiler() -> None:
    reason = library.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cpp(compiler: None) -> Iterator[None]:
    with use_kernels("cpp"):
        yield


@pytest.mark.usefixtures("not_loaded")
def test_nothing_is_built_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_called(*_: object) -> None:
        raise AssertionError("a compiler was called")

    monkeypatch.setattr(build, "run", not_called)
    with use_kernels("aten"):
        assert "cpp: STABNORM_KERNELS is aten" in str(backends(["cpu"]))
        RepBN(8)(torch.randn(4, 8))
    with use_kernels("cpp"), pytest.raises(AssertionError, match="a compiler was called"):
        backends(["cpu"])


@pytest.mark.parametrize(("compiler_", "why"), [("false", "false failed: exit status 1"), ("nowhere/c++", "nowhere")])
def test_without_a_working_compiler_aten_run_and_one_warning_says_why(
    compiler_: str, why: str, not_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler_)
    x = torch.randn(9, 8)
    with use_kernels("cpp"), caplog.at_level(logging.WARNING, "stabnorm"):
        assert moments_of_rows.chosen(x) == "aten"
        RepBN(8)(x)
        assert why in str(backends(["cpu"]))
    assert len(caplog.records) == 1
    assert why in caplog.text
    assert list(not_loaded.iterdir()) == []


@pytest.mark.usefixtures("compiler")
def test_cxx_may_be_a_path_with_a_space_or_a_command_with_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "my compiler"
    script.write_text(f'#!/bin/sh\nexec {build.compiler()[0]} "$@"\n')
    script.chmod(0o755)
    for value, command in (
        (str(script), [str(script)]),
        (f"'{script}' -DTHIS='a b'", [str(script), "-DTHIS=a b"]),
        ("ccache g++", ["ccache", "g++"]),
    ):
        monkeypatch.setenv("CXX", value)
        assert build.compiler() == command
    monkeypatch.setenv("CXX", str(script))
    assert "__cplusplus" in build.run(build.compiler(), "-dM", "-E", "-x", "c++", "/dev/null")


def test_flags_that_a_compiler_does_not_know_are_left_out(
    not_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built: list[tuple[str, ...]] = []

    def like_apples(compiler: list[str], *arguments: str) -> str:
        if "-march=native" in arguments or "-fopenmp" in arguments:
            raise build.NotBuilt("unknown argument")
        if "-shared" in arguments:
            built.append(arguments)
            Path(arguments[-1]).write_bytes(b"")
        return "what it defines"

    monkeypatch.setattr(build, "run", like_apples)
    monkeypatch.setattr(library, "THREADS", (library.OPENMP, ()))
    with caplog.at_level(logging.INFO, "stabnorm"):
        assert library._built().parent == not_loaded
    assert "-mcpu=native" in built[0]
    assert "runs on one thread" in caplog.text


@pytest.mark.usefixtures("not_loaded")
def test_no_compiler_at_all_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert library.why_not() == "no C++ compiler found. Install g++ or clang++, or set CXX"


@pytest.mark.usefixtures("compiler")
def test_what_was_built_is_found_again(not_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    run = build.run

    def counted(compiler: list[str], *arguments: str) -> str:
        if "-shared" not in arguments:
            return run(compiler, *arguments)
        built.append(compiler[0])
        Path(arguments[-1]).write_bytes(b"")
        return ""

    monkeypatch.setattr(build, "run", counted)
    first, second = library._built(), library._built()
    assert first == second
    assert len(built) == 1
    monkeypatch.setattr(library, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert library._built() != first
    assert len(built) == 2
    assert len(list(not_loaded.iterdir())) == 4  # each with its digest, and no draft


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_change_nothing_but_the_last_digits(dtype: torch.dtype) -> None:
    x, dy = (torch.randn(2, 3001, 70) * 3 + 1).to(dtype).unbind()
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            moments = moments_of_rows(x, None, center=True)
            mean, square = moments.mean, moments.square
            assert mean is not None
            outcomes.append(torch.stack([mean, square, *sums_of_rows(dy, x, mean, None)]))
            again = moments_of_rows(x, None, center=True)
            assert torch.equal(again.square, square)
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-6, atol=3e-3)  # of sums around 500


@pytest.mark.slow
@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("norm", [RepBN, UnifiedNorm, PowerNorm, PRepBN, functools.partial(PowerNorm, groups=3)])
def test_a_compiled_module_calls_them_and_gives_what_eager_gives(
    norm: Callable[[int], nn.Module], masked: bool
) -> None:
    torch.compiler.reset()
    module, twin = norm(24), norm(24)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    mask = torch.rand(5, 9) < 0.7 if masked else None
    for _ in range(2):
        x, dy = torch.randn(5, 9, 24), torch.randn(5, 9, 24)
        results: list[Tensor] = []
        for forward in (module, compiled):
            x = x.detach().requires_grad_()
            y = forward(x, mask)
            y.backward(dy)
            assert x.grad is not None
            results += [y.detach(), x.grad]
        torch.testing.assert_close(results[:2], results[2:], rtol=1e-6, atol=1e-6)
    for name, buffer in module.state_dict().items():
        torch.testing.assert_close(buffer, twin.state_dict()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("cpp")
def test_the_ops_tell_the_truth_about_themselves() -> None:
    rows, dy, vector = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)
    valid, ops = torch.rand(6) < 0.5, torch.ops.stabnorm
    for op, arguments in (
        (ops.cpp_batch_moments, (rows, valid, True)),
        (ops.cpp_affine, (rows, vector, None)),
        (ops.cpp_sums, (dy, rows, vector, valid)),
        (ops.cpp_gradient, (dy, rows, None, None, vector, vector, vector)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("cpp")
def test_layouts_that_are_not_rows_side_by_side() -> None:
    x = torch.randn(4, 12, 5, 6).to(memory_format=torch.channels_last)
    norm, upstream = RepBN(12, channel_dim=1), torch.randn(4, 12, 1, 1).expand(4, 12, 5, 6)
    results = []
    for setting in ("cpp", "reference"):
        with use_kernels(setting):
            leaf = x.detach().requires_grad_()
            y = norm(leaf)
            y.backward(upstream)
            assert leaf.grad is not None
            results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_monitor_sees_the_same_with_them() -> None:
    histories = []
    for setting in ("cpp", "aten"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.RMSNorm(16), nn.Linear(16, 4))
        with use_kernels(setting), StabilityMonitor(model, flush_every=3) as monitor:
            for _ in range(5):
                for _ in range(2):  # micro-batches merge
                    model(torch.randn(7, 9, 8)).backward(torch.randn(7, 9, 4))
                monitor.step()
            histories.append(monitor.history())
    for name, values in histories[0].items():
        torch.testing.assert_close(values, histories[1][name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("apart", [0.0, 1.0, 30.0, 1e4], ids="means apart by {}".format)
@pytest.mark.parametrize("channels", [5, 64, 97])
@pytest.mark.usefixtures("cpp")
def test_the_figures_of_tokens_are_exact_however_far_their_means_lie_apart(apart: float, channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(23, channels) + apart * torch.randn(23, 1)
    for valid in (None, torch.arange(23) % 5 != 2):
        into = RAW.one(channels)
        add_moments_(x, valid, into, Request("layer", 1e-5))
        tokens = x.double() if valid is None else x[valid].double()
        std, mean = tokens.std(1, correction=0), tokens.mean(1)
        expected = [std.mean(), mean.mean(), 0, std.min(), mean.min(), std.max(), mean.max()]
        torch.testing.assert_close(into.token.double(), torch.tensor(expected).double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("setting", ["aten", "cpp"])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_both_norms_at_once_are_the_one_or_the_other_bit_for_bit_at_the_ends(lam: float, setting: str) -> None:
    norm = PRepBN(40)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    norm.lam.fill_(lam)
    alone: nn.Module = copy.deepcopy(norm.rep)
    if lam == 1:
        alone = nn.LayerNorm(40)
        alone.load_state_dict({name: norm.get_parameter(name) for name in ("weight", "bias")})
    idle = norm.rep if lam == 1 else nn.ParameterList([norm.get_parameter("weight"), norm.get_parameter("bias")])
    busy = {name: norm.get_parameter(name if lam == 1 else f"rep.{name}") for name, _ in alone.named_parameters()}
    for dtype in (torch.float32, torch.bfloat16):
        norm, alone = norm.to(dtype), alone.to(dtype)
        x, dy = torch.randn(7, 11, 40).to(dtype), torch.randn(7, 11, 40).to(dtype)
        results: list[Tensor] = []
        with use_kernels(setting):
            for module in (norm, alone):
                module.zero_grad()
                leaf = x.clone().requires_grad_()
                y = module(leaf)
                y.backward(dy)
                assert leaf.grad is not None
                results += [y.detach(), leaf.grad]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, busy[name].grad), name  # type: ignore[arg-type]
        assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())


@pytest.mark.usefixtures("cpp")
def test_the_ops_of_both_norms_at_once_tell_the_truth_about_themselves() -> None:
    rows, dy, vector, token = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8), torch.rand(6)
    lam, ops = torch.tensor(0.5), torch.ops.stabnorm
    for op, arguments in (
        (ops.cpp_blended_norm, (lam, rows, vector, None, 1e-5, vector, vector)),
        (ops.cpp_blended_sums, (lam, dy, rows, None, None, token, token)),
        (
            ops.cpp_blended_gradient,
            (lam, dy, rows, None, vector, None, 1e-5, vector, vector, None, None, token, token, *[vector] * 5),
        ),
        (ops.cpp_scale_groups, (rows, 2, 1e-5)),
        (ops.cpp_gradient_of_groups, (dy, rows, torch.rand(6, 2), False)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("cpp")
def test_tensors_without_memory_are_left_to_aten() -> None:
    with FakeTensorMode():
        x = torch.empty(6, 8)
        assert moments_of_rows.chosen(x) == "aten"
        assert RepBN(8)(x).shape == (6, 8)


@pytest.mark.usefixtures("cpp")
def test_moving_lam_compiles_nothing_anew() -> None:
    torch.compiler.reset()
    norm = PRepBN(24)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, fullgraph=True, backend=counter)
    twin = copy.deepcopy(norm)
    for lam in (1.0, 0.7, 0.0):
        x, dy = torch.randn(5, 9, 24), torch.randn(5, 9, 24)
        for module, forward in ((norm, compiled), (twin, twin)):
            module.lam.fill_(lam)
            forward(x).backward(dy)
    assert counter.frame_count == 1
    for (name, parameter), other in zip(norm.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.usefixtures("cpp")
def test_powernorm_takes_one_pass_past_its_warm_up_only_and_trains_as_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert affine_with_square.find("cpp") is not None
    one_pass, calls = affine_with_square.on("cpp"), []

    def counted(rows: Tensor, valid: Tensor | None, scale: Tensor, shift: Tensor | None, guess: bool = True) -> Any:
        calls.extend([len(rows)] if guess else [])
        return one_pass(rows, valid, scale, shift, guess)

    monkeypatch.setitem(affine_with_square._runs, "cpp", counted)
    norm = PowerNorm(19, warmup_steps=2)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    other = copy.deepcopy(norm)
    for step in range(5):
        x, dy = torch.randn(2, 40 + step, 19).unbind()
        mask = torch.rand(40 + step) < 0.8
        outcomes = []
        for module, setting in ((norm, "cpp"), (other, "reference")):
            given = x.clone().requires_grad_()
            with use_kernels(setting):
                y = module(given, mask)
                outcomes.append([y, *torch.autograd.grad(y, [given, *module.parameters()], dy)])
        for got, want in zip(*outcomes, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert calls == [42, 43, 44]  # and none of the warm-up
    for name, value in other.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("reentrant", [False, True])
def test_powernorm_under_a_checkpoint_across_the_end_of_its_warm_up(reentrant: bool) -> None:
    norm = PowerNorm(7, warmup_steps=2)
    other = copy.deepcopy(norm)
    for _ in range(4):
        x, dy = torch.randn(2, 9, 7).unbind()
        plain, given = x.clone().requires_grad_(), x.clone().requires_grad_()
        want = other(plain)
        y = checkpoint(norm, given, use_reentrant=reentrant)
        torch.testing.assert_close(torch.autograd.grad(want, plain, dy)[0], _gradient(y, given, dy))
        torch.testing.assert_close(y, want)
    assert norm.step == other.step == 4


def _gradient(y: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    y.backward(dy)  # a reentrant checkpoint takes no grad()
    assert x.grad is not None
    return x.grad
