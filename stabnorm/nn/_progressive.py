"""The frame of a norm that blends into an affine map while the model trains; a mixin over the norm's own class."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from stabnorm import functional
from stabnorm._checks import check_choice, check_count
from stabnorm._models.devices import floating_tensor_of
from stabnorm._models.watched import change_class
from stabnorm.errors import StabNormError
from stabnorm.nn._base import (
    Conversion,
    EvalAffineNorm,
    one_node,
    take_flags,
    target_name,
    tensors_like,
    warn_of_partial_checkpoint,
)
from stabnorm.nn._blended import Idle, blend_of, fork
from stabnorm.nn._branch import Branch
from stabnorm.nn._channel_norm import UNKNOWN_WIDTH
from stabnorm.nn._over_norm import class_after, class_over, norm_class, reduced
from stabnorm.norms import NormLayer, find_norms
from stabnorm.norms.rows import as_rows

EvalMode = Literal["blend", "rep"]
BASES: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class ProgressiveNorm(EvalAffineNorm):
    r"""Base of the mixins that blend a norm with a branch that is affine in eval: lam norm(x) + (1 - lam) rep(x).

    A subclass builds `rep` in its constructor and hands it to `adopt`; the class that runs is made by `class_over` from
    the subclass and a norm class.
    """

    _in_place = True
    _rep_class: ClassVar[type[Branch]]  # the class of `rep`
    lam: Tensor
    rep: Branch
    eval_mode: EvalMode
    channel_dim: int
    norm_channel_dim: int
    feature_dims: int
    leave_out_norm: bool
    fitted: bool
    _norm_forward: Callable[[Tensor], Tensor]  # the norm's own forward, under another name
    _made_of: tuple[Any, ...]  # the arguments of `class_over` that made this class

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create an instance of the mixin over the class that `kind` names."""
        if not hasattr(cls, "_made_of"):
            kind = kwargs.get("kind", "layer")
            check_choice("kind", kind, BASES)
            cls = class_over(cls, BASES[kind])
        return super().__new__(cls)

    @classmethod
    def plan_from_norm(cls, layer: NormLayer, like: Tensor | None = None, **options: Any) -> Conversion:
        """Build `rep`, and the mixin over the norm's own class that becomes its class; see the base class."""
        module = layer.module
        for name in sorted(_reserved(cls)):
            if hasattr(module, name) and not (name == "channel_dim" and module.channel_dim == layer.channel_dim):
                raise StabNormError(f"its class has an attribute {name!r} of its own, which {cls.__name__} needs")
        if layer.feature_dims > 1 and layer.channel_dim != -1:
            raise StabNormError(f"its channels are on {layer.feature_dims} axes that are not the last ones")
        like = floating_tensor_of(module) if like is None else like
        with tensors_like(like):  # one over torch's norm checks the options and builds `rep`
            options = cls._rep_class.defaults_after(layer) | options
            width = layer.num_features or UNKNOWN_WIDTH
            twin = cls(width, channel_dim=layer.channel_dim, **options).to(like.dtype)  # type: ignore[call-arg]
            twin.rep.any_width = layer.any_width
        gain, bias = layer.gain_parameter, layer.bias_parameter
        base = type(module)
        try:
            made = class_after(cls, layer)
            base.__new__(base).__class__ = made
        except TypeError as error:
            raise StabNormError(f"no class can be made of {base.__name__} and {cls.__name__}: {error}") from error

        def carry_out() -> ProgressiveNorm:
            change_class(module, made)
            assert isinstance(module, ProgressiveNorm)
            module.adopt(twin.rep, twin.eval_mode, layer.feature_dims)
            for name, parameter in module.rep.named_parameters():
                take_flags(parameter, *((bias, gain) if name == "bias" else (gain, bias)))
            if "_is_hf_initialized" in vars(module):
                module.rep._is_hf_initialized = module._is_hf_initialized
            return module

        return Conversion(f"class {made.__name__}", carry_out)

    @classmethod
    def conversion_options(cls) -> set[str]:
        """Return its own options and those of `rep`."""
        return (super().conversion_options() | cls._rep_class.conversion_options()) - {"rep_options"}

    @torch.no_grad()
    def start_from_norm(self) -> None:
        """Give `rep` the current gain and bias of the norm."""
        if self.fitted or self.rep.weight.is_meta:
            return
        (layer,) = find_norms(self)
        if layer.gain is not None and layer.gain.is_meta:
            return
        self.rep.weight.copy_(torch.ones_like(self.rep.weight) if layer.gain is None else layer.gain)
        if self.rep.bias is not None:
            self.rep.bias.copy_(torch.zeros_like(self.rep.bias) if layer.bias is None else layer.bias.flatten())

    def adopt(self, rep: Branch, eval_mode: EvalMode = "blend", feature_dims: int = 1) -> None:
        """Add `rep`, `lam` and all options to a norm whose `__class__` was set to `class_over(...)`.

        The norm must hold the channels on the same axis as `rep`.

        Args:
            rep: the branch to switch to.
            eval_mode: see the class. Default: "blend".
            feature_dims: how many trailing axes hold the channels. Default: 1.

        Raises:
            ValueError: `eval_mode` is unknown, or several axes hold the channels and are not the last ones.
        """
        check_choice("eval_mode", eval_mode, get_args(EvalMode))
        if feature_dims > 1 and rep.channel_dim != -1:
            raise ValueError(
                f"channel_dim={rep.channel_dim} goes with one axis of channels, not {feature_dims}. Leave it at -1"
            )
        self.rep = rep.train(self.training)
        self.eval_mode, self.channel_dim, self.feature_dims = eval_mode, rep.channel_dim, feature_dims
        self.norm_channel_dim = rep.channel_dim
        self.leave_out_norm = False  # when every lam is 0, set it in all layers at once: this costs one recompilation
        self.fitted = False  # True if `rep` is the affine map that is closest to the norm
        self.register_buffer("lam", rep.weight.new_ones(()))
        self.without_numbers = rep.without_numbers
        self.start_from_norm()

    @property
    def _channels(self) -> int | tuple[int, ...]:
        """The sizes of the axes that hold the channels; as the first call decided, where the norm takes any width."""
        if self.feature_dims == 1:
            return self.rep.num_features
        own = (tensor.shape for tensor in self._parameters.values() if tensor is not None)
        shapes = (tuple(shape) for shape in (*own, getattr(self, "normalized_shape", ())))
        return next(shape for shape in shapes if len(shape) == self.feature_dims)

    @property
    def sync(self) -> bool:
        """Whether the statistics of `rep` are merged over ranks."""
        return self.rep.sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self.rep.sync = value

    def reset_parameters(self) -> None:
        """Reset the parameters of both norms, the statistics, and lam to 1."""
        if hasattr(super(), "reset_parameters"):  # by the MRO this is the norm's method
            super().reset_parameters()  # type: ignore[misc]
        if "rep" in self._modules:  # the norm's constructor calls this method before `rep` exists
            self.rep.reset_parameters()
            self.lam.fill_(1)
            self.leave_out_norm = self.fitted = False
            self.start_from_norm()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the blend at the current lam; in training mode `rep` also updates its statistics."""
        return one_node(self, x, mask) if isinstance(x, Proxy) else self.compute(x, mask)

    def frozen(self, x: Tensor) -> Tensor:
        """Run `forward` in eval mode, in operations that TorchScript compiles."""
        several = self.feature_dims > 1
        rep = self.rep.frozen(x.flatten(-self.feature_dims) if several else x)
        rep = rep.reshape(x.shape) if several else rep
        if self.leave_out_norm or self.eval_mode == "rep":
            return rep
        if self.norm_channel_dim == self.channel_dim:
            return functional.blend(self.lam, self._norm_forward(x), rep)
        norm = self._norm_forward(x.transpose(self.channel_dim, -1)).transpose(self.channel_dim, -1)
        return functional.blend(self.lam, norm, rep)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Run `forward` on tensors."""
        own = self.rep.blended_parameters()
        if self.leave_out_norm or (not self.training and self.eval_mode == "rep"):
            y = self.__rep(x, mask, *own)
            return Idle.apply(y, *self.__norm_parameters()) if self.training else y  # type: ignore[no-untyped-call]
        if (at_once := self._at_once(x, mask)) is not None:
            return at_once
        # First the mask, because these errors are clearer than those of the norm.
        self.rep.checked_mask(self._flat_channels(x), mask)
        present = [tensor for tensor in own if tensor is not None]
        for_norm, for_rep, *given = fork(self.lam, x, *present)
        norm = self.__norm(for_norm)  # before `rep`, whose statistics do not change if the norm raises
        if self.training:
            self._see_norm(x, mask, norm)
        rep = self.__rep(for_rep, mask, *given, *own[len(present) :])
        return blend_of(self.lam, norm, rep)

    def _at_once(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Compute both branches in one pass, where a kernel can do that."""
        return None

    def _see_norm(self, x: Tensor, mask: Tensor | None, norm: Tensor) -> None:
        """Learn from what the norm made of x, in training."""

    def __norm_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("rep.")]

    @torch.no_grad()
    def branches(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the outputs of norm and `rep` with batch statistics, as rows ``[R, C]``, and which rows are valid.

        No running statistic changes. The distance between the two says how far a step of lam moves the output.
        """
        rep, valid = self.rep.of_batch(self._flat_channels(x), mask)
        return as_rows(self.__norm(x), self.channel_dim, self.feature_dims), rep, valid

    def _flat_channels(self, x: Tensor) -> Tensor:
        """Flatten the axes that hold the channels to one axis."""
        if self.feature_dims == 1:
            return x
        return x.flatten(x.ndim - self.feature_dims) if x.ndim > self.feature_dims else x.reshape(1, -1)

    def __norm(self, x: Tensor) -> Tensor:
        last = x.ndim - 1
        if self.norm_channel_dim == self.channel_dim or self.channel_dim == last:
            return super().forward(x)  # type: ignore[no-any-return]
        # No axis is negative: the older ONNX exporter writes them as they are.
        axis = self.channel_dim if self.channel_dim >= 0 else self.channel_dim + x.ndim
        y: Tensor = super().forward(x.movedim(axis, last)).movedim(last, axis)
        return y.contiguous() if x.is_contiguous() else y

    def __rep(self, x: Tensor, mask: Tensor | None, *parameters: Tensor | None) -> Tensor:
        y = self.rep.apply_with(self._flat_channels(x), mask, *parameters)
        return y if self.feature_dims == 1 else y.reshape(x.shape)

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return the running statistics of `rep`."""
        return self.rep.running_statistics()

    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the same statistics of one batch; see the base class."""
        return self.rep.batch_statistics(self._flat_channels(x), mask)

    def input_branch(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Share of `rep` in the output, its gain, its eta, and whether it takes the mean out."""
        _, gain, eta, centred = self.rep.input_branch()
        return 1 - self.lam, gain, eta, centred

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return ``(scale, shift, channel_dim)`` of the norm in eval mode, in float64.

        Where several trailing axes hold the channels, scale and shift have their sizes.

        Raises:
            StabNormError: lam is not 0 and eval mode blends.
        """
        lam = float(self.lam)
        if lam != 0 and self.eval_mode == "blend":
            raise StabNormError(
                f"{target_name(self)} at lam={lam:.4g} still holds a share of {norm_class(self).__name__}, so it is no "
                "affine map in eval. Finish the schedule: lam reaches 0, then it folds"
            )
        scale, shift, channel_dim = self.rep.fold_affine()
        return scale.reshape(self._channels), shift.reshape(self._channels), channel_dim

    def extra_repr(self) -> str:
        """Return the norm's own arguments, and its own that differ from their default."""
        options = [super().extra_repr()]
        options += [f"eval_mode={self.eval_mode!r}"] if self.eval_mode != "blend" else []
        options += [f"channel_dim={self.channel_dim}"] if self.channel_dim != -1 else []
        return ", ".join(filter(None, options))

    def _own_buffers(self) -> dict[str, Tensor | None]:
        return {"lam": self._buffers["lam"]} if "lam" in self._buffers else {}  # the norm handles its own buffers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        added = (prefix + "lam", prefix + "rep.")
        of_the_norm = not any(key.startswith(added) for key in state_dict)  # a checkpoint of the norm itself
        if of_the_norm:
            given = [tensor for key, tensor in state_dict.items() if key.startswith(prefix)]
            if not given and any(True for _ in self.__norm_tensors()):
                warn_of_partial_checkpoint(self, prefix)
            if self.without_numbers and self.lam.is_meta and rest[0].get("assign_to_params_buffers"):
                device = next((tensor.device for tensor in given if isinstance(tensor, Tensor)), torch.device("cpu"))
                self.__start_on(device)
            state_dict.update(self.rep.state_dict(prefix=added[1], keep_vars=True))
            state_dict[added[0]] = self.lam
        self.leave_out_norm = False  # lam may be above 0 from now on
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if of_the_norm and not self.lam.is_meta and self.lam == 1 and self.rep.step == 0:
            self.start_from_norm()  # nothing was learnt yet

    def __norm_tensors(self) -> Iterator[str]:
        added = self.lam if "lam" in self._buffers else None
        return (name for name, tensor in self._own_tensors() if tensor is not added)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.without_numbers and self.rep.weight.is_meta:
            own = [tensor for name in self.__norm_tensors() if (tensor := getattr(self, name)) is not None]
            if own and not any(tensor.is_meta for tensor in own):
                self.__start_on(own[0].device)  # a loader has put the tensors of a plain checkpoint in place
            elif not own:
                try:
                    return self.__apply(fn, recurse)
                except NotImplementedError:  # a move, of a norm of which no checkpoint says anything
                    self.__start_on(torch.device("cpu"))
        return self.__apply(fn, recurse)

    def __start_on(self, device: torch.device) -> None:
        self.rep.to_empty(device=device)
        self.lam = torch.empty_like(self.lam, device=device)
        self._fill_in(set())

    def __apply(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        was_meta = self.lam.is_meta
        super()._apply(fn, recurse)
        self.without_numbers &= was_meta  # a loader may have put one tensor after the other in place
        if self.without_numbers and not self.lam.is_meta:  # to_empty() left what the memory held
            self._fill_in(set())
        return self

    @torch.no_grad()
    def _fill_in(self, loaded: set[str]) -> None:
        self.without_numbers = self.lam.is_meta
        if "lam" not in loaded:  # else `rep` was loaded, too
            self.lam.fill_(1)
            self.start_from_norm()

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        plan = reduced(self)
        return super().__reduce_ex__(protocol) if plan is None else plan


def _reserved(cls: type[ProgressiveNorm]) -> frozenset[str]:
    """Return the attributes of a mixin that would hide attributes of a norm class."""
    own = (mixin for mixin in cls.__mro__ if mixin not in nn.Module.__mro__)
    names = {name for mixin in own for name in (*vars(mixin), *getattr(mixin, "__annotations__", ()))}
    return frozenset(names - {*dir(nn.Module), "reset_parameters", "_is_hf_initialized"})


def checked_shape(given: Any) -> tuple[int, ...]:
    """Return `normalized_shape` as a tuple."""
    sizes = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not sizes:
        raise ValueError(f"normalized_shape={given!r} has no axis. Give the size of the channel axis")
    for size in sizes:
        check_count("normalized_shape", size, hint=", the size of the channel axis, or several")
    return sizes
