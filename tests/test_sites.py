"""Claims about sites: a cut changes nothing, an edit is borrowed, a name means one place, a description is right."""

import copy
import gc
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import timm
import tiny
import torch
from torch import Tensor, nn

from apthory import backbones, sites
from apthory.sites import tracing

EXACT = {
    "vit": ["blocks.1.norm2:input", "blocks.0.attn.qkv", "blocks.2.mlp:input", "patch_embed", ":output"],
    "deit": ["blocks.1.norm2:input", "blocks.0.attn.proj", "norm", ":output"],
    "swin": ["layers.0.blocks.1.norm2:input", "layers.0.blocks.1.attn:input", "layers.1.downsample", ":output"],
    "convnext": ["stages.1.blocks.0.norm:input", "stages.1.blocks.1.mlp.fc1:input", "stem", ":output"],
    "resnet": ["layer1.0.bn2:input", "layer2.0.downsample.1:input", "layer1.0.act1", "maxpool", ":output"],
    "mobilenetv2": ["blocks.3.1.bn3:input", "blocks.2.0.conv_dw", "global_pool", ":output"],
}
EDIT_SITES = ["blocks.0", "blocks.1.norm1:output", "blocks.1.mlp:input"]


class Plain(nn.Module):
    """Three layers: one called twice, one never, and one that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.act(self.first(x))))


class Branching(nn.Module):
    """Its control flow depends on values, which torch.fx cannot record."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(z if z.sum() > 0 else -z)


def all_sites(model: nn.Module) -> list[str]:
    return [*sites.list_sites(model), *sites.list_sites(model, "norm")]


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------------------------------- split


# Every family is cut in the tests below too, at fewer sites; these two have the most, and take the longest.
FAMILIES = [
    pytest.param(name, marks=pytest.mark.slow if name in ("swin", "mobilenetv2") else ()) for name in tiny.FAMILIES
]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_of_prefix_is_the_backbone_bit_for_bit_at_every_site(family: str):
    model = tiny.backbone(family)
    batches = [tiny.images(family, num) for num in (1, 5)]  # the trace itself saw 2 and 3
    expected = [model(x) for x in batches]
    before = backbones.digest(model)
    for site in [*all_sites(model), *EXACT[family]]:
        prefix, suffix = sites.split(model, site)
        for x, y in zip(batches, expected, strict=True):
            crossing = prefix(x)
            kept = [z.clone() for z in crossing]
            assert torch.equal(suffix(*crossing), y), site
            assert torch.equal(suffix(*crossing), y), f"{site}: second call"
            assert all(map(torch.equal, crossing, kept)), f"{site}: the suffix wrote into its input"
    assert backbones.digest(model) == before
    assert num_hooks(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_suffix_of_prefix_is_the_backbone_bit_for_bit_in_float64(family: str):
    model, x = tiny.backbone(family, torch.float64), tiny.images(family, 4, dtype=torch.float64)
    for site in [*sites.list_sites(model), *EXACT[family]]:
        prefix, suffix = sites.split(model, site)
        assert suffix(*prefix(x)).dtype == torch.float64
        assert torch.equal(suffix(*prefix(x)), model(x)), site


@torch.no_grad()
@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_shipped_backbones_are_cut_bit_for_bit_at_every_block(name: str):
    model = backbones.load(name, device="cpu")
    x = torch.randn(4, 3, 64, 64)
    y = model(x)
    for site in sites.list_sites(model):
        prefix, suffix = sites.split(model, site)
        assert torch.equal(suffix(*prefix(x)), y), site


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefix_returns_what_a_hook_sees_at_the_site_first(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 4)
    for site in [sites.list_sites(model)[2], sites.list_sites(model, "norm")[3], EXACT[family][0]]:
        assert torch.equal(sites.split(model, site)[0](x)[0], hooked(model, site, x)), site


def test_a_norm_inside_a_residual_branch_crosses_with_its_skip():
    model, x = tiny.backbone("vit"), tiny.images("vit", 4)
    assert len(sites.split(model, "blocks.1.norm1")[0](x)) == 2
    assert len(sites.split(model, "blocks.1:input")[0](x)) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_stack_of_batches_through_the_suffix_gives_each_its_own_result(
    family: str, dtype: torch.dtype, tolerance: float
):
    model = tiny.backbone(family, dtype)
    batches = [tiny.images(family, 3, seed, dtype) for seed in (1, 2, 3, 4)]
    for site in [sites.list_sites(model)[2], EXACT[family][0]]:
        prefix, suffix = sites.split(model, site)
        with torch.no_grad():
            crossing = [prefix(x) for x in batches]
            together = suffix(*(torch.cat(parts) for parts in zip(*crossing, strict=True)))
            alone = torch.cat([model(x) for x in batches])
        torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_swin_suffix_makes_window_counts_anew_for_any_batch():
    """Four windows an image here: a number that the prefix of a cut inside attention knows and the suffix must."""
    model = tiny.backbone("swin")
    for site in ("layers.0.blocks.1.attn.qkv", "layers.0.blocks.1.attn:input", "layers.0.blocks.1.attn:output"):
        prefix, suffix = sites.split(model, site)
        for num in (1, 2, 3, 7):
            x = tiny.images("swin", num)
            assert torch.equal(suffix(*prefix(x)), model(x)), (site, num)
            twice = torch.cat([suffix(*(torch.cat([z, z]) for z in prefix(x)))])
            torch.testing.assert_close(twice, model(x).repeat(2, 1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_edits_in_the_suffix_do_what_hooks_do(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 4)
    block = sites.list_sites(model)[2]
    cut = sites.resolve(model, block)
    norms = [name for site in sites.list_sites(model)[2:] for name in sites.norms_between(model, site)]
    after = [sites.affine_output(model, name) for name in norms][:2]
    shift = nn.Conv1d(1, 1, 1)  # any module with parameters; it becomes a part of the suffix
    edits = {cut: lambda z: 1.5 * z, after[0]: Scaled(shift), after[1]: torch.tanh}
    prefix, suffix = sites.split(model, cut, edits)
    with torch.no_grad(), sites.edited(model, edits):
        expected = model(x)
    with torch.no_grad():
        assert torch.equal(suffix(*prefix(x)), expected)
        assert not torch.equal(model(x), expected)
    assert shift in set(suffix.modules())


class Scaled(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, z: Tensor) -> Tensor:
        return z * self.part.weight.sum() + 0.1


def test_gradients_of_the_suffix_are_those_of_the_edited_backbone():
    model, x = tiny.backbone("convnext"), tiny.images("convnext", 4)
    site = "stages.1.blocks.1:input"
    delta = torch.zeros(sites.site_shape(model, site), requires_grad=True)
    prefix, suffix = sites.split(model, site, {site: delta.add})
    cut = torch.autograd.grad(suffix(*prefix(x)).square().sum(), delta)
    with sites.edited(model, {site: delta.add}):
        whole = torch.autograd.grad(model(x).square().sum(), delta)
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)


def test_halves_share_the_weights_of_the_backbone():
    model = Plain()
    prefix, suffix = sites.split(model, "act:output", example=torch.zeros(2, 6))
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for half in (prefix, suffix) for parameter in half.parameters()} <= own
    assert model.act.inplace  # the halves never work in place, the backbone still does


def test_the_cut_leaves_a_backbone_that_works_in_place_as_it_was():
    model, x = Plain(), torch.randn(4, 6)
    prefix, suffix = sites.split(model, "first:output", example=x)
    crossing = prefix(x)
    assert (crossing[0] < 0).any()
    kept = crossing[0].clone()
    assert torch.equal(suffix(*crossing), model(x))
    assert torch.equal(crossing[0], kept)


@pytest.mark.parametrize("edit", [partial(torch.mul, other=2), torch.ones(6).add, torch.tanh, lambda z: z - 1])
def test_any_callable_may_be_an_edit(edit: Callable):
    model, x = Plain(), torch.randn(4, 6)
    prefix, suffix = sites.split(model, "act", {"act": edit}, x)
    with sites.edited(model, {"act": edit}):
        expected = model(x)
    assert torch.equal(suffix(*prefix(x)), expected)


def test_an_edit_before_the_cut_is_refused():
    with pytest.raises(ValueError, match=r"edit at 'blocks.0:input' lies before the cut at 'blocks.1:input'"):
        sites.split(tiny.backbone("vit"), "blocks.1:input", {"blocks.0:input": torch.tanh})


def test_a_cut_on_which_the_output_does_not_depend_is_refused():
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            return self.main(x)

    with pytest.raises(ValueError, match="output does not depend on site 'side:output'"):
        sites.split(Side(), "side", example=torch.zeros(2, 6))


def test_a_model_that_cannot_be_traced_runs_whole_and_says_so():
    model, x = Branching(), torch.randn(4, 6)
    assert not sites.is_traceable(model)
    edits = {"first": lambda z: z + 1, "last:input": nn.Linear(6, 6)}
    with pytest.warns(UserWarning, match=r"cannot trace Branching.*whole backbone runs at every step"):
        prefix, suffix = sites.split(model, "first", edits)
    with sites.edited(model, edits):
        expected = model(x)
    assert torch.equal(suffix(*prefix(x)), expected)
    assert not torch.equal(model(x), expected)
    assert edits["last:input"] in set(suffix.modules())
    with pytest.raises(ValueError, match="no module 'frist'"), pytest.warns(UserWarning, match="cannot trace"):
        sites.split(model, "frist")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_traced(family: str):
    assert sites.is_traceable(tiny.backbone(family))


# ---------------------------------------------------------------------------------------------- edited


def test_edited_restores_the_backbone_always():
    model, x = tiny.backbone("vit"), tiny.images("vit", 2)
    with torch.no_grad():
        expected = model(x)
        with sites.edited(model, {site: lambda z: z + 1 for site in EDIT_SITES}) as borrowed:
            assert borrowed is model
            assert not torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        with pytest.raises(ZeroDivisionError), sites.edited(model, {"blocks.0": lambda z: z / (1 // 0)}):
            model(x)
        with (
            pytest.raises(ValueError, match="no module"),
            sites.edited(model, {"blocks.0": torch.tanh, "nope": torch.tanh}),
        ):
            raise AssertionError("never entered")
        assert torch.equal(model(x), expected)
    assert num_hooks(model) == 0


def test_editing_nothing_costs_nothing():
    model = tiny.backbone("vit")
    with sites.edited(model, {}):
        assert num_hooks(model) == 0


def test_edits_at_input_and_output_change_what_a_module_is_given_and_returns():
    model, x = Plain(), torch.randn(4, 6)

    def rest(z: Tensor) -> Tensor:
        return model.twice(model.twice(z.relu()))

    for edits, expected in [
        ({"first:input": lambda z: 2 * z}, rest(model.first(2 * x))),
        ({"first:output": lambda z: z + 1}, rest(model.first(x) + 1)),
        ({":input": lambda z: z - 1, ":output": torch.tanh}, rest(model.first(x - 1)).tanh()),
    ]:
        with sites.edited(model, edits):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_edits_nest():
    model, x = tiny.backbone("resnet"), tiny.images("resnet", 2)
    with torch.no_grad():
        with sites.edited(model, {"layer2.0": lambda z: z + 1}), sites.edited(model, {"layer3.0": lambda z: 2 * z}):
            nested = model(x)
        with sites.edited(model, {"layer2.0": lambda z: z + 1, "layer3.0": lambda z: 2 * z}):
            assert torch.equal(model(x), nested)


# ---------------------------------------------------------------------------------------------- replace


class Adapter(nn.Module):
    """A layer and, added to what it gives, a map of low rank of its input."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(layer.out_features, rank, generator=generator))

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z) + z @ self.down.T @ self.up.T


class Doubled(nn.Module):
    """A module whose result counts twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs) -> Tensor:
        return 2 * self.module(*args, **kwargs)


REPLACED = {
    "vit": ["blocks.1.attn.qkv", "blocks.1.norm1", "blocks.1", "blocks.2.attn", "blocks.1.mlp", "blocks"],
    "resnet": ["layer1.1.act1", "layer2.0.downsample", "layer1.1", "layer3"],
    "swin": ["layers.1.blocks.0.attn.qkv", "layers.0.blocks.1", "layers.0.blocks.1.attn", "layers.1.downsample"],
    "convnext": ["stages.1.blocks.1.conv_dw", "stages.1.blocks.0", "stages.1.blocks.1.mlp", "stages.2"],
    "mobilenetv2": ["blocks.3.1.bn3", "blocks.2.0"],
}


@torch.no_grad()
@pytest.mark.parametrize("family", REPLACED)
def test_a_module_replaced_by_itself_is_the_backbone_bit_for_bit(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 4)
    y, before = model(x), backbones.digest(model)
    for name in REPLACED[family]:
        module = model.get_submodule(name)
        for site in (":input", f"{name}:input"):
            prefix, suffix = sites.split(model, site, replace={name: module})
            crossing = prefix(x)
            kept = [z.clone() for z in crossing]
            assert torch.equal(suffix(*crossing), y), (name, site)
            assert all(map(torch.equal, crossing, kept)), f"{name}: the suffix wrote into its input"
            assert suffix.get_submodule(name) is module
        with sites.edited(model, {}, replace={name: module}):
            assert torch.equal(model(x), y), name
    assert backbones.digest(model) == before
    assert num_hooks(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", REPLACED)
def test_replacing_in_the_suffix_does_what_swapping_the_module_does(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 4)
    for name in REPLACED[family]:
        new = Doubled(model.get_submodule(name))
        by_hand = copy.deepcopy(model)
        by_hand.set_submodule(name, copy.deepcopy(new))
        prefix, suffix = sites.split(model, f"{name}:input", replace={name: new})
        assert torch.equal(suffix(*prefix(x)), by_hand(x)), name
        with sites.edited(model, {}, replace={name: new}):
            assert torch.equal(model(x), by_hand(x)), name
        assert not torch.equal(model(x), by_hand(x)), name


def test_an_adapter_sees_the_input_of_its_layer_and_is_trained_in_the_suffix():
    model, x = tiny.backbone("vit", torch.float64), tiny.images("vit", 3, dtype=torch.float64)
    adapter = Adapter(model.blocks[1].attn.qkv).double()
    by_hand = copy.deepcopy(model)
    by_hand.blocks[1].attn.qkv = copy.deepcopy(adapter)
    prefix, suffix = sites.split(model, "blocks.1:input", replace={"blocks.1.attn.qkv": adapter})
    assert torch.equal(suffix(*prefix(x)), by_hand(x))
    trainable = {name: parameter for name, parameter in suffix.named_parameters() if parameter.requires_grad}
    assert list(trainable) == ["blocks.1.attn.qkv.down", "blocks.1.attn.qkv.up"]
    gradients = torch.autograd.grad(suffix(*prefix(x)).square().sum(), list(trainable.values()))
    other = by_hand.blocks[1].attn.qkv
    expected = torch.autograd.grad(by_hand(x).square().sum(), [other.down, other.up])
    torch.testing.assert_close(gradients, expected)
    assert isinstance(model.blocks[1].attn.qkv, nn.Linear)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.1.attn.qkv", "blocks.1"])
def test_edits_at_a_replaced_module_act_before_and_after_the_new_one(name: str):
    model, x = tiny.backbone("vit"), tiny.images("vit", 3)
    new = Doubled(model.get_submodule(name))
    edits = {f"{name}:output": torch.tanh, f"{name}:input": lambda z: z + 1, "blocks.2.norm1": lambda z: 3 * z}

    class Around(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return new(z + 1).tanh()

    by_hand = copy.deepcopy(model)
    by_hand.set_submodule(name, Around())
    by_hand.blocks[2].norm1.register_forward_hook(lambda _, args, output: 3 * output)
    expected = by_hand(x)
    prefix, suffix = sites.split(model, "blocks.1:input", edits, replace={name: new})
    assert torch.equal(suffix(*prefix(x)), expected)
    with sites.edited(model, edits, replace={name: new}):
        assert torch.equal(model(x), expected)
    assert num_hooks(model) == num_hooks(new) == 0


@torch.no_grad()
def test_the_ends_of_a_replaced_stage_are_sites_under_all_their_names():
    """The canonical name of a stage's input is that of its first block's, which is not called any more."""
    model, x = tiny.backbone("resnet"), tiny.images("resnet", 3)
    replace = {"layer2": nn.Sequential(model.layer2, nn.Tanh())}
    by_hand = copy.deepcopy(model)
    by_hand.layer2 = copy.deepcopy(replace["layer2"])
    by_hand.layer2.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    edits = {"layer2.0:input": lambda z: z + 1}
    prefix, suffix = sites.split(model, "layer2.0:input", edits, replace=replace)
    assert torch.equal(suffix(*prefix(x)), by_hand(x))
    with sites.edited(model, edits, replace=replace):
        assert torch.equal(model(x), by_hand(x))


@torch.no_grad()
def test_blocks_may_change_places_but_an_edit_must_have_one():
    model, x = tiny.backbone("vit"), tiny.images("vit", 3)
    changed = {"blocks.1": model.blocks[2], "blocks.2": model.blocks[1]}
    twice = {"blocks.1": model.blocks[2]}
    for replace in (changed, twice):
        by_hand = copy.deepcopy(model)
        for name, module in replace.items():
            by_hand.set_submodule(name, copy.deepcopy(module))
        prefix, suffix = sites.split(model, "blocks.1:input", replace=replace)
        assert torch.equal(suffix(*prefix(x)), by_hand(x))
        with sites.edited(model, {}, replace=replace):
            assert torch.equal(model(x), by_hand(x))
    with (
        pytest.raises(ValueError, match=r"edit at 'blocks.1:output' would act in several places.*nn.Sequential"),
        sites.edited(model, {"blocks.1": torch.tanh}, replace=twice),
    ):
        raise AssertionError("never entered")
    assert num_hooks(model) == 0


@torch.no_grad()
def test_replaced_modules_are_restored_always_and_nest():
    model, x = tiny.backbone("vit"), tiny.images("vit", 2)
    modules, new = dict(model.named_modules()), Doubled(model.blocks[1])

    def scaled(factor: float) -> Tensor:
        with sites.edited(model, {"blocks.1": lambda z: factor * z}):
            return model(x)

    twofold, fourfold = scaled(2), scaled(4)
    with sites.edited(model, {}, replace={"blocks.1": new}):
        assert model.blocks[1] is new
        with sites.edited(model, {}, replace={"blocks.1": Doubled(new)}):
            assert torch.equal(model(x), fourfold)
        with sites.edited(model, {}, replace={"blocks.1": nn.Identity()}):  # the outer new module is not called
            assert not torch.equal(model(x), twofold)
        assert torch.equal(model(x), twofold)
    with pytest.raises(ZeroDivisionError), sites.edited(model, {}, replace={"blocks.1": new, "blocks.2": Fails()}):
        model(x)
    assert dict(model.named_modules()) == modules
    assert num_hooks(model) == num_hooks(new) == 0


class Fails(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z / (1 // 0)


def cut_at_the_last_block(model: nn.Module, replace: dict[str, nn.Module]) -> None:
    sites.split(model, "blocks.2:input", replace=replace)


def run_edited(model: nn.Module, replace: dict[str, nn.Module]) -> None:
    with sites.edited(model, {}, replace=replace):
        model(tiny.images("vit", 1))


@pytest.mark.parametrize("verb", [cut_at_the_last_block, run_edited])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.9"], r"no module 'blocks\.9'.*'blocks' has the children 0 to 2"),
        (["blocks.2:input"], r"cannot replace the site 'blocks\.2:input'; name the module, 'blocks\.2'"),
        ([""], "cannot replace '', the whole backbone; name a module inside it"),
        (
            ["blocks.2", "blocks.2.attn.qkv"],
            r"'blocks\.2\.attn\.qkv' inside 'blocks\.2', which is replaced too; build it",
        ),
        (
            ["blocks.2.attn.qkv", "blocks.2"],
            r"'blocks\.2\.attn\.qkv' inside 'blocks\.2', which is replaced too; build it",
        ),
    ],
)
def test_what_cannot_be_replaced_is_refused(verb: Callable, names: list[str], message: str):
    model = tiny.backbone("vit")
    with pytest.raises(ValueError, match=message):
        verb(model, dict.fromkeys(names, nn.Identity()))
    assert num_hooks(model) == 0


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(("name", "reason"), [("twice", "more than once|it 2 times"), ("never", "never calls it")])
def test_a_module_called_twice_or_never_cannot_be_replaced(name: str, reason: str, cut: bool):
    model, x, replace = Plain(), torch.zeros(2, 6), {name: nn.Linear(6, 6)}
    message = rf"cannot replace '{name}': the backbone .*({reason}); replace a module that it calls once"
    with ExitStack() as stack:
        if not cut:
            stack.enter_context(sites.edited(model, {}, replace=replace))
        with pytest.raises(ValueError, match=message):
            sites.split(model, "first:input", example=x, replace=replace) if cut else model(x)


def test_a_module_in_two_places_cannot_be_replaced():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(OrderedDict(one=layer, other=layer))
    with (
        pytest.raises(ValueError, match="has this module in 2 places; give each place a copy"),
        sites.edited(model, {}, replace={"one": nn.Tanh()}),
    ):
        raise AssertionError("never entered")


def test_a_replaced_module_lies_after_the_cut_and_no_site_inside_it():
    model, new = tiny.backbone("vit"), {"blocks.1": nn.Identity()}
    for site in ("blocks.2:input", "blocks.1:output", ":output"):
        with pytest.raises(ValueError, match=r"does not call 'blocks.1'.* after the cut.*cut at 'blocks.1:input'"):
            sites.split(model, site, replace=new)
    inside = r"site 'blocks.1.norm2:input' lies inside 'blocks.1', which is replaced.*choose 'blocks.1:input'"
    for arguments in [("blocks.1.norm2:input",), (":input", {"blocks.1.norm2:input": torch.tanh})]:
        with pytest.raises(ValueError, match=inside):
            sites.split(model, *arguments, replace=new)
    with (
        pytest.raises(ValueError, match=inside),
        sites.edited(model, {"blocks.1.norm2:input": torch.tanh}, replace=new),
    ):
        raise AssertionError("never entered")


def test_a_part_that_others_share_stays_with_them_when_its_owner_is_replaced():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 6)
            self.last.weight = self.first[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) * self.first[0].weight.mean()

    model, x, new = Tied(), torch.randn(2, 6), nn.Sequential(nn.Linear(6, 6))
    prefix, suffix = sites.split(model, ":input", example=x, replace={"first": new})
    assert list(dict(new.named_parameters())) == ["0.weight", "0.bias"]
    assert new in set(suffix.modules())
    with sites.edited(model, {}, replace={"first": new}):
        assert model.first is new  # which has the weight that the forward pass reads, too
    torch.testing.assert_close(suffix(*prefix(x)), model.last(new(x)) * model.last.weight.mean(), rtol=0, atol=0)


def test_a_module_that_never_sees_the_image_is_replaced_where_all_its_users_lie_after_the_cut():
    """So are the networks that make position biases from a table, as in Swin V2."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6))
            self.first, self.bias, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.bias(self.table))

    model, x, replace = Biased(), torch.randn(2, 6), {"bias": Adapter(nn.Linear(6, 6))}
    prefix, suffix = sites.split(model, "first:output", example=x, replace=replace)
    with sites.edited(model, {}, replace=replace):
        assert torch.equal(suffix(*prefix(x)), model(x))
    with pytest.raises(ValueError, match=r"does not call 'bias'.* after the cut at 'last:input'; cut before"):
        sites.split(model, "last:input", example=x, replace=replace)


def test_a_model_that_cannot_be_traced_holds_the_new_module_while_it_runs():
    model, x, new = Branching(), torch.randn(4, 6), Adapter(nn.Linear(6, 6))
    edits = {"last:input": torch.tanh}
    with pytest.warns(UserWarning, match="whole backbone runs at every step"):
        prefix, suffix = sites.split(model, "first", edits, replace={"last": new})
    with sites.edited(model, edits, replace={"last": new}):
        expected = model(x)
    assert torch.equal(suffix(*prefix(x)), expected)
    assert not torch.equal(model(x), expected)
    assert model.last is not new
    assert {"down", "up"} <= {name.rpartition(".")[2] for name, _ in suffix.named_parameters()}
    with pytest.raises(ValueError, match="no module 'lost'"), pytest.warns(UserWarning, match="cannot trace"):
        sites.split(model, "first", replace={"lost": new})


def test_what_only_a_whole_module_makes_untraceable_runs_whole():
    """A tuple from a block that is called as a whole cannot be looped over; the block's inside shows how long it is."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.part(x), x]

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return sum(z for z in self.pair(x))

    model, x = Loop(), torch.randn(2, 6)
    new = Pair()
    with pytest.warns(UserWarning, match=r"cannot trace Loop with 'pair' as a whole"):
        prefix, suffix = sites.split(model, ":input", replace={"pair": new})
    torch.testing.assert_close(suffix(*prefix(x)), new.part(x) + x)


# ---------------------------------------------------------------------------------------------- capture


def hooked(model: nn.Module, site: str, x: Tensor) -> Tensor:
    """What a plain hook sees, copied before anything else can write into it."""
    name, edge = site.rsplit(":", 1) if ":" in site else (site, "output")
    module, seen = model.get_submodule(name), []
    if edge == "input":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    else:
        handle = module.register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    model(x)
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_capture_gives_what_a_hook_sees(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 2)
    names = [*all_sites(model), *EXACT[family]]
    seen = sites.capture(model, names, x)
    assert list(seen) == names
    for site in names[::3]:
        assert torch.equal(seen[site], hooked(model, site, x)), site
    assert num_hooks(model) == 0


@torch.no_grad()
def test_capture_is_right_in_front_of_a_layer_that_works_in_place():
    model, x = Plain(), torch.randn(8, 6)
    seen = sites.capture(model, ["first", "act"], x)
    assert torch.equal(seen["first"], model.first(x))
    assert (seen["first"] < 0).any()
    assert torch.equal(seen["act"], model.first(x).relu())


def test_capture_says_that_a_module_is_never_called():
    with pytest.raises(ValueError, match="never calls the module of site 'never:input'"):
        sites.capture(Plain(), ["first", "never:input"], torch.zeros(2, 6))


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("family", "alias", "canonical"),
    [
        ("vit", "blocks.0", "blocks.1:input"),
        ("vit", "blocks.0:output", "blocks.1:input"),
        ("vit", "blocks.1:input", "blocks.1:input"),
        ("vit", "blocks.2", "blocks.2:output"),
        ("vit", "norm:input", "blocks.2:output"),
        ("vit", "blocks", "blocks.2:output"),
        ("vit", ":input", ":input"),
        ("vit", "patch_embed:input", ":input"),
        ("vit", "blocks.1.norm1:input", "blocks.1.norm1:input"),  # the skip leaves the block's input before
        ("swin", "layers.0", "layers.0.blocks.1:output"),  # the next stage merges patches first
        ("swin", "layers.1.downsample", "layers.1.blocks.0:input"),
        ("swin", "layers.0.blocks.0", "layers.0.blocks.1:input"),
        ("convnext", "stages.0.blocks.0", "stages.0.blocks.0:output"),
        ("convnext", "stages.3", "stages.3.blocks.0:output"),
        ("resnet", "layer1", "layer2.0:input"),
        ("resnet", "maxpool", "layer1.0:input"),
        ("resnet", "layer4", "layer4.0:output"),
        ("mobilenetv2", "blocks.0.0", "blocks.1.0:input"),
        ("mobilenetv2", "blocks.6", "blocks.6.0:output"),
    ],
)
def test_aliases_name_one_place(family: str, alias: str, canonical: str):
    model, x = tiny.backbone(family), tiny.images(family, 2)
    assert sites.resolve(model, alias) == canonical
    with torch.no_grad():
        seen = sites.capture(model, [alias, canonical], x)
    assert torch.equal(seen[alias], seen[canonical])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_listed_sites_are_canonical_and_in_order(family: str):
    model = tiny.backbone(family)
    for kind in ("block", "norm"):
        names, order = sites.list_sites(model, kind), []
        assert len(set(names)) == len(names)
        assert [sites.resolve(model, name) for name in names] == names
        with sites.edited(model, {name: partial(note, order, name) for name in names}):
            model(tiny.images(family, 1))
        assert order == names


def note(order: list[str], name: str, z: Tensor) -> Tensor:
    order.append(name)
    return z


def test_block_sites_are_the_boundaries_of_blocks():
    blocks = [":input", "blocks.0:input", "blocks.1:input", "blocks.2:input", "blocks.2:output"]
    assert sites.list_sites(tiny.backbone("vit")) == blocks
    both = sites.list_sites(tiny.backbone("vit"), "all")
    assert [name for name in both if name in blocks] == blocks
    assert [name for name in both if name not in blocks] == sites.list_sites(tiny.backbone("vit"), "norm")
    assert both[:4] == [":input", "blocks.0:input", "blocks.0.norm1:output", "blocks.0.norm2:output"]
    resnet = ["layer1.0:input", "layer1.1:input", "layer2.0:input", "layer3.0:input", "layer4.0:input"]
    assert sites.list_sites(tiny.backbone("resnet")) == [":input", *resnet, "layer4.0:output"]


def plain_layers() -> Iterator[nn.Module]:
    for index, width in enumerate((4, 8, 8)):
        yield from (nn.Conv2d((3, 4, 8)[index], width, 3, padding=1), nn.ReLU(inplace=True))
        if index != 1:
            yield nn.MaxPool2d(2)


NAMED_SERIES = {
    "regnet": (
        lambda: timm.models.RegNet(timm.models.regnet.RegNetCfg(depth=5, w0=8, wa=8.0, wm=1.8, group_size=8)),
        [*(f"{block}:input" for block in ("s1.b1", "s2.b1", "s3.b1", "s3.b2", "s4.b1")), "s4.b1:output"],
    ),
    "densenet": (
        lambda: timm.models.DenseNet(growth_rate=4, block_config=(2, 2, 1)),
        [*(f"features.denseblock{k}:input" for k in (1, 2, 3)), "features.denseblock3:output"],
    ),
    "plain": (
        lambda: nn.Sequential(OrderedDict(features=nn.Sequential(*plain_layers()), pool=nn.AdaptiveAvgPool2d(1))),
        [*(f"features.{k}:input" for k in (3, 5)), "features.7:output"],
    ),
}


@pytest.mark.parametrize("family", NAMED_SERIES)
def test_blocks_may_be_numbered_names_or_the_layers_of_a_plain_sequence(family: str):
    make, expected = NAMED_SERIES[family]
    model = make().eval()
    assert sites.list_sites(model) == [":input", *expected]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for site in expected:
            prefix, suffix = sites.split(model, site, example=x)
            torch.testing.assert_close(suffix(*prefix(x)), model(x), rtol=0, atol=0)
            assert sites.resolve(model, site) == site


def test_a_vgg_s_blocks_are_its_convolutions():
    with torch.device("meta"):
        model = timm.create_model("vgg11_bn", num_classes=0).eval()
    convolutions = [name for name, module in model.features.named_children() if isinstance(module, nn.Conv2d)]
    blocks = [f"features.{name}:input" for name in convolutions[1:]]  # the first one's input is the image
    assert len(blocks) == 7
    assert sites.list_sites(model) == [":input", *blocks, sites.resolve(model, "features:output")]


def test_a_backbone_is_traced_anew_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch):
    traced = []

    class Counting(tracing._Tracer):
        def trace(self, root, concrete_args=None):
            traced.append(root)
            return super().trace(root, concrete_args)

    monkeypatch.setattr(tracing, "_Tracer", Counting)
    with pytest.raises(ValueError, match="cannot trace Branching"):
        sites.channel_axis(branching := Branching(), "first", torch.zeros(1, 6))
    assert not sites.is_traceable(branching)
    assert len(traced) == 1  # what cannot be traced is tried once
    traced.clear()
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 6), nn.Dropout()))
    x = torch.randn(2, 6)
    sites.split(model, ":input", example=x)
    model[0][0].weight.data.mul_(2)
    assert sites.resolve(model, "1") == ":output"
    assert len(traced) == 1
    prefix, suffix = sites.split(model, "1:input", example=x)
    model.eval()
    torch.testing.assert_close(sites.split(model, "1:input", example=x)[1](*prefix(x)), model(x), rtol=0, atol=0)
    model[1][0] = nn.Linear(6, 6, bias=False)
    model.append(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    assert sites.resolve(model, "1") == "1.1:output"
    prefix, suffix = sites.split(model, "1:input", example=x)
    torch.testing.assert_close(suffix(*prefix(x)), model(x), rtol=0, atol=0)
    assert len(traced) == 3
    for replace in ({"0": nn.Tanh()}, {"0": nn.Identity()}, {"0.1": nn.Tanh()}):  # one trace with "0" as a whole
        sites.split(model, ":input", example=x, replace=replace)
    assert len(traced) == 4


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_kept_trace_does_not_keep_its_backbone(family: str):
    model = copy.deepcopy(tiny.backbone(family))
    halves = sites.split(model, sites.list_sites(model)[2])
    parameter, module = weakref.ref(next(model.parameters())), weakref.ref(model)
    del model, halves
    gc.collect()
    assert module() is None
    assert parameter() is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_norm_sites_are_the_outputs_of_every_affine_map(family: str):
    """At each of them, what is seen is gamma times a normalized input plus beta, before any activation."""
    model, x = tiny.backbone(family), tiny.images(family, 2)
    norms = [name for name, module in model.named_modules() if isinstance(module, sites.NORMS)]
    listed = sites.list_sites(model, "norm")
    assert len(listed) == len(norms)
    with torch.no_grad():
        for site in listed[::4]:
            name = site.removesuffix(":output").removesuffix(".drop:input")
            layer = model.get_submodule(name)
            given, seen = (sites.capture(model, [one], x)[one] for one in (f"{name}:input", site))
            torch.testing.assert_close(seen, affine(layer, given), rtol=1e-4, atol=1e-4)


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        gamma, beta, mean, variance = (
            value.view(-1, 1, 1) for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        )
        return gamma * (x - mean) / (variance + layer.eps).sqrt() + beta
    axis = 1 if isinstance(layer, timm.layers.LayerNorm2d) else -1
    z = x.movedim(axis, -1)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    return (layer.weight * z + layer.bias).movedim(-1, axis)


@pytest.mark.parametrize(
    "verb", [sites.resolve, sites.site_shape, sites.channel_axis, sites.split, sites.norms_between]
)
def test_an_unknown_site_suggests_the_nearest_names(verb: Callable):
    with pytest.raises(ValueError, match=r"no module 'block.1' in this VisionTransformer; did you mean 'blocks.1'"):
        verb(tiny.backbone("vit"), "block.1")


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.99", "no module 'blocks.99' in this VisionTransformer; 'blocks' has the children 0 to 2"),
        ("blocks.1.atn", "; did you mean 'blocks.1.attn'? 'blocks.1' has the children attn, norm1, ls1, drop_path1, "),
        (
            "blocks.1.atn.qkv:input",
            "no module 'blocks.1.atn.qkv' in this VisionTransformer; did you mean 'blocks.1.attn.q",
        ),
        ("blocks.1.norm3", "did you mean 'blocks.1.norm2' or 'blocks.1.norm1'? 'blocks.1' has"),
        ("blocks.1.norm1.weight", "; 'blocks.1.norm1' has no children"),
        ("attn.qkv", "did you mean 'blocks.2.attn.qkv' or 'blocks.1.attn.qkv' or"),
    ],
)
def test_an_unknown_site_names_the_children_there_are(site: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        sites.resolve(tiny.backbone("vit"), site)


def test_many_children_are_not_all_named():
    model = nn.ModuleDict({"part": nn.ModuleDict({f"{letter}_{letter}": nn.Linear(2, 2) for letter in "abcdefghijkl"})})
    with pytest.raises(ValueError, match=r"'part' has the children a_a, b_b, .*, j_j, \.\.\.$"):
        sites.resolve(model, "part.QQ")
    model = nn.ModuleDict({"part": nn.ModuleDict({name: nn.Linear(2, 2) for name in ("0", "1", "4", "5", "6", "z")})})
    with pytest.raises(ValueError, match=r"'part' has the children 0, 1, 4 to 6, z$"):
        sites.resolve(model, "part.QQ")


def test_the_second_name_of_a_module_points_to_its_first():
    layer = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="no module 'b' in this ModuleDict of its own: that is another name of 'a'"):
        sites.resolve(nn.ModuleDict({"a": layer, "b": layer}), "b")


def test_a_site_unlike_any_other_points_to_the_list():
    with pytest.raises(ValueError, match=r"no module 'QQQQ'.*its children are patch_embed, .*list_sites"):
        sites.resolve(tiny.backbone("vit"), "QQQQ")


def test_a_bad_edge_is_an_error():
    with pytest.raises(ValueError, match=r"ends in 'middle'; write 'module:input' or 'module:output'"):
        sites.resolve(tiny.backbone("vit"), "blocks.1:middle")


@pytest.mark.parametrize(
    ("site", "message"), [("twice", "calls 'twice' more than once"), ("never:input", "never calls 'never'")]
)
def test_a_module_called_twice_or_never_is_no_place_to_cut(site: str, message: str):
    with pytest.raises(ValueError, match=message):
        sites.split(Plain(), site, example=torch.zeros(2, 6))


def test_a_model_without_a_data_configuration_asks_for_an_example():
    with pytest.raises(ValueError, match="carries no timm data configuration; pass example"):
        sites.site_shape(Plain(), "first")
    assert sites.site_shape(Plain(), "first", torch.zeros(1, 6)) == (6,)


# ---------------------------------------------------------------------------------------------- shapes and axes


@pytest.mark.parametrize(
    ("family", "site", "shape", "axis"),
    [
        ("vit", ":input", (3, 32, 32), -3),
        ("vit", "blocks.1:input", (17, 32), -1),  # tokens
        ("vit", "blocks.1.norm1", (17, 32), -1),
        ("vit", "blocks.1.mlp.fc1", (17, 128), -1),
        ("vit", ":output", (32,), -1),
        ("deit", "blocks.1:input", (18, 32), -1),  # class and distillation tokens
        ("swin", "layers.0.blocks.1:input", (14, 14, 24), -1),  # NHWC
        ("swin", "layers.1.blocks.0.norm1", (7, 7, 48), -1),
        ("swin", ":input", (3, 56, 56), -3),
        ("convnext", "stages.0.blocks.0:input", (8, 8, 8), -3),  # NCHW
        ("convnext", "stages.1.blocks.1:input", (16, 4, 4), -3),
        ("convnext", "stages.1.blocks.0.norm", (4, 4, 16), -1),  # NHWC inside the block
        ("resnet", "layer2.0:input", (8, 8, 8), -3),
        ("resnet", "layer3.0.bn1", (24, 2, 2), -3),
        ("resnet", "layer4.0:output", (32, 1, 1), -3),
        ("resnet", ":input", (3, 32, 32), -3),
        ("mobilenetv2", "blocks.3.1:input", (32, 2, 2), -3),
        ("mobilenetv2", "blocks.1.0.bn1.drop:input", (48, 16, 16), -3),
    ],
)
def test_shape_and_channel_axis_of_a_site(family: str, site: str, shape: tuple[int, ...], axis: int):
    model = tiny.backbone(family)
    assert sites.site_shape(model, site) == shape
    assert sites.channel_axis(model, site) == axis
    with torch.no_grad():
        assert sites.capture(model, [site], tiny.images(family, 1))[site].shape[1:] == shape


@pytest.mark.parametrize(
    ("family", "site", "norms"),
    [
        ("vit", "blocks.1:input", ["blocks.1.norm1", "blocks.1.norm2"]),
        ("vit", ":input", []),
        ("vit", "blocks.2:output", ["norm"]),
        ("vit", "blocks.0", ["blocks.1.norm1", "blocks.1.norm2"]),  # an alias
        ("swin", ":input", ["patch_embed.norm"]),
        (
            "swin",
            "layers.0.blocks.1:input",
            ["layers.0.blocks.1.norm1", "layers.0.blocks.1.norm2", "layers.1.downsample.norm"],
        ),
        ("convnext", "stages.1.blocks.0:input", ["stages.1.blocks.0.norm"]),
        ("resnet", "layer1.1:input", ["layer1.1.bn1", "layer1.1.bn2"]),
        ("resnet", "layer4.0:output", []),
        ("mobilenetv2", "blocks.6.0:output", ["bn2"]),
    ],
)
def test_norms_between_lie_after_the_site_and_before_the_next(family: str, site: str, norms: list[str]):
    assert sites.norms_between(tiny.backbone(family), site) == norms


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_norm_lies_between_exactly_one_pair_of_block_sites(family: str):
    model = tiny.backbone(family)
    between = [name for site in sites.list_sites(model) for name in sites.norms_between(model, site)]
    norms = [name for name, module in model.named_modules() if isinstance(module, sites.NORMS)]
    assert sorted(between) == sorted(norms)


def test_norms_are_asked_for_at_block_sites_only():
    with pytest.raises(
        ValueError, match=r"'blocks.1.norm1:output' is not between blocks; those sites are :input, blocks.0"
    ):
        sites.norms_between(tiny.backbone("vit"), "blocks.1.norm1")


def test_asking_for_a_shape_leaves_a_backbone_in_training_as_it_was():
    model = copy.deepcopy(tiny.backbone("resnet")).train()
    before = copy.deepcopy(model.state_dict())
    assert sites.site_shape(model, "layer2.0:input") == (8, 8, 8)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class SelfAttention(nn.Module):
    """Attention as torch has it, which is given its input three times, once by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, value=x, need_weights=False)[0].mean(1)


@torch.no_grad()
def test_the_input_of_self_attention_is_query_key_and_value_at_once():
    model, x = SelfAttention().eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = model(x + delta)
    with sites.edited(model, {"attention:input": lambda z: z + delta}):
        torch.testing.assert_close(model(x), expected)
    prefix, suffix = sites.split(model, "attention:input", {"attention:input": lambda z: z + delta}, x)
    assert torch.equal(suffix(*prefix(x)), expected)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vgg11"])
def test_the_classifier_after_pooling_does_not_decide_where_channels_lie(name):
    model = timm.create_model(name, num_classes=7).eval()
    site = {"resnet18": "layer4.1:output", "efficientnet_b0": "bn2:output", "vgg11": "features:output"}[name]
    assert sites.channel_axis(model, site, torch.zeros(1, 3, 64, 64)) == -3


# ---------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_description_says_what_the_verbs_for_one_site_say(family: str):
    model = tiny.backbone(family)
    for kind in ("block", "norm", "all"):
        described = sites.describe(model, kind)
        assert [site.name for site in described] == sites.list_sites(model, kind)
        for site in described[::3]:
            assert site.shape == sites.site_shape(model, site.name)
            assert site.channel_axis == sites.channel_axis(model, site.name)
            assert sites.site(model, site.name) == site
    depths = [site.depth for site in sites.describe(model)]
    assert depths == [rank / (len(depths) - 1) for rank in range(len(depths))]
    everywhere = [site.depth for site in sites.describe(model, "all")]
    assert everywhere == sorted(everywhere)


@pytest.mark.parametrize("name", ["vit_micro", "resnet_micro"])
def test_depth_is_the_rank_among_block_sites_with_norms_between_by_rank(name: str):
    model = backbones.create(name)
    described = sites.describe(model, "all", torch.zeros(1, 3, 64, 64))
    blocks, places = sites.list_sites(model), sites.list_sites(model, "all")
    bounds = [index for index, place in enumerate(places) if place in blocks]
    for site in described:
        position = np.interp(places.index(site.name), bounds, range(len(bounds)))
        assert site.depth == pytest.approx(float(position) / (len(blocks) - 1), abs=1e-12)


def test_any_site_can_be_described_under_any_name():
    model = tiny.backbone("vit")
    assert sites.site(model, "blocks.0") == sites.Site("blocks.1:input", (17, 32), -1, 0.5)
    norms = [sites.site(model, f"blocks.1.norm{k}").depth for k in (1, 2)]
    assert norms == pytest.approx([0.5 + 1 / 12, 0.5 + 1 / 6])
    assert sites.site(model, "blocks.1.attn.qkv") == sites.Site("blocks.1.attn.qkv:output", (17, 96), -1, 0.625)
    assert sites.site(model, ":output").depth == 1
    with pytest.raises(ValueError, match=r"no module 'blocks\.9'"):
        sites.site(model, "blocks.9")


def test_descriptions_take_one_trace_and_one_pass_until_the_backbone_changes(monkeypatch: pytest.MonkeyPatch):
    model = copy.deepcopy(tiny.backbone("resnet"))
    counts = {"traces": 0, "passes": 0}

    class Counting(tracing._Tracer):
        def trace(self, root, concrete_args=None):
            counts["traces"] += 1
            return super().trace(root, concrete_args)

    def counted(x: Tensor) -> Tensor:
        counts["passes"] += not isinstance(x, torch.fx.Proxy)
        return forward(x)

    forward = model.forward
    model.forward = counted
    monkeypatch.setattr(tracing, "_Tracer", Counting)
    described = sites.describe(model)
    sites.describe(model, "all"), sites.site(model, described[1].name), sites.tree(model, "norm")
    assert counts == {"traces": 1, "passes": 1}
    assert sites.describe(model, example=torch.zeros(2, 3, 64, 64))[1].shape == (64, 16, 16)
    assert counts == {"traces": 1, "passes": 2}
    model.layer4 = nn.Sequential(*model.layer4, copy.deepcopy(model.layer4[-1]))
    model.layer4[1].conv1 = nn.Conv2d(32, 32, 3, 1, 1, bias=False)
    model.layer4[1].downsample = None
    assert len(sites.describe(model)) == len(described) + 1
    assert counts == {"traces": 2, "passes": 3}


def test_a_description_leaves_a_backbone_in_training_as_it_was():
    model = copy.deepcopy(tiny.backbone("resnet")).train()
    before = copy.deepcopy(model.state_dict())
    sites.describe(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Recurring(nn.Module):
    """Blocks that torch.fx cannot trace: one is called first though it is the second, one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(3)))
        self.blocks = nn.ModuleList(Doubled(block) for block in self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        z = self.blocks[0](self.blocks[1](x))
        return self.blocks[2](self.blocks[2](z)) if z.sum() > -1e9 else z


def test_what_cannot_be_traced_is_described_without_channel_axes():
    model, x = Recurring(), torch.zeros(1, 4, 6)
    described = sites.describe(model, example=x)
    names = [":input", "blocks.1:input", "blocks.0:input"]
    assert described == [sites.Site(name, (4, 6), None, rank / 2) for rank, name in enumerate(names)]
    norms = sites.describe(model, "norm", x)
    assert [site.name for site in norms] == ["blocks.1.module.0:output", "blocks.0.module.0:output"]
    assert [site.depth for site in norms] == [0.75, 1]
    assert len(sites.describe(model, "all", x)) == 5
    assert sites.site(model, "blocks.1.module.1", x) == sites.Site("blocks.1.module.1:output", (4, 6), None, 0.875)
    with pytest.raises(ValueError, match="calls this module more than once"):
        sites.site(model, "blocks.2", x)


def test_a_channel_axis_that_cannot_be_told_is_none():
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.ReLU()))
    assert [site.channel_axis for site in sites.describe(model, example=torch.zeros(1, 2, 3))] == [None, None]


def test_a_tree_is_a_table_of_sites_that_stand_under_their_blocks():
    tree = sites.tree(tiny.backbone("vit"), "all")
    assert list(tree) == tree.sites == sites.describe(tiny.backbone("vit"), "all")
    assert len(tree) == 12
    assert repr(tree) == str(tree)
    assert str(tree).splitlines()[:6] == [
        "VisionTransformer: 12 block and norm sites",
        "site                     shape        channel axis  depth",
        ":input                   3 × 32 × 32            -3   0.00",
        "blocks.0:input           17 × 32                -1   0.25",
        "  blocks.0.norm1:output  17 × 32                -1   0.33",
        "  blocks.0.norm2:output  17 × 32                -1   0.42",
    ]
    assert str(tree).splitlines()[-1] == "norm:output              17 × 32                -1   1.00"
    flat = str(sites.tree(tiny.backbone("resnet"))).splitlines()
    assert flat[0] == "ResNet: 7 block sites"
    assert len({len(line) for line in flat[1:]}) == 1
    assert not any(line.startswith(" ") for line in flat)
    unknown = sites.tree(Branching(), example=torch.zeros(1, 6))
    assert "unknown" in str(unknown)
