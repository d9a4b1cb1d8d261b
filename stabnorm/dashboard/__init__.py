"""Draws what the monitor measured. Imports numpy, Pillow and tensorboard, never torch, which may be missing there."""
