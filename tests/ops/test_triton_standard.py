"""The statistics of a step in one launch equal those of the catalogue in float64; see tests/triton_kernels.py."""

import pytest
import torch

from stabnorm.functional import empty_moments
from stabnorm.functional.moments import MAX
from stabnorm.monitor.past import CHANNEL_ROWS, Layout, Past
from stabnorm.monitor.standard import STANDARD, standard_step
from stabnorm.ops import use_kernels
from stabnorm.ops.selftest import Case, checks_of, truth
from tests.triton_kernels import DEVICE, MARKS, assert_close, nan_in_new_memory, random_rows

pytestmark = MARKS
__all__ = ["nan_in_new_memory"]


def test_rows_and_columns_are_where_their_names_say() -> None:
    from stabnorm.ops.triton import standard

    def places(names: list[str]) -> list[int]:
        return [getattr(standard, name).value for name in names]

    past = [f"{name}_{i}" if rows > 1 else name for name, rows in CHANNEL_ROWS.items() for i in range(rows)]
    columns = [name.upper().replace("EPS_SHARE", "SHARE_BELOW_EPS") for name in STANDARD.statistics]
    assert places([*(name.upper() for name in past), "PAST_ROWS"]) == list(range(len(past) + 1))
    assert places([*columns, "TOKENS", "NONFINITE", "TOP_ID"]) == list(range(len(columns) + 3))
    assert standard.TOP.value == STANDARD.beside["top_channel_ids"] == STANDARD.beside["top_channel_values"]
    assert standard.COLUMNS.value == STANDARD.width == standard.TOP_VALUE.value + standard.TOP.value


@pytest.mark.parametrize(("channels", "offset"), [(1, 0.0), (2, 0.0), (300, 1e4)])
def test_six_steps_of_three_layers(channels: int, offset: float) -> None:
    case = Case(
        "", random_rows(2, channels, offset=offset), random_rows(2, channels), None, torch.randn(6, channels).to(DEVICE)
    )
    (check,) = checks_of(standard_step)
    wanted = truth(check, case)
    with use_kernels("triton"):
        results = check(case)
    for name, (got, natural, _) in results.items():
        assert_close(got.float(), wanted[name][0], natural)


def test_the_largest_channels_are_named_by_size_and_a_nan_is_the_largest() -> None:
    sizes = [[1.0, 9.0, torch.nan, 7.0, torch.inf], [2.0, -8.0, 2.0, 1.0, 0.0], [4.0, 3.0, 0.0, 0.0, 0.0]]
    moments = empty_moments(3, 5, DEVICE)
    moments.seen.fill_(4)
    values = torch.tensor(sizes, device=DEVICE)
    moments.channel[:, MAX], moments.channel[:, MAX + 1] = values, values
    channels = torch.tensor([5, 5, 2], device=DEVICE)
    exists, plain = torch.arange(5, device=DEVICE) < channels[:, None], torch.zeros(3, dtype=torch.bool, device=DEVICE)
    past = Past(Layout(exists, channels.double(), torch.full_like(channels, 1e-5, dtype=torch.float64), plain, None), 5)
    with use_kernels("triton"):
        row = standard_step(moments.channel, moments.seen, moments.token, values[:, None].expand(3, 2, 5), None, past)
    missing = torch.nan
    assert STANDARD.part(row, "top_channel_ids").nan_to_num(-1).tolist() == [[2, 4, 1], [1, 0, 2], [0, 1, -1]]
    largest = torch.tensor([[missing, torch.inf, 9.0], [8.0, 2.0, 2.0], [4.0, 3.0, missing]])
    torch.testing.assert_close(STANDARD.part(row, "top_channel_values").cpu(), largest, equal_nan=True)
    assert STANDARD.part(row, "nonfinite").tolist() == [2, 0, 0]
