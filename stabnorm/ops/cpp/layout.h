// The rows of an accumulator of raw moments, as stabnorm/functional/moments.py names them; tests/ops/test_layout.py
// compares them.
#pragma once

enum { SHIFT_X, SHIFT_N, REST_X, REST_N, VAR_X, COV_XN, VAR_N, MAX, MIN, CHANNEL_ROWS };
enum { STD_MEAN, MEAN_MEAN, EPS_SHARE, STD_MIN, MEAN_MIN, STD_MAX, MEAN_MAX, TOKEN_ROWS };
