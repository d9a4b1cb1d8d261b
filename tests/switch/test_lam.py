"""What drives a converted model: lam, steps and loss scale reach the norms, and the gap is the gap."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from stabnorm.nn import PowerNorm, PRepBN, RepBN, UnifiedNorm
from stabnorm.switch import BranchGap, progressive_norms, running_norms, write_lam, write_loss_scale, write_step
from tests.watchers import watchers


def model() -> nn.Sequential:
    made = nn.Sequential(PRepBN(6), nn.Linear(6, 6), PRepBN(6, kind="rms"), UnifiedNorm(6), PowerNorm(6), RepBN(6))
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return made


def test_each_layer_gets_its_lam_and_the_norms_are_left_out_when_all_are_0() -> None:
    norms = progressive_norms(model())
    assert list(norms) == ["0", "2"]
    buffers = [norm.lam for norm in norms.values()]
    for lam, left_out in (((0.5, 0.25), False), ((0.0, 0.25), False), ((0.0, 0.0), True), ((0.0, 1.0), False)):
        write_lam(norms.values(), lam)
        assert [float(norm.lam) for norm in norms.values()] == list(lam)
        assert [norm.leave_out_norm for norm in norms.values()] == [left_out] * 2
    write_lam(norms.values(), (0.0, 1.0), settled=True)
    assert [norm.leave_out_norm for norm in norms.values()] == [True, False]
    assert all(norm.lam is buffer for norm, buffer in zip(norms.values(), buffers, strict=True))


def test_a_lam_too_many_or_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="lam holds 1 numbers, and there are 2 norms"):
        write_lam(progressive_norms(model()).values(), [0.5])


def test_written_steps_replace_the_count_of_forwards() -> None:
    made = model()
    norms = running_norms(made)
    assert list(norms) == ["0.rep", "2.rep", "3", "4", "5"]
    write_step(norms.values(), 7)
    for _ in range(3):
        made(torch.randn(4, 6))
    assert [int(norm.step) for norm in norms.values()] == [7] * 5
    assert [int(norm.progress[0]) for norm in norms.values()] == [3] * 5  # batches are still batches


def test_the_published_variants_count_for_themselves() -> None:
    made = nn.Sequential(UnifiedNorm(6, variant="official"))
    write_step(running_norms(made).values(), 7)
    write_loss_scale(running_norms(made).values(), 8.0)
    made(torch.randn(2, 4, 6))
    assert made[0].official is not None
    assert made[0].official.iters == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [1024.0, torch.tensor([1024.0])])
def test_the_loss_scale_reaches_running_gradient_statistics(scale: Any) -> None:
    plain = nn.Sequential(UnifiedNorm(6, warmup_steps=0), PowerNorm(6, warmup_steps=0))
    scaled = copy.deepcopy(plain)
    write_loss_scale(running_norms(scaled).values(), scale)
    for _ in range(6):
        x, dy = torch.randn(2, 32, 6)
        plain(x).backward(dy)
        scaled(x).backward(1024 * dy)
    for own, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad / 1024, theirs.grad)


def test_the_gap_is_that_of_a_step_in_float64_with_its_micro_batches_and_without_padding() -> None:
    norm = PRepBN(6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    gap = BranchGap([norm, PRepBN(6)])
    gap.attach()
    mask = torch.arange(5) < torch.tensor([[2], [5], [3]])
    squares = torch.zeros(2, dtype=torch.float64)
    gap.armed = True
    for _ in range(2):
        x = torch.randn(3, 5, 6) + 1
        x[~mask] = 1e6
        norm(x, mask)
        exact = copy.deepcopy(norm).double()
        x = x[mask].double()
        of_norm = torch.nn.functional.layer_norm(x, (6,), exact.get_parameter("weight"), exact.get_parameter("bias"))
        z = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        of_rep = z * exact.rep.weight + exact.rep.bias + exact.rep.eta * x  # type: ignore[operator]
        squares += torch.stack([(of_norm - of_rep).square().sum(), of_norm.square().sum()]).detach()
    gap.armed = False
    norm(torch.randn(3, 5, 6))
    norm.eval()
    gap.armed = True
    norm(torch.randn(3, 5, 6))
    measured = gap.take()
    torch.testing.assert_close(measured[0].double(), (squares[0] / squares[1]).sqrt(), rtol=1e-5, atol=0)
    assert measured[1].isnan()
    assert gap.take()[0].isnan()
    gap.detach()
    assert watchers(norm) == 0


def test_measuring_the_gap_changes_no_bit_of_the_training() -> None:
    plain = model()
    watched = copy.deepcopy(plain)
    norms = progressive_norms(watched)
    gap = BranchGap(norms.values())
    gap.attach()
    gap.armed = True
    for made in (plain, watched):
        write_lam(progressive_norms(made).values(), [0.4, 0.7])
    x, dy = torch.randn(2, 16, 6)
    results = [(made(x), made) for made in (plain, watched)]
    assert torch.equal(results[0][0], results[1][0])
    for y, _ in results:
        y.backward(dy)
    for own, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(*(t.grad for t in (own, theirs)))  # type: ignore[arg-type]
    for a, b in zip(watched.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    made = model()
    gap = BranchGap(progressive_norms(made).values())
    gap.attach()
    gap.armed = True
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        twin(torch.randn(4, 6))
    assert gap.take().isnan().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_compiled_again_only_when_the_norms_are_left_out() -> None:
    import torch._dynamo.testing as testing

    torch._dynamo.reset()
    made = nn.Sequential(*(PRepBN(6) for _ in range(10)))
    norms = progressive_norms(made).values()
    gap = BranchGap(norms)
    gap.attach()
    counter = testing.CompileCounter()
    compiled = torch.compile(made, backend=counter, fullgraph=True)
    frames = []
    for step in range(6):
        write_lam(norms, [max(0.0, 1 - step / 4 - 0.01 * layer) if step < 4 else 0.0 for layer in range(10)])
        gap.armed = step % 2 == 0
        y: Any = compiled(torch.randn(4, 6))
        y.backward(torch.randn(4, 6))
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 1, 2, 2]
