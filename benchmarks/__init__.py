"""The programs that measure the figures of the README and of docs/: ratios, measured side by side in one run."""
