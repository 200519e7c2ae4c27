"""Edits: what a method trains at one place of a frozen backbone, and the stack that trains many of them together.

Whoever writes an `Edit` writes one plain module, as if there were one configuration. A `Stack` holds the edits of a
whole bundle: each of its tensors has one more axis in front, which counts configurations, and the batch that it is
given holds the configurations' examples one after the other. The training loop knows the stack and nothing else.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

_HOOKS = ("forward", "start", "calibrate", "begin_epoch", "draw")


class Trained(NamedTuple):
    """A parameter that the training loop updates."""

    parameter: nn.Parameter
    lr_scale: float  # its learning rate, relative to that of the head
    configuration: int | None  # whose it is; None where the first axis counts configurations


class Edit(nn.Module):
    """A trainable change of one activation, for one configuration.

    A subclass defines `forward(z)`, which may change everything but the batch axis of ``z``; the rest has defaults.
    Its parameters are trained. All else that the constructor does not fix for ever belongs in a buffer, since a bundle
    and a file keep nothing but tensors. Numbers drawn in the constructor come from the configuration's own seed, as in
    `start`. It is in train mode in training steps alone.
    """

    lr_scale: float = 1.0  # learning rate of the parameters, relative to that of the head
    sees_input: ClassVar[bool] = False  # at ``module:output``: `forward(z, x)` is given the module's input as well
    updates_itself: ClassVar[bool] = False  # whether its stack's `descend` takes the optimizer's place
    stack: ClassVar[type["Stack"]]  # what runs a bundle of these edits; `Stack` unless there is a faster one

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A faster stack does what its own edit does. A subclass that does something else must name its stack itself.
        if "stack" not in vars(cls) and {"__init__", *_HOOKS} & vars(cls).keys():
            cls.stack = Stack

    def start(self, generator: torch.Generator) -> None:
        """Draw initial values that the constructor did not draw."""

    def calibrate(self, z: Float[Tensor, "batch *unit"]) -> None:
        """See activations of training images, before anything is trained; only buffers may be set."""

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Move schedules on, which are buffers; epochs count from 0."""

    def draw(self, z: Float[Tensor, "batch *unit"], generator: torch.Generator) -> Tensor | None:
        """What is random in a training step; `forward` gets it as its argument ``noise``, which is else left out."""
        return None

    def lr_scale_of(self, parameter: str) -> float:
        """Learning rate of the parameter of this name, relative to that of the head."""
        return self.lr_scale

    def export(self) -> nn.Module:
        """The trained edit as a module without state of the training."""
        return copy.deepcopy(self).requires_grad_(False)

    def weights(self) -> Mapping[str, Tensor]:
        """Parameters of the backbone, by name, that do the same as the edit; empty where none can."""
        return {}

    def prompt_norm(self, activations: Callable[[], Sequence[Tensor]]) -> tuple[float, float] | None:
        """Norm of what a prompt adds and mean norm of what it is added to; None where the edit is no prompt.

        Args:
            activations: Gives what crosses the cut for some training images.
        """
        return None


class Stack(nn.Module):
    """The edits of a bundle as one module, run by `torch.vmap`: the frozen layers around it keep one large batch.

    Args:
        edits: One for each configuration, all of one kind and one shape.
    """

    constructed_alike: ClassVar[bool] = False  # whether no constructor draws, so that all are made with the same values
    template: Edit
    stacked: Any

    def __init__(self, edits: Sequence[Edit]) -> None:
        super().__init__()
        self.num = len(edits)
        self.place = ""  # where in the backbone the edits act
        self.generators: Sequence[torch.Generator] = ()  # one each, while random draws are wanted
        self.is_calibrating = False
        for name, module in edits[0].named_modules():
            _check_holds(name, module, type(edits[0]).__name__)
        self.__dict__["template"] = edits[0].eval()  # past torch's registration: the stacked tensors are trained
        self.stacked = nn.Module()  # has the edits' tensors, under their names
        _register_stacked(self.stacked, edits)

    @property
    def updates_itself(self) -> bool:
        """Whether `descend` takes the place of the recipe's optimizer."""
        return self.template.updates_itself

    @property
    def sees_input(self) -> bool:
        """Whether `forward` is given what the edited module was given."""
        return self.template.sees_input

    def forward(
        self, z: Float[Tensor, "stack *unit"], *inputs: Float[Tensor, "stack *given"]
    ) -> Float[Tensor, "stack *edited"]:
        given = [tensor.unflatten(0, (self.num, -1)) for tensor in (z, *inputs)]
        if self.is_calibrating:
            self._calibrate(given[0])
        noise = self._draw(given[0])
        tensors = _tensors(self.stacked)

        def alone(tensors: dict[str, Tensor], given: list[Tensor], noise: dict[str, Tensor]) -> Tensor:
            return functional_call(self.template, tensors, tuple(given), noise)

        self.template.train(bool(self.generators))
        try:
            edited = torch.vmap(alone)(tensors, given, noise)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                f"{type(self.template).__name__} draws at random in forward, which would ignore the seed (as dropout "
                "does); draw in Edit.draw, whose result forward gets as noise"
            ) from error
        finally:
            self.template.eval()
        if edited.shape[:2] != given[0].shape[:2]:
            raise ValueError(
                f"{type(self.template).__name__} at {self.place!r} was given {tuple(given[0].shape[1:])} and gave "
                f"{tuple(edited.shape[1:])}; the first axis counts images and must stay"
            )
        return edited.flatten(0, 1)

    # ---------------------------------------------------------------------------------- before and between steps

    @torch.no_grad()
    def put(self, configuration: int, edit: Edit) -> None:
        """Take over the values of an edit for one configuration.

        Raises:
            ValueError: If it differs from the others in a plain attribute, which a stack has once for all.
        """
        attributes, common = _attributes(edit), _attributes(self.template)
        if differing := [name for name in attributes if attributes[name] != common.get(name, attributes[name])]:
            raise ValueError(
                f"{differing[0]} of {type(edit).__name__} is {attributes[differing[0]]!r} for one configuration and "
                f"{common[differing[0]]!r} for another; what may differ belongs in a buffer (register_buffer)"
            )
        stacked = _tensors(self.stacked)
        for name, value in _tensors(edit).items():
            stacked[name][configuration].copy_(value)

    def edit(self, configuration: int) -> Edit:
        """The edit of one configuration, as a module of its own."""
        edit = copy.deepcopy(self.template).to(self._device())
        _copy_values(edit, self.stacked, configuration)
        return edit

    def start(self, generators: Sequence[torch.Generator]) -> None:
        """Draw what the edits begin with, each configuration from its own generator."""
        self._each("start", lambda k: (generators[k],))

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Move schedules on; epochs count from 0."""
        self._each("begin_epoch", lambda k: (epoch, num_epochs))

    # ---------------------------------------------------------------------------------- training

    def trained(self) -> Iterator[Trained]:
        """The parameters to be trained."""
        for name, parameter in self.stacked.named_parameters():
            if parameter.requires_grad:
                yield Trained(parameter, self.template.lr_scale_of(name), None)

    def descend(self, rates: Float[Tensor, " num"]) -> None:
        """One step of an edit that updates itself, with a learning rate for each configuration."""
        raise NotImplementedError(f"{type(self.template).__name__} says that it updates itself; its stack must say how")

    # ---------------------------------------------------------------------------------- what is kept of it

    def state(self, configuration: int) -> dict[str, Tensor]:
        """A copy of the values of one configuration."""
        return {name: value[configuration].detach().clone().cpu() for name, value in _tensors(self.stacked).items()}

    @torch.no_grad()
    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over the states of as many configurations as there are."""
        for name, stacked in _tensors(self.stacked).items():
            copy_alike(name, stacked, torch.stack([state[name] for state in states]))

    def export(self, configuration: int) -> nn.Module:
        """`Edit.export` of one configuration."""
        return self.edit(configuration).export()

    def weights(self, configuration: int) -> Mapping[str, Tensor]:
        """`Edit.weights` of one configuration."""
        return self.edit(configuration).weights()

    def prompt_norm(
        self, configuration: int, activations: Callable[[], Sequence[Tensor]]
    ) -> tuple[float, float] | None:
        """`Edit.prompt_norm` of one configuration."""
        return self.edit(configuration).prompt_norm(activations)

    @property
    def num_parameters(self) -> int:
        """Trained values of one configuration."""
        return sum(trained.parameter.numel() // self.num for trained in self.trained())

    # ---------------------------------------------------------------------------------- helpers

    def _calibrate(self, z: Float[Tensor, "num batch *unit"]) -> None:
        self._each("calibrate", lambda k: (z[k].detach(),))

    def _draw(self, z: Float[Tensor, "num batch *unit"]) -> dict[str, Tensor]:
        draws = (self.template.draw(z[k].detach(), generator) for k, generator in enumerate(self.generators))
        drawn = [draw for draw in draws if draw is not None]
        return {"noise": torch.stack(drawn).to(z.device)} if drawn else {}

    @torch.no_grad()
    def _each(self, hook: str, arguments: Callable[[int], tuple[Any, ...]]) -> None:
        """Call a hook of each configuration's edit, and take over what it did to the edit's tensors."""
        if getattr(type(self.template), hook) is getattr(Edit, hook):
            return  # which does nothing
        for k in range(self.num):
            edit = copy.deepcopy(self.template).to(self._device())
            _copy_values(edit, self.stacked, k)
            getattr(edit, hook)(*arguments(k))
            changed = _attributes(edit).items() - _attributes(self.template).items()
            for name, value in sorted(changed):
                raise ValueError(
                    f"{hook} of {type(edit).__name__} sets {name} to {value!r}, which neither a bundle nor a file "
                    "would keep; keep it in a buffer (register_buffer)"
                )
            self.put(k, edit)

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in _tensors(self.stacked).values()), torch.device("cpu"))


Edit.stack = Stack


class Shift(Edit):
    """``z + unit * values``: an activation prompt in training.

    Args:
        shape: Of the prompt.
        unit_shape: Of the activation, without the batch.
        in_rms_units: Measure the prompt in units of the activation's root mean square, so that one learning rate
            means the same at every site; otherwise the unit is one.
        lr_scale: As in `Edit`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        unit_shape: tuple[int, ...] | None = None,
        in_rms_units: bool = True,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.unit_shape, self.in_rms_units, self.lr_scale = unit_shape or shape, in_rms_units, lr_scale
        self.unit: Tensor
        self.activation_norm: Tensor
        self.values = nn.Parameter(torch.zeros(shape))
        self.register_buffer("unit", torch.ones([1] * len(shape)))
        self.register_buffer("activation_norm", torch.ones(()))  # mean Euclidean norm of the activations

    def forward(self, z: Float[Tensor, "batch *unit"]) -> Float[Tensor, "batch *unit"]:
        return z + (self.unit * self.values).to(z.dtype)

    def calibrate(self, z: Float[Tensor, "batch *unit"]) -> None:
        self.activation_norm.copy_(z.float().flatten(1).norm(dim=1).mean())
        if self.in_rms_units:
            self.unit.fill_(float(rms(z.unsqueeze(0))))

    def prompt_norm(self, activations: Callable[[], Sequence[Tensor]]) -> tuple[float, float]:
        delta = (self.unit * self.values).detach()
        return float(delta.expand(self.unit_shape).norm()), float(self.activation_norm)


class ShiftStack(Stack):
    """Prompts of a bundle, added by one operation."""

    constructed_alike = True

    def forward(self, z: Float[Tensor, "stack *unit"], *inputs: Tensor) -> Float[Tensor, "stack *unit"]:
        by_configuration = z.unflatten(0, (self.num, -1))
        if self.is_calibrating:
            self._calibrate(by_configuration)
        delta = (self.stacked.unit * self.stacked.values).to(z.dtype).unsqueeze(1)
        return (by_configuration + delta).flatten(0, 1)

    @torch.no_grad()
    def _calibrate(self, z: Float[Tensor, "num batch *unit"]) -> None:
        self.stacked.activation_norm.copy_(z.float().flatten(2).norm(dim=2).mean(1))
        check_scale(self.stacked.activation_norm, self.place)
        if self.template.in_rms_units:
            self.stacked.unit.copy_(rms(z).view(self.stacked.unit.shape))


Shift.stack = ShiftStack


class Affine(Edit):
    """``(1 + scale) * y + unit * shift`` after a normalization layer: tuning of its gamma and beta.

    With gamma' = gamma (1 + scale) and beta' = beta (1 + scale) + unit * shift this reaches every gamma' and beta'
    as long as gamma has no zeros. Gamma alone scales y - beta, which leaves beta as it is. The unit is the root mean
    square that gamma and beta give to a normalized input.

    Args:
        norm: The layer.
        shape: Of one value for each channel, as it is added to the layer's output.
        parameters: ``"gamma"``, ``"beta"`` or ``"both"``.
        name: Of the layer in the backbone.
        lr_scale: As in `Edit`.
    """

    def __init__(
        self, norm: nn.Module, shape: tuple[int, ...], parameters: str, name: str = "", lr_scale: float = 1.0
    ) -> None:
        super().__init__()
        tensors = (getattr(norm, tensor, None) for tensor in ("weight", "bias"))
        weight, bias = (None if tensor is None else tensor.detach() for tensor in tensors)
        if weight is None:
            raise ValueError(f"{norm} has no gamma and beta to tune; choose a site next to an affine norm layer")
        self.lr_scale, self.layer, self.norm = lr_scale, name, (weight, bias)  # a pair: not registered
        square = weight.square() + (0 if bias is None else bias.square())
        self.unit = float(square.mean().sqrt())
        keeps_beta = parameters == "gamma" and bias is not None
        self.register_buffer("beta", bias.view(shape) if keeps_beta else None, persistent=False)
        for tensor, kinds in (("scale", ("gamma", "both")), ("shift", ("beta", "both"))):
            self.register_parameter(tensor, nn.Parameter(torch.zeros(shape)) if parameters in kinds else None)

    def forward(self, y: Float[Tensor, "batch *unit"]) -> Float[Tensor, "batch *unit"]:
        z = y
        if self.scale is not None:
            z = z * (1 + self.scale).to(y.dtype)
        if self.beta is not None:
            z = z - (self.scale * self.beta).to(y.dtype)
        if self.shift is not None:
            z = z + (self.unit * self.shift).to(y.dtype)
        return z

    def weights(self) -> Mapping[str, Tensor]:
        weight, bias = self.norm
        if self.shift is not None and bias is None:
            return {}  # the layer has no place for a shift
        gain = torch.ones_like(weight) if self.scale is None else (1 + self.scale.detach()).view_as(weight)
        tuned = {f"{self.layer}.weight": weight * gain}
        if bias is not None:
            kept = bias if self.beta is not None else bias * gain
            shift = 0 if self.shift is None else self.unit * self.shift.detach().view_as(bias)
            tuned[f"{self.layer}.bias"] = kept + shift
        return tuned


class AffineStack(Stack):
    """Gammas and betas of a bundle, applied by as few operations as those of one."""

    constructed_alike = True

    def forward(self, y: Float[Tensor, "stack *unit"], *inputs: Tensor) -> Float[Tensor, "stack *unit"]:
        z, tuned = y.unflatten(0, (self.num, -1)), self.stacked
        if tuned.scale is not None:
            z = z * (1 + tuned.scale).to(y.dtype).unsqueeze(1)
        if tuned.beta is not None:
            z = z - (tuned.scale * tuned.beta).to(y.dtype).unsqueeze(1)
        if tuned.shift is not None:
            z = z + (self.template.unit * tuned.shift).to(y.dtype).unsqueeze(1)
        return z.flatten(0, 1)


Affine.stack = AffineStack


class WithInput(nn.Module):
    """A layer with an edit of its output that sees the layer's input: what stands in the layer's place.

    Args:
        layer: Called with one tensor first; further arguments are passed on.
        edit: An edit, or a stack of them, with `Edit.sees_input`.
    """

    def __init__(self, layer: nn.Module, edit: nn.Module) -> None:
        super().__init__()
        self.layer, self.edit = layer, edit

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        return self.edit(self.layer(x, *args), x)


def rms(x: Float[Tensor, "num *rest"]) -> Float[Tensor, " num"]:
    """Root mean square of each entry of a stack; never zero."""
    return x.float().square().flatten(1).mean(1).sqrt().clamp_min(1e-12)


def check_scale(activation_norm: Float[Tensor, " num"], place: str) -> None:
    """Raise ValueError where activations are zero: a prompt in their units would be nothing."""
    if not activation_norm.all():
        raise ValueError(f"the activation at {place!r} is zero, so a prompt has no scale; take another site")


def _register_stacked(module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Give a module the tensors of several alike ones, stacked, under the same names."""
    first = parts[0]
    for name, parameter in first._parameters.items():
        stacked = None
        if parameter is not None:
            values = torch.stack([getattr(part, name).detach() for part in parts])
            stacked = nn.Parameter(values, requires_grad=parameter.requires_grad)
        module.register_parameter(name, stacked)
    for name, buffer in first._buffers.items():
        values = None if buffer is None else torch.stack([getattr(part, name) for part in parts])
        module.register_buffer(name, values, persistent=name not in first._non_persistent_buffers_set)
    for name, _ in first.named_children():
        child = nn.Module()
        _register_stacked(child, [getattr(part, name) for part in parts])
        module.add_module(name, child)


def _attributes(edit: nn.Module) -> dict[str, Any]:
    """The plain values that an edit and the modules in it hold beside their tensors."""
    return {
        f"{module_name}.{name}".lstrip("."): value
        for module_name, module in edit.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }


def _check_holds(name: str, module: nn.Module, owner: str) -> None:
    """Raise ValueError if a module of an edit holds a tensor that neither a bundle nor a file would keep."""
    for attribute, value in vars(module).items():
        if isinstance(value, Tensor):
            place = f"{name}.{attribute}".lstrip(".")
            raise ValueError(f"{place} of {owner} is a plain tensor; keep it in a buffer (register_buffer)")


def copy_alike(name: str, target: Tensor, value: Tensor) -> None:
    """Copy a tensor into one of the same shape and kind; torch itself would broadcast and convert."""
    if target.shape != value.shape or target.is_floating_point() != value.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and type {value.dtype}; expected {tuple(target.shape)} and "
            f"{target.dtype}"
        )
    target.copy_(value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def _copy_values(edit: Edit, stacked: nn.Module, configuration: int) -> None:
    values = _tensors(stacked)
    for name, tensor in _tensors(edit).items():
        tensor.copy_(values[name][configuration])
