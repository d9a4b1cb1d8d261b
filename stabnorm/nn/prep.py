"""PRepBN: a blend that moves from LayerNorm to RepBN while the model trains; a mixin over the norm's own class."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from stabnorm import functional
from stabnorm._checks import check_choice, check_count, check_names, check_number
from stabnorm._models.devices import floating_tensor_of
from stabnorm._models.watched import change_class, own_class
from stabnorm.errors import StabNormError
from stabnorm.nn._base import (
    TARGETS,
    Conversion,
    EvalAffineNorm,
    Float32Buffers,
    one_node,
    take_flags,
    tensors_like,
    warn_of_partial_checkpoint,
)
from stabnorm.nn._blended import Idle, blend_of, blended, fork
from stabnorm.nn._channel_norm import UNKNOWN_WIDTH, check_variant
from stabnorm.nn.rep import RepBN
from stabnorm.norms import Kind, NormLayer, find_norms, is_registered, register_norm
from stabnorm.norms.rows import as_rows
from stabnorm.ops.blended import blended_norm
from stabnorm.ops.dispatch import REFERENCE

EvalMode = Literal["blend", "rep"]
_BASES: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_CLASSES: dict[tuple[Any, ...], type["PRepBN"]] = {}


class PRepBN(EvalAffineNorm):
    r"""Progressive re-parameterised batch norm (arXiv:2405.11582, SLAB, eq. 3): lam norm(x) + (1 - lam) RepBN(x).

    `lam` is a 0-dim buffer that starts at 1; write it in place during the training. At lam = 1 outputs and gradients
    are the same bits as those of the norm, and `rep` already updates its statistics. At lam = 0 the norm is a RepBN and
    can be folded. A checkpoint of the norm itself loads with ``strict=True``, too; it changes neither lam nor a `rep`
    that has seen a batch.

    `rep` starts with the gain and bias of the norm and with eta = 0. It takes the norm's values once more when lam
    leaves 1 (`start_from_norm`). The published start, eta = 1, adds the input itself to the output. Because a norm
    divides by the scale of its input, this scale may have grown by then, and eta x may be the larger part
    (`benchmarks.switch_study`, "wide digits").

    The class is a mixin over a norm class: ``PRepBN(d)`` is an instance of `PRepBN` and of `nn.LayerNorm`. It has the
    parameters of the norm under their own names, and the child `rep`, a `RepBN`.

    Args:
        normalized_shape: C, or the shape of the last axes if they are normalised together.
        eps: eps of both norms. Default: 1e-5.
        kind: "layer" for `nn.LayerNorm`, "rms" for `nn.RMSNorm`. Default: "layer".
        eval_mode: what eval mode computes while lam > 0: "blend", as in training, or "rep", RepBN alone, as published.
            Default: "blend".
        channel_dim: axis of the input that holds the channels. Default: -1.
        sync: merge RepBN's statistics over ranks. Default: False.
        variant: "official" sets `eval_mode="rep"` and `init="vision"`, as published. The published module also counts
            its own steps, see `stabnorm.nn.official.OfficialPRepBN`; here you set lam. Default: "corrected".
        **rep_options: further arguments of `RepBN`. The default of `init` is "norm"; with kind "rms" that of `center`
            is False.

    Shape:
        ``[..., C]`` to the same shape, with C on the axis `channel_dim`. `mask` has the shape without that axis.

    Raises:
        TypeError: an argument has another type, or there is no such option.
        ValueError: an argument is out of range.

    >>> norm, x = PRepBN(8), torch.randn(4, 6, 8)
    >>> torch.equal(norm(x), torch.nn.functional.layer_norm(x, (8,)))
    True
    >>> norm.lam.zero_()
    tensor(0.)
    >>> torch.equal(norm(x), norm.rep(x)), isinstance(norm, nn.LayerNorm)
    (True, True)
    """

    _in_place = True
    lam: Tensor
    rep: RepBN
    eval_mode: EvalMode
    channel_dim: int
    norm_channel_dim: int
    feature_dims: int
    leave_out_norm: bool
    fitted: bool
    _norm_forward: Callable[[Tensor], Tensor]  # the norm's own forward, under another name
    _made_of: tuple[Any, ...]  # the arguments of `prep_class` that made this class

    def __new__(cls, *args: Any, **kwargs: Any) -> "PRepBN":
        """Create an instance of the mixin over the class that `kind` names."""
        if cls is PRepBN:
            kind = kwargs.get("kind", "layer")
            check_choice("kind", kind, _BASES)
            cls = prep_class(_BASES[kind])
        return super().__new__(cls)

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size | tuple[int, ...],
        eps: float = 1e-5,
        *,
        kind: Literal["layer", "rms"] = "layer",
        eval_mode: EvalMode = "blend",
        channel_dim: int = -1,
        sync: bool = False,
        variant: str = "corrected",
        **rep_options: Any,
    ) -> None:
        check_variant(variant)
        shape = _shape(normalized_shape)
        check_number("eps", eps, least=0)
        check_names("PRepBN", rep_options, RepBN.conversion_options())
        super().__init__(normalized_shape, eps)  # by the MRO this is the norm's constructor
        if kind == "rms":
            rep_options.setdefault("center", False)
        if variant == "official":
            eval_mode = "rep"
            rep_options.setdefault("init", "vision")
        rep_options.setdefault("init", "norm")
        features = torch.Size(shape).numel()
        self.adopt(RepBN(features, eps, channel_dim=channel_dim, sync=sync, **rep_options), eval_mode, len(shape))
        self.norm_channel_dim = -1  # torch's norms take channels last

    @classmethod
    def plan_from_norm(cls, layer: NormLayer, like: Tensor | None = None, **options: Any) -> Conversion:
        """Build `rep`, and the mixin over the norm's own class that becomes its class; see the base class."""
        module = layer.module
        for name in sorted(_RESERVED):
            if hasattr(module, name) and not (name == "channel_dim" and module.channel_dim == layer.channel_dim):
                raise StabNormError(f"its class has an attribute {name!r} of its own, which PRepBN needs")
        if layer.feature_dims > 1 and layer.channel_dim != -1:
            raise StabNormError(f"its channels are on {layer.feature_dims} axes that are not the last ones")
        like = floating_tensor_of(module) if like is None else like
        with tensors_like(like):  # a PRepBN over torch's norm checks the options and builds `rep`
            options = RepBN.defaults_after(layer) | options
            width = layer.num_features or UNKNOWN_WIDTH
            twin = PRepBN(width, channel_dim=layer.channel_dim, **options).to(like.dtype)
            twin.rep.any_width = layer.any_width
        gain, bias = layer.gain_parameter, layer.bias_parameter
        base = type(module)
        try:
            made = _class_after(layer)
            base.__new__(base).__class__ = made
        except TypeError as error:
            raise StabNormError(f"no class can be made of {base.__name__} and PRepBN: {error}") from error

        def carry_out() -> PRepBN:
            change_class(module, made)
            assert isinstance(module, PRepBN)
            module.adopt(twin.rep, twin.eval_mode, layer.feature_dims)
            take_flags(module.rep.weight, gain, bias)
            take_flags(module.rep.bias, bias, gain)
            take_flags(module.rep.eta, gain, bias)
            if "_is_hf_initialized" in vars(module):
                module.rep._is_hf_initialized = module._is_hf_initialized
            return module

        return Conversion(f"class {made.__name__}", carry_out)

    @classmethod
    def conversion_options(cls) -> set[str]:
        """Return its own options and those of `RepBN`."""
        return (super().conversion_options() | RepBN.conversion_options()) - {"rep_options"}

    @torch.no_grad()
    def start_from_norm(self) -> None:
        """Give `rep` the current gain and bias of the norm, and eta = 0.

        Nothing happens if `init` is not "norm", or if `rep` was fitted (``convert_norms(init="fit")``). Call it when
        lam leaves 1 after a training at lam = 1, as `stabnorm.ProgressiveSwitch` does.

        >>> norm = PRepBN(2)
        >>> _ = nn.init.constant_(norm.weight, 3.0)
        >>> norm.start_from_norm()
        >>> norm.rep.weight.tolist(), norm.rep.eta.item()
        ([3.0, 3.0], 0.0)
        """
        if self.fitted or self.rep.init != "norm" or self.rep.weight.is_meta:
            return
        (layer,) = find_norms(self)
        if layer.gain is not None and layer.gain.is_meta:
            return
        self.rep.weight.copy_(torch.ones_like(self.rep.weight) if layer.gain is None else layer.gain)
        if self.rep.bias is not None:
            self.rep.bias.copy_(torch.zeros_like(self.rep.bias) if layer.bias is None else layer.bias.flatten())
        self.rep.eta.zero_()

    def adopt(self, rep: RepBN, eval_mode: EvalMode = "blend", feature_dims: int = 1) -> None:
        """Add `rep`, `lam` and all options to a norm whose `__class__` was set to `prep_class(...)`.

        The norm must hold the channels on the same axis as `rep`.

        Args:
            rep: the RepBN to switch to.
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
        self.register_buffer("lam", rep.running_var.new_ones(()))
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
        """Whether RepBN's statistics are merged over ranks."""
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
        if self.leave_out_norm or (not self.training and self.eval_mode == "rep"):
            y = self.__rep(x, mask, *self.__rep_parameters())
            return Idle.apply(y, *self.__norm_parameters()) if self.training else y  # type: ignore[no-untyped-call]
        if self.__at_once():
            rows, valid = self.rep.rows_of(x, mask)
            backend = blended_norm.chosen(rows, valid)
            if backend != REFERENCE:
                norm: Any = self  # an nn.LayerNorm
                y = blended(backend, self.lam, rows, valid, norm.weight, norm.bias, norm.eps, self.rep)
                return self.rep.like_input(y, x)
        self.rep.checked_mask(self.__flat(x), mask)  # first, because its errors are clearer than those of the norm
        weight, bias, eta = self.__rep_parameters()
        given = (weight, eta) if bias is None else (weight, eta, bias)
        for_norm, for_rep, weight, eta, *offset = fork(self.lam, x, *given)
        bias = offset[0] if offset else None
        norm = self.__norm(for_norm)  # before `rep`, whose statistics do not change if the norm raises
        rep = self.__rep(for_rep, mask, weight, bias, eta)
        return blend_of(self.lam, norm, rep)

    def __at_once(self) -> bool:
        """Whether both norms can be computed together: only in training, with torch's own LayerNorm over one axis."""
        own_forward = norm_class(self).forward is nn.LayerNorm.forward
        return own_forward and self.feature_dims == 1 and self.training and self.rep.fits_blended_kernels

    def __rep_parameters(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.rep.weight, self.rep.bias, self.rep.eta

    def __norm_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("rep.")]

    @torch.no_grad()
    def branches(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the outputs of norm and RepBN with batch statistics, as rows ``[R, C]``, and which rows are valid.

        No running statistic changes. The distance between the two says how far a step of lam moves the output.
        """
        rep, valid = self.rep.of_batch(self.__flat(x), mask)
        return as_rows(self.__norm(x), self.channel_dim, self.feature_dims), rep, valid

    def __flat(self, x: Tensor) -> Tensor:
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

    def __rep(self, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, eta: Tensor) -> Tensor:
        y = self.rep.apply_with(self.__flat(x), mask, weight, bias, eta)
        return y if self.feature_dims == 1 else y.reshape(x.shape)

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Return the running statistics of `rep`."""
        return self.rep.running_statistics()

    def batch_statistics(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the same statistics of one batch; see the base class."""
        return self.rep.batch_statistics(self.__flat(x), mask)

    def input_branch(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Share of RepBN in the output, its gain, its eta, and whether it takes the mean out."""
        return 1 - self.lam, self.rep.weight, self.rep.eta, self.rep.center

    def fold_affine(self) -> tuple[Tensor, Tensor, int]:
        """Return ``(scale, shift, channel_dim)`` of the norm in eval mode, in float64.

        Where several trailing axes hold the channels, scale and shift have their sizes.

        Raises:
            StabNormError: lam is not 0 and eval mode blends.
        """
        lam = float(self.lam)
        if lam != 0 and self.eval_mode == "blend":
            raise StabNormError(
                f"PRepBN at lam={lam:.4g} still holds a share of {norm_class(self).__name__}, so it is no affine map "
                "in eval. Finish the schedule: lam reaches 0, then it folds"
            )
        scale, shift, channel_dim = self.rep.fold_affine()
        return scale.reshape(self._channels), shift.reshape(self._channels), channel_dim

    def extra_repr(self) -> str:
        """Return the norm's own arguments, and those of PRepBN that differ from their default."""
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
        made_of = vars(type(self)).get("_made_of")
        if made_of is None:
            return super().__reduce_ex__(protocol)  # a subclass of the user's, which pickle finds by its name
        return _blank, made_of, self.__dict__


def _shape(given: Any) -> tuple[int, ...]:
    """Return `normalized_shape` as a tuple."""
    sizes = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not sizes:
        raise ValueError(f"normalized_shape={given!r} has no axis. Give the size of the channel axis")
    for size in sizes:
        check_count("normalized_shape", size, hint=", the size of the channel axis, or several")
    return sizes


# Attributes of PRepBN that would hide attributes of a norm class.
_RESERVED = {
    name
    for mixin in (PRepBN, EvalAffineNorm, Float32Buffers)
    for name in (*vars(mixin), *mixin.__annotations__)
} - {*dir(nn.Module), "reset_parameters", "_is_hf_initialized"}  # fmt: skip


def _class_after(layer: NormLayer) -> type[PRepBN]:
    """Return the mixin over the layer's class; `layer` has what `register_norm` needs to know."""
    base = own_class(layer.module)
    if base.forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or is_registered(base):
        return prep_class(base)
    return prep_class(
        base, layer.kind, channel_dim=layer.channel_dim, num_features="_channels", eps=layer.eps,
        weight=layer.weight_name, bias=layer.bias_name, gain_offset=layer.gain_offset,
    )  # fmt: skip


def norm_class(norm: PRepBN) -> type[nn.Module]:
    """Return the class that a PRepBN is a mixin over: the original class of a converted norm, even while watched."""
    base: type[nn.Module] = norm._made_of[0]
    return base


def prep_class(base: type[nn.Module], kind: Kind | None = None, **registration: Any) -> type[PRepBN]:
    """Return the mixin of `PRepBN` over `base`; the same arguments always give the same class.

    Its forward also accepts the input under the argument name that `base` uses.

    Args:
        base: a norm class whose `forward` takes the input as its first argument.
        kind: kind for `register_norm`, if the class is neither torch's own nor registered. Default: None.
        **registration: further arguments of `register_norm`.

    >>> prep_class(nn.LayerNorm) is type(PRepBN(8))
    True
    """
    made_of = (base, kind, tuple(sorted(registration.items())))
    if made_of not in _CLASSES:
        content: dict[str, Any] = {"__module__": __name__, "__doc__": PRepBN.__doc__, "_made_of": made_of}
        content["forward"] = _forward_like(base.forward)
        # Both are for TorchScript, which knows no super(), and of a class's annotations only tensors and the like.
        content["_norm_forward"] = _renamed(base.forward, "_norm_forward")
        content["__annotations__"] = {"lam": Tensor}
        made = type(f"PRepBN{base.__name__}", (PRepBN, base), content)
        if kind is None and not is_registered(base) and issubclass(base, nn.LayerNorm | nn.RMSNorm):
            kind = "layer" if issubclass(base, nn.LayerNorm) else "rms"
            registration = {"num_features": "normalized_shape", "channel_dim": "channel_dim"}
            registration["bias"] = "bias" if kind == "layer" else None
        if kind is not None:
            register_norm(made, kind, **registration)
        _CLASSES[made_of] = made
    return _CLASSES[made_of]


def _for_torchscript(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the blend at the current lam, in eval mode."""
    return self.frozen(x)  # type: ignore[no-any-return]


def _forward_like(own: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return a `PRepBN.forward` that also accepts the input under the argument name of the norm's own forward."""
    name = [*inspect.signature(own).parameters][1]

    @functools.wraps(own)
    def forward(self: PRepBN, *args: Any, **kwargs: Any) -> Tensor:
        if name in kwargs:
            args = (kwargs.pop(name), *args)
        return PRepBN.forward(self, *args, **kwargs)

    forward.__wrapped__ = _for_torchscript  # TorchScript compiles the source of what a function wraps
    return forward


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    renamed = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    renamed.__kwdefaults__, renamed.__annotations__ = function.__kwdefaults__, function.__annotations__
    return renamed


def _blank(base: type[nn.Module], kind: Kind | None, registration: tuple[tuple[str, Any], ...]) -> nn.Module:
    """Create an empty instance of the mixin over `base`, for pickle and deepcopy."""
    made = prep_class(base, kind, **dict(registration))
    return made.__new__(made)


TARGETS["prepbn"] = PRepBN
