"""What every part of stabnorm does to a model: hook it, run it, copy it, name its parts, and merge over its ranks."""
