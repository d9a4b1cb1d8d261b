"""What the figures of the README and of docs/ come from: ratios, measured side by side in one run."""
