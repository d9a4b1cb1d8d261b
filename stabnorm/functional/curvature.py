r"""Curvature of the loss along an optimizer's own update, as a share of the curvature at which its steps begin to grow.

An optimizer that moves the weights by :math:`-\eta P^{-1} g`, with momentum, is stable on a quadratic with the Hessian
H while the largest eigenvalue of :math:`P^{-1} H` is below a bound :math:`b`, which depends on learning rate and
momentum only. Beyond it the steps grow instead of settling (arXiv 2103.00065, and for Adam arXiv 2207.14484). The
figure here is the curvature along the step s that the optimizer takes, over the length of this step, against the same
bound:

.. math:: R = \frac{s^T (g(w + s) - g(w))}{s^T M s}, \qquad M = b\,P, \qquad s \propto P^{-1} g

Where the loss is a parabola, this is :math:`s^T H s / s^T M s` and at most the largest eigenvalue of :math:`M^{-1} H`,
so R > 1 says that the bound is passed.
"""

from torch import Tensor


def stability_bound(
    learning_rate: Tensor | float, momentum: Tensor | float, gain: Tensor | float = 1.0, *, nesterov: bool = False
) -> Tensor | float:
    r"""Return the largest stable eigenvalue of the (preconditioned) Hessian, for gradient descent with momentum.

    .. math:: m \leftarrow \beta m + \gamma g, \qquad b = \frac{2 (1 + \beta)}{\gamma \eta}

    and with Nesterov's momentum :math:`b = 2 (1 + \beta) / (\eta (1 + 2 \beta))`.

    Args:
        learning_rate: the learning rate, eta.
        momentum: the share of the old momentum that stays, beta; b1 of Adam.
        gain: the weight of the new gradient, gamma: 1 for SGD, 1 - dampening, and 1 - b1 for Adam. Default: 1.
        nesterov: whether the step is :math:`g + \beta m`; the gain is 1 then. Default: False.

    >>> stability_bound(0.1, 0.0), round(stability_bound(1.0, 0.9, 1 - 0.9), 6)
    (20.0, 38.0)
    """
    weight = 1 + 2 * momentum if nesterov else gain
    return 2 * (1 + momentum) / (learning_rate * weight)


def adam_preconditioner(
    second_moment: Tensor, steps: Tensor | float, beta2: Tensor | float, eps: Tensor | float
) -> Tensor:
    r"""Return what Adam divides by, :math:`\sqrt{v / (1 - \beta_2^t)} + \epsilon`.

    Args:
        second_moment: Adam's running mean of squared gradients, v.
        steps: the number of steps that v has seen, t.
        beta2: the momentum of v.
        eps: the constant that Adam adds.

    >>> import torch
    >>> adam_preconditioner(torch.tensor([0.04]), 1, 0.99, 0.5)
    tensor([2.5000])
    """
    return (second_moment / (1 - beta2**steps)).sqrt() + eps


def relative_curvature(behind: Tensor, ahead: Tensor, distance: Tensor | float, size: Tensor) -> Tensor:
    r"""Return :math:`R = d^T H d / d^T M d` from the slope of the loss along d at two points.

    .. math:: d^T H d \approx \frac{d^T g(w + a d) - d^T g(w - c d)}{a + c}

    Args:
        behind: :math:`d^T g` at the first point; it may be w itself, with an error of first order in the distance.
        ahead: the same at the second point.
        distance: between the points, in units of d.
        size: :math:`d^T M d`.

    >>> import torch
    >>> slope = lambda at: torch.tensor(6.0 * at)  # of the loss 3 w^2, along d = 1
    >>> relative_curvature(slope(0.75), slope(1.25), 0.5, torch.tensor(3.0))
    tensor(2.)
    """
    return (ahead - behind) / distance / size
