"""The Triton backend of `stabnorm.monitor.standard`: all statistics of a band of layers in one launch.

Each program computes those of one layer, in two passes over its channels. The first pass finds what must be known of
the layer as a whole. The second one adds up the statistics, and changes the past. The formulas are those in
stabnorm/monitor/catalogue, in float64, and a NaN goes through them as it does there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stabnorm.ops.standard import Layers
from stabnorm.ops.triton.accumulating import (
    CHANNEL_ROWS,
    COV_XN,
    EPS_SHARE,
    MAX,
    MEAN_MAX,
    MEAN_MIN,
    MIN,
    REST_N,
    REST_X,
    SHIFT_N,
    SHIFT_X,
    STD_MAX,
    STD_MEAN,
    STD_MIN,
    TOKEN_ROWS,
    VAR_N,
    VAR_X,
)

# The rows of `Past.channel` and of `Past.layer`, and the columns of the result. tests/ops/test_triton_standard.py
# compares them with stabnorm/monitor/past.py and stabnorm/monitor/standard.py.
(
    MEAN, VAR, MEAN_VAR, LOG_VAR, LOG_ABSMAX, WINDOW_0, WINDOW_1, WINDOW_2, WINDOW_3, GRADIENT, PAST_ROWS,
) = map(tl.constexpr, range(11))  # fmt: skip
LOG_SCALE, GRADIENT_POWER, LAYER_ROWS = map(tl.constexpr, range(3))
(
    RUNNING_MEAN_DISTANCE, RUNNING_VAR_DISTANCE, MEAN_DISCREPANCY, VAR_DISCREPANCY, MEAN_FLUCTUATION, VAR_FLUCTUATION,
    ABSMAX_FLUCTUATION, SCALE_JUMP, AM_GM_RATIO, RANK_SHARE, TOKEN_STD_MEAN, TOKEN_STD_MIN, TOKEN_STD_MAX,
    TOKEN_MEAN_MEAN, TOKEN_MEAN_MIN, TOKEN_MEAN_MAX, SHARE_BELOW_EPS, AMAX, CREST, FEATURE_KURTOSIS, AFFINE_RESIDUAL,
    GRAD_GAIN, GRAD_SHIFT, GRAD_FLUCTUATION, TOKENS, NONFINITE, TOP_ID, _, _, TOP_VALUE, _, _, COLUMNS,
) = map(tl.constexpr, range(33))  # fmt: skip
TOP = tl.constexpr(TOP_VALUE.value - TOP_ID.value)
MOMENTUM = tl.constexpr(0.1)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ROUNDING = tl.constexpr(8 * torch.finfo(torch.float32).eps)  # of two measurements of one value in float32
INFINITE = tl.constexpr(1e300)  # stands for an infinity where a NaN is sorted before it; float32 ends at 3e38
BLOCK, WARPS = 256, 8  # channels at a time: one for each thread, because there are some twenty sums of each


@triton.jit
def _input(channel, channels, mask):
    """Return mean, variance, largest magnitude and second moment of the input, per channel; 0 outside of the mask."""
    mean = tl.load(channel + SHIFT_X * channels, mask=mask, other=0.0).to(tl.float64)
    mean += tl.load(channel + REST_X * channels, mask=mask, other=0.0).to(tl.float64)
    var = tl.load(channel + VAR_X * channels, mask=mask, other=0.0).to(tl.float64)
    most = tl.load(channel + MAX * channels, mask=mask, other=0.0).to(tl.float64)
    fewest = tl.load(channel + MIN * channels, mask=mask, other=0.0).to(tl.float64)
    absmax = tl.where((most > -fewest) | (most != most), most, -fewest)
    return mean, var, absmax, var + mean * mean


@triton.jit
def _explained(channel, channels, mask):
    """Return the share of the normalised input that an affine map reproduces, as `functional.explained_share` does."""
    var_x = tl.load(channel + VAR_X * channels, mask=mask, other=0.0).to(tl.float64)
    var_n = tl.load(channel + VAR_N * channels, mask=mask, other=0.0).to(tl.float64)
    both = tl.load(channel + COV_XN * channels, mask=mask, other=0.0).to(tl.float64)
    mean = tl.load(channel + SHIFT_N * channels, mask=mask, other=0.0).to(tl.float64)
    mean += tl.load(channel + REST_N * channels, mask=mask, other=0.0).to(tl.float64)
    power = var_x * var_n
    share = tl.where(power > 0, both * both / tl.where(power > 0, power, 1.0), power * 0)
    return tl.where(var_n <= 1e-12 * (mean * mean), 1.0, share)


# Two things are here for Triton's interpreter, under which this kernel is tested: the formulas are written out, because
# a call of another function takes it milliseconds, and a condition of the layer is added to lanes, because it cannot
# broadcast one.
@triton.jit(do_not_specialize=["channels"])  # one compilation for models of any width
def standard_of_layers(
    seen_ptr, channel_ptr, token_ptr, gradient_ptr, between_ptr, width_ptr, eps_ptr, per_channel_ptr, own_buffers_ptr,
    own_ptr, past_ptr, past_layer_ptr, out_ptr, channels, RANKS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the row of one layer, and add the step to its past."""
    layer, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    channel, token = channel_ptr + layer * CHANNEL_ROWS * channels + c, token_ptr + layer * TOKEN_ROWS
    gradient, past = gradient_ptr + layer * 2 * channels + c, past_ptr + layer * PAST_ROWS * channels + c
    past_layer = past_layer_ptr + layer * LAYER_ROWS
    width, eps = tl.load(width_ptr + layer), tl.load(eps_ptr + layer)
    count, per_channel = tl.load(seen_ptr + layer).to(tl.float64), tl.load(per_channel_ptr + layer) != 0
    # They are read before lanes are added up, so that no thread stores a new value before all have read the old one.
    old_scale, old_power = tl.load(past_layer + LOG_SCALE), tl.load(past_layer + GRADIENT_POWER)
    tokens, root_eps = tl.maximum(count, 1.0), tl.sqrt(eps)
    zeros = tl.zeros([BLOCK], tl.float64)
    none, nothing = zeros.to(tl.int32), zeros + float("-inf")

    odd, odd_sizes = none, none  # channels whose moments, or sizes, are not finite
    scale, power = nothing, zeros
    top_0, top_1, top_2, id_0, id_1, id_2 = nothing, nothing, nothing, none, none, none  # of each lane
    for start in range(0, channels, BLOCK):
        exists = start + c < width
        mean, var, absmax, second = _input(channel + start, channels, exists)
        odd += 1 - (tl.abs(mean) + tl.abs(var) + tl.abs(absmax) < float("inf")).to(tl.int32)
        odd_sizes += 1 - (tl.abs(absmax) < float("inf")).to(tl.int32)
        scale = tl.where(exists & ((second > scale) | (second != second)), second, scale)
        of_gain = tl.load(gradient + start, mask=exists, other=0.0).to(tl.float64) / tokens
        power += of_gain * of_gain
        size = tl.where(absmax != absmax, float("inf"), tl.minimum(absmax, INFINITE))  # a NaN counts as the largest
        size = tl.where(exists, size, float("-inf"))
        is_first, is_second, is_third = size > top_0, size > top_1, size > top_2
        top_2 = tl.where(is_second, top_1, tl.where(is_third, size, top_2))
        id_2 = tl.where(is_second, id_1, tl.where(is_third, start + c, id_2))
        top_1 = tl.where(is_first, top_0, tl.where(is_second, size, top_1))
        id_1 = tl.where(is_first, id_0, tl.where(is_second, start + c, id_1))
        top_0, id_0 = tl.where(is_first, size, top_0), tl.where(is_first, start + c, id_0)
    power, is_nan = tl.sum(power, 0), tl.max((scale != scale).to(tl.int32), 0) > 0
    scale = tl.where(is_nan, float("nan"), tl.max(scale, 0))
    finite = (count > 0) & (tl.sum(odd, 0) == 0)
    with_gradient = finite & (tl.abs(power) < float("inf"))

    column = tl.arange(0, COLUMNS)
    row = column * 0.0
    for place in tl.static_range(TOP):
        size = tl.max(top_0, 0)
        index = tl.min(tl.where(top_0 == size, id_0, 2147483647), 0)
        value = tl.where(size == float("inf"), float("nan"), tl.where(size == INFINITE, float("inf"), size))
        if place == 0:
            amax = value
        row = tl.where(column == TOP_VALUE + place, tl.where(size > float("-inf"), value, float("nan")), row)
        row = tl.where(column == TOP_ID + place, tl.where(size > float("-inf"), index, float("nan")), row)
        taken = (top_0 == size) & (id_0 == index)
        top_0, id_0 = tl.where(taken, top_1, top_0), tl.where(taken, id_1, id_0)
        top_1, id_1 = tl.where(taken, top_2, top_1), tl.where(taken, id_2, id_1)
        top_2 = tl.where(taken, float("-inf"), top_2)

    mean_distance, var_distance, mean_discrepancy, var_discrepancy = zeros, zeros, zeros, zeros
    mean_fluctuation, var_fluctuation, absmax_fluctuation, gap, spread = zeros, zeros, zeros, zeros, zeros
    rank_share, means, below, seconds, relatives, squares, explained = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    gains, shifts, shift_power, change = zeros, zeros, zeros, zeros
    for start in range(0, channels, BLOCK):
        exists = start + c < width
        mean, var, absmax, second = _input(channel + start, channels, exists)
        at = past + start
        old_mean = tl.load(at + MEAN * channels, mask=exists, other=0.0)
        old_var = tl.load(at + VAR * channels, mask=exists, other=0.0)
        mean_var = tl.load(at + MEAN_VAR * channels, mask=exists, other=0.0)
        old_log_var = tl.load(at + LOG_VAR * channels, mask=exists, other=0.0)
        old_log_absmax = tl.load(at + LOG_ABSMAX * channels, mask=exists, other=0.0)
        window_0 = tl.load(at + WINDOW_0 * channels, mask=exists, other=0.0)
        window_1 = tl.load(at + WINDOW_1 * channels, mask=exists, other=0.0)
        window_2 = tl.load(at + WINDOW_2 * channels, mask=exists, other=0.0)
        window_3 = tl.load(at + WINDOW_3 * channels, mask=exists, other=0.0)
        old_gradient = tl.load(at + GRADIENT * channels, mask=exists, other=0.0)
        running_mean, running_var = old_mean, old_var
        if OWN:
            own, has_own = own_ptr + layer * 2 * channels + start + c, tl.load(own_buffers_ptr + layer) != 0
            running_mean = tl.where(has_own, tl.load(own, mask=exists, other=0.0), running_mean)
            running_var = tl.where(has_own, tl.load(own + channels, mask=exists, other=0.0), running_var)

        eps_here = tl.where(exists, eps, 1.0)  # so that no channel beyond the layer's own divides by 0
        sigma, log_var, log_absmax = tl.sqrt(var + eps_here), tl.log(var + eps_here), tl.log(absmax + tl.sqrt(eps_here))
        off_mean, off_var, jump = mean - running_mean, var - running_var, mean - old_mean
        mean_var = (mean_var + jump * jump * MOMENTUM) * (1 - MOMENTUM)
        mean_distance += off_mean * off_mean
        var_distance += off_var * off_var
        mean_discrepancy += tl.abs(off_mean) / sigma
        var_discrepancy += tl.abs(tl.sqrt(running_var + eps_here) / sigma - 1)
        mean_fluctuation += tl.sqrt(mean_var) / tl.sqrt(old_var + eps_here)
        var_fluctuation += tl.abs(log_var - old_log_var)
        absmax_fluctuation += tl.abs(log_absmax - old_log_absmax)

        newest = tl.where(second < TINY, TINY, second)
        root, root_0, root_1 = tl.sqrt(newest), tl.sqrt(window_0), tl.sqrt(window_1)
        root_2, root_3 = tl.sqrt(window_2), tl.sqrt(window_3)
        usual = tl.sqrt(root_0 * root_1) * tl.sqrt(root_2 * root_3)
        geometric = tl.sqrt(root * root_0) * tl.sqrt(root_1 * root_2)
        gap += tl.where(exists, ((newest + window_0 + window_1 + window_2) / 4 - geometric) / usual, 0.0)
        usual_root = (root_0 + root_1 + root_2 + root_3) / 4
        off_0, off_1, off_2, off_3 = root_0 - usual_root, root_1 - usual_root, root_2 - usual_root, root_3 - usual_root
        of_roots = (off_0 * off_0 + off_1 * off_1 + off_2 * off_2 + off_3 * off_3) / 4
        spread += tl.where(exists, of_roots / usual, 0.0)

        if RANKS:
            between = tl.load(between_ptr + layer * channels + start + c, mask=exists, other=0.0)
            rank_share += between / (var + eps_here)
        means += mean
        below += tl.where(exists & (var < 10 * eps), 1.0, 0.0)
        seconds += second
        relative = tl.where(exists, second / scale, 0.0)  # x^4 of a large activation would overflow
        relatives += relative
        squares += relative * relative
        explained += tl.where(exists, _explained(channel + start, channels, exists), 0.0)
        of_gain = tl.load(gradient + start, mask=exists, other=0.0).to(tl.float64) / tokens
        of_shift = tl.load(gradient + start + channels, mask=exists, other=0.0).to(tl.float64)
        gains += tl.abs(of_gain)
        shifts += tl.abs(of_shift)
        shift_power += of_shift * of_shift
        change += (of_gain - old_gradient) * (of_gain - old_gradient)

        # Beyond its channels a layer gets 0, so that a sum over channels is right there, too.
        changes = (start + c < channels) & (none + finite.to(tl.int32) > 0)
        new_mean = tl.where(old_mean != old_mean, mean, old_mean + jump * MOMENTUM)
        new_var = tl.where(old_var != old_var, var, old_var + (var - old_var) * MOMENTUM)
        tl.store(at + MEAN * channels, new_mean, mask=changes)
        tl.store(at + VAR * channels, new_var, mask=changes)
        tl.store(at + MEAN_VAR * channels, tl.where(old_mean != old_mean, 0.0, mean_var), mask=changes)
        tl.store(at + LOG_VAR * channels, log_var, mask=changes)
        tl.store(at + LOG_ABSMAX * channels, log_absmax, mask=changes)
        tl.store(at + WINDOW_0 * channels, tl.where(exists, newest, 0.0), mask=changes)
        tl.store(at + WINDOW_1 * channels, window_0, mask=changes)
        tl.store(at + WINDOW_2 * channels, window_1, mask=changes)
        tl.store(at + WINDOW_3 * channels, window_2, mask=changes)
        changes = exists & (none + with_gradient.to(tl.int32) > 0)
        of_gain = tl.where(old_gradient != old_gradient, of_gain, old_gradient + (of_gain - old_gradient) * MOMENTUM)
        tl.store(at + GRADIENT * channels, of_gain, mask=changes)

    std_mean = tl.load(token + STD_MEAN).to(tl.float64)
    log_scale = tl.log(std_mean + root_eps)
    bound = 4 * tl.sum(spread, 0) / width
    bound = tl.where(bound < ROUNDING * ROUNDING, ROUNDING * ROUNDING, bound)  # a smaller bound is rounding
    below_share = tl.where(per_channel, tl.sum(below, 0) / width, tl.load(token + EPS_SHARE).to(tl.float64))
    residual = 1 - tl.sum(explained, 0) / width
    residual = tl.where(per_channel | (residual < 0), 0.0, residual)
    relative = tl.sum(relatives, 0) / width
    # A sum that is zero in exact arithmetic is only rounding, in proportion to what is added up.
    shift, changed = tl.sqrt(tl.sum(shift_power, 0)) / tokens, tl.sqrt(tl.sum(change, 0))
    rounding, usual_gradient = tl.where(shift < float("inf"), shift, 0.0) * ROUNDING, tl.sqrt(old_power)
    usual_gradient = tl.where(usual_gradient < rounding, rounding, usual_gradient)
    fluctuation = changed / tl.where(usual_gradient > 0, usual_gradient, 1.0)
    fluctuation = tl.where((usual_gradient > 0) | (changed == 0), fluctuation, float("nan"))

    row = tl.where(column == RUNNING_MEAN_DISTANCE, tl.sqrt(tl.sum(mean_distance, 0)) / width, row)
    row = tl.where(column == RUNNING_VAR_DISTANCE, tl.sqrt(tl.sum(var_distance, 0)) / width, row)
    row = tl.where(column == MEAN_DISCREPANCY, tl.sum(mean_discrepancy, 0) / width, row)
    row = tl.where(column == VAR_DISCREPANCY, tl.sum(var_discrepancy, 0) / width, row)
    row = tl.where(column == MEAN_FLUCTUATION, tl.sum(mean_fluctuation, 0) / width, row)
    row = tl.where(column == VAR_FLUCTUATION, tl.sum(var_fluctuation, 0) / width, row)
    row = tl.where(column == ABSMAX_FLUCTUATION, tl.sum(absmax_fluctuation, 0) / width, row)
    row = tl.where(column == SCALE_JUMP, tl.abs(log_scale - old_scale), row)
    row = tl.where(column == AM_GM_RATIO, tl.sum(gap, 0) / width / bound, row)
    row = tl.where(column == RANK_SHARE, float("nan"), row)
    if RANKS:
        row = tl.where(column == RANK_SHARE, tl.sum(rank_share, 0) / width, row)
    row = tl.where(column == TOKEN_STD_MEAN, std_mean, row)
    row = tl.where(column == TOKEN_STD_MIN, tl.load(token + STD_MIN).to(tl.float64), row)
    row = tl.where(column == TOKEN_STD_MAX, tl.load(token + STD_MAX).to(tl.float64), row)
    row = tl.where(column == TOKEN_MEAN_MEAN, tl.sum(means, 0) / width, row)
    row = tl.where(column == TOKEN_MEAN_MIN, tl.load(token + MEAN_MIN).to(tl.float64), row)
    row = tl.where(column == TOKEN_MEAN_MAX, tl.load(token + MEAN_MAX).to(tl.float64), row)
    row = tl.where(column == SHARE_BELOW_EPS, below_share, row)
    row = tl.where(column == AMAX, amax, row)
    row = tl.where(column == CREST, amax / tl.sqrt(tl.sum(seconds, 0) / width), row)
    row = tl.where(column == FEATURE_KURTOSIS, tl.sum(squares, 0) / width / (relative * relative), row)
    row = tl.where(column == AFFINE_RESIDUAL, residual, row)
    row = tl.where(column == GRAD_GAIN, tl.sum(gains, 0) / width, row)
    row = tl.where(column == GRAD_SHIFT, tl.sum(shifts, 0) / width / tokens, row)
    row = tl.where(column == GRAD_FLUCTUATION, fluctuation, row)
    row = tl.where(column * 0.0 + count > 0, row, float("nan"))
    row = tl.where(column == TOKENS, count, row)
    row = tl.where(column == NONFINITE, tl.sum(odd_sizes, 0).to(tl.float64), row)
    tl.store(out_ptr + layer * COLUMNS + column, row.to(tl.float32))
    power = tl.where(old_power != old_power, power, old_power + (power - old_power) * MOMENTUM)
    tl.store(past_layer + LOG_SCALE, tl.where(finite, log_scale, old_scale))  # older interpreters ignore a mask here
    tl.store(past_layer + GRADIENT_POWER, tl.where(with_gradient, power, old_power))


def standard(
    seen: Tensor,
    channel: Tensor,
    token: Tensor,
    gradient: Tensor,
    between: Tensor | None,
    layers: Layers,
    own: Tensor | None,
    past: Tensor,
    past_layer: Tensor,
    row: Tensor,
) -> None:
    """Fill ``row [L, columns]``, and add the step to ``past`` and ``past_layer``; see `ops.cpp.standard.standard`."""
    channels = channel.shape[-1]
    own_buffers = layers.per_channel if layers.own_buffers is None else layers.own_buffers
    with torch.cuda.device_of(channel):  # a kernel runs on the current device, whatever the device of its arguments
        standard_of_layers[(len(row),)](
            seen.contiguous(), channel.contiguous(), token.contiguous(), gradient.contiguous(),
            past if between is None else between.contiguous(), layers.widths, layers.eps,
            layers.per_channel.view(torch.uint8), own_buffers.view(torch.uint8), past if own is None else own,
            past, past_layer, row, channels, RANKS=between is not None, OWN=own is not None, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
