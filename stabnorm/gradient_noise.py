"""`GradientNoise`: noise that fades away is added to the gradients, after they were clipped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabnorm._checks import check_count, check_instance, check_number
from stabnorm._models.ranks import is_distributed, rank
from stabnorm._states import check_state, load_whole


def check_noise(eta: Any, gamma: Any, seed: Any) -> None:
    """Check the arguments of `GradientNoise` before there is an optimizer.

    Raises:
        TypeError: one has another type.
        ValueError: one is out of range.
    """
    check_number("eta", eta, least=0)
    check_number("gamma", gamma, least=0)
    check_count("seed", seed, 0)


class GradientNoise:
    r"""Adds Gaussian noise to the gradients at each step of an optimizer, with a variance that fades away.

    .. math:: g_t \leftarrow g_t + \mathcal N(0, \sigma_t^2), \qquad \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}

    The noise comes at the last moment, when gradients are unscaled, reduced over the ranks and clipped, because it
    hangs on the optimizer's step. It is drawn from a seed and the number of the step: all ranks add the same, a resumed
    run goes on with the same, and the random state of the training does not change. Sparse gradients are left alone.

    It is for a start that gives no gradient. In our study (docs/remedies.md) a net whose weights begin at zero trained
    with ``eta=0.3`` and not without noise. It is no answer to spikes of the gradient: there the loss ended higher.

    Args:
        optimizer: its gradients get the noise, from now on until `remove`.
        eta: :math:`\eta`, the variance at the first step; the paper takes 0.01, 0.3 or 1. Default: 0.01.
        gamma: :math:`\gamma`, how fast it fades. Default: 0.55.
        seed: of the noise. Default: 0.

    Raises:
        TypeError: an argument has another type.
        ValueError: a number is out of range.

    Source: arXiv:1511.06807, Adding Gradient Noise Improves Learning for Very Deep Networks.

    >>> weight = torch.nn.Parameter(torch.zeros(4))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> noise = GradientNoise(optimizer)
    >>> weight.grad = torch.zeros(4)
    >>> optimizer.step()
    >>> bool(weight.detach().abs().min() > 0), noise.steps_done
    (True, 1)
    """

    def __init__(self, optimizer: Optimizer, *, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> None:
        check_instance("optimizer", optimizer, Optimizer, "an optimizer of torch.optim")
        check_noise(eta, gamma, seed)
        self.eta, self.gamma, self.seed, self.steps_done = eta, gamma, seed, 0
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def variance(self, step: int) -> float:
        """Return the variance of the noise at a step, counted from 0."""
        return float(self.eta / (1 + step) ** self.gamma)

    def remove(self) -> None:
        """Add no noise from now on."""
        self._handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        def add() -> None:
            self.add([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

        by_position = len(args) > 1  # the first one is the optimizer
        closure = args[1] if by_position else kwargs.get("closure")
        if closure is None:
            add()
            return None

        def noisy() -> Any:  # the gradients come to be in the closure, as in a Lightning Trainer
            loss = closure()
            add()
            return loss

        return ((args[0], noisy, *args[2:]), kwargs) if by_position else (args, {**kwargs, "closure": noisy})

    @torch.no_grad()
    def add(self, gradients: list[Tensor]) -> None:
        """Add the noise of the next step to these gradients."""
        std = self.variance(self.steps_done) ** 0.5
        generators: dict[torch.device, torch.Generator] = {}
        for gradient in gradients:
            if gradient.is_sparse:
                continue
            sharded = is_distributed(gradient)  # each rank has numbers of its own, and needs noise of its own
            own: Any = gradient.to_local() if sharded else gradient  # type: ignore[attr-defined]
            if own.device not in generators:
                # Plain arithmetic: `hash` of a tuple differs between builds of Python.
                own_seed = ((self.seed * 1_000_003 + self.steps_done) * 65_537 + (rank() if sharded else 0)) % 2**63
                generators[own.device] = torch.Generator(own.device).manual_seed(own_seed)
            noise = torch.empty(own.shape, dtype=torch.float32, device=own.device)
            own.add_(noise.normal_(0.0, std, generator=generators[own.device]).to(own.dtype))
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps done."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            TypeError: the state is no mapping.
            ValueError: it is not that of a GradientNoise; nothing is loaded then.
        """
        check_state(state, "GradientNoise", ["steps_done"])
        load_whole(self, self._load, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.steps_done = int(state["steps_done"])
