"""The thresholds of readiness for a switch, for the gate, which decides, and for the companion, which shows it."""

MEASURE_EVERY = 4  # steps between two affine residuals of the gate, and between two branch gaps
MOMENTUM = 0.1  # momentum (weight of the new value) of a layer's average affine residual
RUN_BELOW, HOLD_ABOVE = 0.30, 0.50  # the average affine residual where the gate runs a layer, and where it holds one
