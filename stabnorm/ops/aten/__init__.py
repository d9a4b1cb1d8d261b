"""The backend for CPUs of ATen's fast primitives: one file for each file of ops."""
