"""Under DistributedDataParallel, two ranks train a remedied model as one process does on the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from stabnorm import StabNormError
from stabnorm.remedies import peri_norm, qk_norm, scale_residuals, sigma_reparametrize
from tests.processes import RANKS, run_ranks
from tests.remedies.family import net, tokens
from tests.remedies.test_modules_of_their_own import CASES, batches_of, trained

ON_RANKS = ("stable_embedding", "standardize_weights", "dual_patch_norm", "lape", "mix_norm", "scale_by_depth")


def remedied() -> Any:
    model = net(depth=1)
    scale_residuals(model, tokens(1), scale="skipinit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_gain"):
                parameter.fill_(0.5)
    peri_norm(model, tokens(1))
    qk_norm(model)
    sigma_reparametrize(model, r"fc1|v_proj")
    return model


def steps(model: Any, batches: list[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def one_rank(rank: int, folder: Path) -> None:
    alone = remedied()
    model = remedied()
    batches = [tokens(4, 5).roll(shift) for shift in range(3)]
    steps(alone, batches)
    steps(DistributedDataParallel(model), [batch.chunk(RANKS)[rank] for batch in batches])
    for (name, one), other in zip(alone.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)
    for name in ON_RANKS:
        case = CASES[name]
        model, alone = case.build(), trained(case, lambda batch: [batch])
        case.apply(model)
        steps(DistributedDataParallel(model), [batch.chunk(RANKS)[rank] for batch in batches_of(case)])
        for (key, one), other in zip(alone.state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
    with pytest.raises(StabNormError, match="wrapped in DistributedDataParallel already"):
        sigma_reparametrize(DistributedDataParallel(net()))


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    run_ranks(one_rank, tmp_path)
