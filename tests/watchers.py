"""What is left on a model of whoever watches it."""

from torch import nn

from stabnorm._models.watched import own_class


def watchers(model: nn.Module) -> int:
    """Count hooks of modules and parameters, and modules of which a class tells watchers about the calls."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    hooks += sum(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters())
    return hooks + sum(own_class(m) is not type(m) for m in model.modules())
