"""UnMixTNS: a mixin over a batch norm that normalises each image of a correlated, shifted stream (arXiv 2401.08328)."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stabnorm._models.masks import mask_for
from stabnorm.errors import StabNormError
from stabnorm.nn._base import Float32Buffers
from stabnorm.nn.mixed_in import MixedIn
from stabnorm.norms.rows import tokens_of
from stabnorm.ops.components import leave_, settle_
from stabnorm.ops.rows import widened

IMAGES = 64  # how many images a batch has for which the momentum is meant


class Unmixing(NamedTuple):
    """How a batch norm is unmixed.

    Attributes:
        components: K, the number of pairs of mean and variance.
        temperature: of the softmax over the components.
        momentum: weight of a batch of 64 images in the components; 0 leaves them as they are.
        seed: of the noise in the first means.
    """

    components: int
    temperature: float
    momentum: float
    seed: int


class UnMixTNS(MixedIn, Float32Buffers):
    r"""A mixin over a batch norm, for test streams that are shifted and whose neighbours resemble each other.

    Each of K components has a mean and a variance for each channel. An image with the mean :math:`\tilde\mu` and the
    variance :math:`\tilde\sigma^2` of its own is mixed into each of them, by its resemblance p, and is normalised with
    what all components together then have:

    .. math:: p_k = \mathrm{softmax}_k\!\left(\cos(\tilde\mu, \mu_k) / \tau\right),\qquad
              \hat\mu_k = (1 - p_k)\,\mu_k + p_k\,\tilde\mu,\qquad
              \hat\sigma^2_k = (1 - p_k)\,\sigma^2_k + p_k\,\tilde\sigma^2

    .. math:: \mu = \frac1K \sum_k \hat\mu_k,\qquad
              \sigma^2 = \frac1K \sum_k \hat\sigma^2_k + \frac1K \sum_k (\hat\mu_k - \mu)^2

    The components follow the stream, in training as in eval mode:
    :math:`\mu_k \leftarrow \mu_k + m\, \overline{p_k (\tilde\mu - \mu_k)}`, the variances likewise. m is meant for 64
    images; a batch of B has :math:`1 - (1 - m)^{B / 64}`. They begin around the running statistics:
    :math:`\mu_k = \mu + \sqrt{K / (2 (K - 1))}\, \sigma\, \xi_k` and :math:`\sigma^2_k = \sigma^2 / 2`.

    With one component p is 1, and each image is normalised with its own statistics. An input ``[N, C]`` has no
    statistics of images, so it is normalised with the running ones. An image with a value that is not finite does not
    change the components, and padding does not count inside `stabnorm.valid_tokens`.

    The published code makes new buffers in each forward, which `DistributedDataParallel` does not see, and takes the
    batch size for m from its configuration; here they change in place, and B is that of the batch.

    Attributes:
        components: ``[2, K, C]``, means and variances.
        pending: the change that the last batch asked for; the next forward carries it out first.
    """

    adds: ClassVar[tuple[str, ...]] = ("components", "pending", "unmixing")
    adds_to_a_norm: ClassVar[bool] = True
    components: Tensor
    pending: Tensor
    unmixing: Unmixing

    def _own_buffers(self) -> dict[str, Tensor | None]:
        return {name: self._buffers[name] for name in self.adds[:2] if name in self._buffers}

    def add_components(self, unmixing: Unmixing) -> None:
        """Add the components to a batch norm whose class this mixin has just become part of."""
        self.unmixing = unmixing
        norm: Any = self
        shape = 2, unmixing.components, norm.num_features
        self.register_buffer("components", norm.running_mean.new_empty(shape))
        self.register_buffer("pending", norm.running_mean.new_empty(shape))
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Let the components begin around the running statistics."""
        norm: Any = self
        mean, var = norm.running_mean.to(self.components.dtype), norm.running_var.to(self.components.dtype)
        count = self.unmixing.components
        share = 0.5 if count > 1 else 0.0  # of the variance that lies between the components
        noise = torch.randn(self.components.shape[1:], generator=torch.Generator().manual_seed(self.unmixing.seed))
        spread = (share * count / max(count - 1, 1) * var).sqrt()
        self.components[0] = mean + spread * noise.to(mean)
        self.components[1] = (1 - share) * var
        self.pending.zero_()

    def forward(self, input: Tensor) -> Tensor:  # the name in torch's batch norms
        """Normalise each image, and let the components follow."""
        norm: Any = self
        norm._check_input_dim(input)
        if input.ndim == 2:
            return nn.functional.batch_norm(
                input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        mask = mask_for(tokens_of(input.shape, 1), type(self).__name__)
        places = widened(input).flatten(2)
        mean, var = _of_images(places, None if mask is None else mask.flatten(1))
        components = settle_(self.components, self.pending)
        mixed_mean, mixed_var, share = unmixed(mean, var, components.to(mean.dtype), self.unmixing.temperature)
        leave_(self.pending, self._change(torch.stack([mean, var]).detach(), share, components))
        scale = torch.rsqrt(mixed_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        y = (places - mixed_mean[..., None]) * scale[..., None]
        if norm.bias is not None:
            y = y + norm.bias[:, None]
        return y.to(input.dtype).view_as(input)

    @torch.no_grad()
    def _change(self, own: Tensor, share: Tensor, components: Tensor) -> Tensor:
        """Return how far a batch moves the components, ``[2, K, C]``."""
        sound = torch.isfinite(own).all(2).all(0)[:, None]
        own, share = torch.where(sound, own, 0), torch.where(sound, share, 0)
        momentum = 1 - (1 - self.unmixing.momentum) ** (len(share) / IMAGES)
        apart = share[..., None] * (own[:, :, None] - components[:, None].to(own.dtype))  # [2, B, K, C]
        moved: Tensor = momentum / sound.sum().clamp(min=1).to(own.dtype) * apart.sum(1)
        return moved.to(components.dtype)

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Raise StabNormError, because the map depends on the image."""
        raise StabNormError(
            f"{type(self).__name__} normalises each image with statistics of its own, so it is no affine map in eval. "
            "Take it off with stabnorm.remedies.undo, and move the running statistics with recalibrate_norms(alpha=)"
        )

    def extra_repr(self) -> str:
        """Return the batch norm's own arguments and the number of components."""
        own: str = super().extra_repr()
        return f"{own}, components={self.unmixing.components}"


def unmixed(mean: Tensor, var: Tensor, components: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance ``[B, C]`` for each image, and its resemblance ``[B, K]`` to the components.

    Args:
        mean: of the images, ``[B, C]``.
        var: of the images, ``[B, C]``.
        components: means and variances, ``[2, K, C]``.
        temperature: of the softmax.
    """
    with torch.no_grad():
        own, others = nn.functional.normalize(mean, dim=1), nn.functional.normalize(components[0], dim=1)
        cosine = (own[:, None] * others).sum(-1)  # autocast would round a matrix product
        weight = torch.softmax(cosine / temperature, 1)[..., None]
    means, variances = (
        torch.lerp(component.expand(len(own), -1, -1), own[:, None].expand(-1, len(component), -1), weight)
        for component, own in zip(components, (mean, var), strict=True)
    )
    return means.mean(1), variances.mean(1) + means.var(1, correction=0), weight[..., 0]


def _of_images(places: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``[B, C]`` over the valid places of ``[B, C, L]``."""
    if valid is None:
        var, mean = torch.var_mean(places, -1, correction=0)
        return mean, var
    inside = valid[:, None]
    count = inside.sum(-1).clamp(min=1)
    mean = torch.where(inside, places, 0).sum(-1) / count
    return mean, torch.where(inside, places - mean[..., None], 0).square().sum(-1) / count
