"""The lengths that the detector has and a dashboard names. Nothing is imported here, so that torch may be missing."""

COMPARES_FROM = 256  # steps of a layer before it is compared with its own past: a start-up is not calm
