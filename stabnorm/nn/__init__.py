"""Norm modules. So far the published ones, for parity: `stabnorm.nn.official`."""
