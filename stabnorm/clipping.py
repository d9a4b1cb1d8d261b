"""`AdaptiveClip`: clip each gradient tensor against its own clipped past."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabnorm._checks import check_all, check_count, check_number
from stabnorm._states import check_state

_LEAST = 1e-12  # of a norm that is divided by


class AdaptiveClip:
    r"""Clips the gradient of each parameter to a multiple of its usual norm, so that one bad tensor harms no other one.

    With :math:`n_t` the norm of a tensor's gradient and :math:`p_t` its past, of which the clipped norms are the mean,

    .. math:: h_t = \min(b\, p_{t-1} / n_t, 1), \qquad g_t \leftarrow h_t g_t, \qquad p_t = (1-m) p_{t-1} + m h_t n_t.

    In the first `warmup` steps of a tensor its past is the smallest norm so far, and all tensors together are clipped
    to `warmup_norm`. A gradient that is not finite is left as it is and never enters the past. Nothing is read from the
    device. Call `step` between the backward and the optimizer's step, with gradients that are unscaled and the same on
    all ranks.

    Args:
        parameters: the parameters whose gradients are clipped.
        bound: by how much a norm may exceed its past, b. Default: 1.05.
        momentum: the weight of a new norm in the past, m. Default: 0.02.
        warmup: steps until a tensor is compared with its past. Default: 100.
        warmup_norm: the largest norm of all gradients together until then; None clips nothing. Default: 1.0.

    Raises:
        TypeError: an argument has another type.
        ValueError: a number is out of range, or there is no parameter.

    Source: AdaGC, arXiv 2502.11034.

    >>> weight = nn.Parameter(torch.zeros(4))
    >>> clip = AdaptiveClip([weight], warmup=1)
    >>> for size in 0.1, 0.1, 50.0, float("nan"):
    ...     weight.grad = torch.full((4,), size)
    ...     clip.step()
    ...     print(f"{weight.grad.norm():.3f}")
    0.200
    0.200
    0.210
    nan
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        bound: float = 1.05,
        momentum: float = 0.02,
        warmup: int = 100,
        warmup_norm: float | None = 1.0,
    ) -> None:
        self.parameters = list(parameters)
        check_all("parameters", self.parameters, Tensor, "the model's parameters")
        if not self.parameters:
            raise ValueError("parameters=[] leaves nothing to clip. Give model.parameters()")
        self.check(bound, momentum, warmup, warmup_norm)
        self.bound, self.momentum, self.warmup, self.warmup_norm = bound, momentum, warmup, warmup_norm
        self.past: Tensor | None = None  # [parameters], infinite before the first gradient
        self.seen: Tensor | None = None  # [parameters], finite gradients so far

    @staticmethod
    def check(bound: Any, momentum: Any, warmup: Any, warmup_norm: Any) -> None:
        """Check the options before there are parameters.

        Raises:
            TypeError: one has another type.
            ValueError: one is out of range.
        """
        check_number("bound", bound, least=1)
        check_number("momentum", momentum, above=0, most=1)
        check_count("warmup", warmup)
        if warmup_norm is not None:
            check_number("warmup_norm", warmup_norm, above=0, hint=", or None")

    @torch.no_grad()
    def step(self, *, clip: bool = True) -> None:
        """Clip all gradients, and take their norms into the past.

        Args:
            clip: False only learns what is usual. Default: True.
        """
        gradients = [_values(parameter.grad) for parameter in self.parameters]
        known = [gradient for gradient in gradients if gradient is not None]
        if not known:
            return
        norms = self._norms(gradients, known[0].device)
        past, seen = self._state(norms)
        finite = torch.isfinite(norms)
        norms = torch.where(finite, norms, 0)
        factor = (self.bound * past / norms.clamp(min=_LEAST)).clamp(max=1)
        if self.warmup_norm is None:
            first = torch.ones_like(factor)
        else:
            first = (
                (self.warmup_norm / torch.linalg.vector_norm(norms).clamp(min=_LEAST)).clamp(max=1).expand_as(factor)
            )
        warm = seen >= self.warmup
        factor = torch.where(warm, factor, first) if clip else torch.ones_like(factor)
        # What is not clipped must not raise the past either, so that an outburst is still one when clipping begins.
        clipped = torch.minimum(norms * factor, torch.where(warm, self.bound * past, torch.inf))
        new = torch.where(warm, torch.lerp(past, clipped, self.momentum), torch.minimum(past, clipped))
        self.past = torch.where(finite, new, past)
        self.seen = seen + finite
        if clip:
            factors = torch.where(finite, factor, 1).unbind()
            pairs = [(g, by.to(g.device)) for g, by in zip(gradients, factors, strict=True) if g is not None]
            torch._foreach_mul_([g for g, _ in pairs], [by for _, by in pairs])

    def _norms(self, gradients: list[Tensor | None], device: torch.device) -> Tensor:
        """Return the norm of each gradient, NaN where there is none."""
        missing = torch.full((), torch.nan, dtype=torch.float32, device=device)
        own = iter(torch._foreach_norm([g for g in gradients if g is not None], dtype=torch.float32))
        norms: list[Tensor] = [missing if gradient is None else next(own) for gradient in gradients]
        for i, parameter in enumerate(self.parameters):
            if hasattr(parameter.grad, "full_tensor"):  # this process has only a part of it
                norms[i] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).full_tensor()
        return torch.stack([norm.to(device) for norm in norms])

    def _state(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        if self.past is None or self.seen is None:
            self.past, self.seen = torch.full_like(norms, torch.inf), torch.zeros_like(norms, dtype=torch.int64)
        self.past, self.seen = self.past.to(norms.device), self.seen.to(norms.device)
        return self.past, self.seen

    def state_dict(self) -> dict[str, Any]:
        """Return what was usual for each parameter, as tensors."""
        return {
            "past": None if self.past is None else self.past.clone(),
            "seen": None if self.seen is None else self.seen.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: the state is no mapping.
            ValueError: it is of another number of parameters; nothing is loaded then.
        """
        check_state(state, "AdaptiveClip", ["past", "seen"])
        past, seen = state["past"], state["seen"]
        if past is not None and past.shape != (len(self.parameters),):
            raise ValueError(
                f"the state has the past of {len(past)} parameters, and there are {len(self.parameters)} here. Give it "
                "the same parameters in the same order"
            )
        self.past, self.seen = (None, None) if past is None else (past.clone(), seen.clone())


def _values(gradient: Tensor | None) -> Tensor | None:
    """Return the numbers of a gradient that this process holds; None for a sparse one, which is left as it is."""
    if gradient is None or gradient.is_sparse:
        return None
    own: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return own
