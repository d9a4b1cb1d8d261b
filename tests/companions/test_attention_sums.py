"""Entropy and largest logit of one call, against float64 in one go."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stabnorm.companions._attention_sums import AttentionSums, sums_of_call
from stabnorm.companions.companion import sampled


def reference(
    q: Tensor, k: Tensor, hidden: Tensor | None, bias: Tensor | float, scale: float | None, valid: Tensor | None
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Query by query, in float64: count, mean entropy, mean share, largest logit of each head."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    count, entropy, share, largest = ([0.0] * q.shape[1] for _ in range(4))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                row = (logits + bias)[b, h, i]
                if hidden is not None:
                    row = row[~hidden.expand(logits.shape)[b, h, i]]
                if len(row) < 2 or (valid is not None and not valid[b, i]):
                    continue
                p = (row - row.max()).exp() / (row - row.max()).exp().sum()
                terms = [-float(x) * math.log(float(x)) for x in p if float(x) > 0]
                count[h] += 1
                entropy[h] += sum(terms)
                share[h] += sum(terms) / math.log(len(row))
                seen = logits[b, h, i] if hidden is None else logits[b, h, i][~hidden.expand(logits.shape)[b, h, i]]
                largest[h] = max(largest[h], float(seen.abs().max()))
    return count, entropy, share, largest


def check(sums: AttentionSums, expected: Any) -> None:
    for got, wanted in zip(sums, expected, strict=True):
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=2e-6, atol=1e-6)


BATCH, HEADS, QUERIES, KEYS, DIM = 3, 4, 7, 9, 5


def qk(heads: int = HEADS, queries: int = QUERIES) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(BATCH, HEADS, queries, DIM), 2 * torch.randn(BATCH, heads, KEYS, DIM) + 1


@pytest.mark.parametrize("scale", [None, 0.31, -0.5])
def test_cross_attention_is_that_of_float64(scale: float | None) -> None:
    q, k = qk()
    check(sums_of_call(q, k, scale=scale), reference(q, k, None, 0.0, scale, None))


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_may_share_keys(groups: int) -> None:
    q, k = qk(groups)
    check(sums_of_call(q, k, grouped=True), reference(q, k, None, 0.0, None, None))


@pytest.mark.parametrize("queries", [5, KEYS, 12])
def test_causal_means_from_the_upper_left_as_in_torch(queries: int) -> None:
    q, k = qk(queries=queries)
    hidden = torch.ones(queries, KEYS, dtype=torch.bool).tril().logical_not()
    check(sums_of_call(q, k, causal=True), reference(q, k, hidden, 0.0, None, None))


@pytest.mark.parametrize(
    "shape", [(QUERIES, KEYS), (BATCH, 1, 1, KEYS), (BATCH, 1, QUERIES, KEYS), (1, HEADS, 1, KEYS)]
)
def test_boolean_masks_hide_keys_and_queries_that_see_none_are_not_counted(shape: tuple[int, ...]) -> None:
    q, k = qk()
    visible = torch.rand(shape) < 0.5
    visible[..., 0, :] = False
    visible[..., -1, :2] = True
    check(sums_of_call(q, k, visible), reference(q, k, ~visible, 0.0, None, None))


@pytest.mark.parametrize("low", [-torch.inf, -1e4, torch.finfo(torch.float32).min, -65504.0])
def test_additive_masks_hide_what_they_move_far_down_and_bias_the_rest(low: float) -> None:
    q, k = qk()
    hidden = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.4
    hidden[..., :2] = False
    bias = torch.randn(BATCH, HEADS, QUERIES, KEYS)
    check(sums_of_call(q, k, bias.masked_fill(hidden, low)), reference(q, k, hidden, bias.double(), None, None))


def test_padded_queries_do_not_count() -> None:
    q, k = qk()
    valid = torch.rand(BATCH, QUERIES) < 0.6
    check(sums_of_call(q, k, valid=valid), reference(q, k, None, 0.0, None, valid))


@pytest.mark.parametrize("at_most", [1, 2, 3, 6, 7, 100])
def test_sampled_queries_are_those_queries(at_most: int) -> None:
    q, k = qk()
    mask = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.7
    mask[..., :2] = True
    valid = torch.rand(BATCH, QUERIES) < 0.8
    places = sampled(QUERIES, at_most)
    assert len(range(QUERIES)[places]) <= at_most
    assert range(QUERIES)[places][-1] == QUERIES - 1
    expected = reference(q[:, :, places], k, ~mask[:, :, places], 0.0, None, valid[:, places])
    check(sums_of_call(q, k, mask, valid, at_most=at_most), expected)


def test_batches_merge_to_what_they_are_in_one_go() -> None:
    q, k = qk()
    valid = torch.rand(BATCH, QUERIES) < 0.8
    whole = sums_of_call(q, k, valid=valid, at_most=3)
    parts = [sums_of_call(q[i : i + 1], k[i : i + 1], valid=valid[i : i + 1], at_most=3) for i in range(BATCH)]
    merged = AttentionSums(*torch.zeros(4, HEADS, dtype=torch.float64)).merge(parts[2]).merge(parts[0].merge(parts[1]))
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_even_attention_has_share_one_and_one_key_has_none() -> None:
    q = torch.zeros(1, 1, 3, DIM)
    even = sums_of_call(q, torch.randn(1, 1, KEYS, DIM))
    torch.testing.assert_close(even.entropy / even.queries, torch.tensor([math.log(KEYS)], dtype=torch.float64))
    key = torch.zeros(1, 1, KEYS, DIM)
    key[0, 0, 2] = 1e3
    one = sums_of_call(torch.ones(1, 1, 3, DIM), key)
    assert one.entropy_share.item() == 0
    assert one.logit.item() == pytest.approx(1e3 * DIM / math.sqrt(DIM))


def test_entropy_keeps_the_bound_of_the_literature_where_it_is_attained() -> None:
    # arXiv 2303.06296, theorem 3.1: for logits of norm sigma over T keys.
    keys, sigma = 11, 3.7
    beta = math.exp(-sigma * math.sqrt(keys / (keys - 1)))
    bound = math.log(1 + (keys - 1) * beta) + sigma * math.sqrt(keys * (keys - 1)) * beta / (1 + (keys - 1) * beta)
    lowest = torch.full((keys,), -1.0)
    lowest[4] = keys - 1
    logits = sigma * torch.stack([lowest, *torch.randn(50, keys)])
    logits = sigma * F.normalize(logits, dim=-1)
    query = torch.nn.functional.one_hot(torch.arange(51)).float()[None, None]
    sums = [sums_of_call(query[:, :, i : i + 1], logits.T[None, None].contiguous(), scale=1.0) for i in range(51)]
    entropies = torch.stack([s.entropy / s.queries for s in sums])[:, 0]
    assert entropies[0].item() == pytest.approx(bound, rel=1e-5)
    assert entropies.min() >= bound * (1 - 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_is_summed_up_in_float32(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in qk())
    check(sums_of_call(q, k), reference(q, k, None, 0.0, None, None))


def test_what_is_not_finite_shows() -> None:
    q, k = qk()
    q[1, 2, 3, 0] = torch.nan
    sums = sums_of_call(q, k)
    assert sums.entropy.isnan().tolist() == [False, False, True, False]
    assert sums.logit.isnan().tolist() == [False, False, True, False]
