"""A model's modules as a tree: their parents, their parameters' owners, and how one module takes another's place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stabnorm._models.devices import floating_tensor_of

PLAIN = (bool, int, float, str, tuple, torch.dtype, type(None))  # attributes that another module can take over


class Tree:
    """Parents and positions of a model's modules, and the owners of its parameters, as they are when it is built.

    Attributes:
        position: each module's number in module order, by its `id`.
        parents: each module's parents, and the names it has there, by its `id`.
        holders: each parameter's full names, and the modules that hold it, by its `id`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.position: dict[int, int] = {}
        self.parents: dict[int, list[tuple[nn.Module, str]]] = {}
        self.holders: dict[int, list[tuple[str, nn.Module]]] = {}
        for number, (name, module) in enumerate(model.named_modules()):
            self.position[id(module)] = number
            for child_name, child in module._modules.items():
                if child is not None:
                    self.parents.setdefault(id(child), []).append((module, child_name))
            for parameter_name, parameter in module._parameters.items():
                if parameter is not None:
                    path = f"{name}.{parameter_name}" if name else parameter_name
                    self.holders.setdefault(id(parameter), []).append((path, module))

    def shared(self, module: nn.Module) -> str | None:
        """Say which parameter of the module another module holds, too; None where there is no such parameter."""
        for name, parameter in module.named_parameters(recurse=False):
            for path, holder in self.holders[id(parameter)]:
                if holder is not module:
                    return f"its {name} is also {path}"
        return None

    def nearest_tensor(self, module: nn.Module) -> Tensor:
        """Give a floating tensor of the module or of what surrounds it: new tensors belong where it is."""
        surroundings = [module]
        while id(surroundings[-1]) in self.parents:
            surroundings.append(self.parents[id(surroundings[-1])][0][0])
        return floating_tensor_of(*surroundings)

    def frozen_around(self, module: nn.Module) -> bool:
        """Whether nothing is trained in the smallest part of the model that holds the module and a parameter."""
        while id(module) in self.parents and not any(True for _ in module.parameters()):
            module = self.parents[id(module)][0][0]
        parameters = list(module.parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module of this name stands, in that module's mode."""
    replace_modules(model, {name: new})


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put modules wherever those of these names stand, in their mode; the model is walked once."""
    by_old = {id(model.get_submodule(name)): module for name, module in new.items()}
    for name, module in new.items():
        module.train(model.get_submodule(name).training)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if id(child) in by_old:
                parent._modules[child_name] = by_old[id(child)]
