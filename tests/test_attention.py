"""Claims about attention distance and entropy: closed forms, slow loops over the models' own maps, what is refused."""

import math
from contextlib import contextmanager
from functools import partial

import pandas as pd
import pytest
import timm
import tiny
import torch
from torch import nn
from torch.nn import functional

from apthory.metrics import attention
from apthory.metrics.attention import attention_entropy, attention_profile, mean_attention_distance

COLUMNS = ["distance_patches", "distance_pixels", "entropy"]


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------- models of known attention


class Attend(nn.Module):
    """Attention whose logits are given; queries and keys are zero."""

    def __init__(self, logits, call):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.logits, self.call = logits, call

    def forward(self, z):
        num_heads, num_tokens = self.logits.shape[:2]
        return self.call(z.new_zeros(len(z), num_heads, num_tokens, 2), self.logits)


def fused(q, logits):
    return functional.scaled_dot_product_attention(q, q, q, attn_mask=logits.to(q.dtype))


def written_out(q, logits):
    return (q @ q.mT + logits).softmax(-1) @ q


class Toy(nn.Module):
    """Patches of 8 pixels after some tokens without a place, through one layer of given logits [head, token, token]."""

    def __init__(self, logits, call=fused, num_prefix=0):
        super().__init__()
        self.attn, self.num_prefix = Attend(logits, call), num_prefix

    def forward(self, x):
        z = functional.avg_pool2d(x, 8).flatten(2).mT
        return self.attn(functional.pad(z, (0, 0, self.num_prefix, 0)))


def toy(*arguments, **options):
    return Toy(*arguments, **options).eval()


def pairs(height, width):
    """Distances of all pairs of places on a grid, row by row."""
    places = [(row, column) for row in range(height) for column in range(width)]
    return torch.tensor([[math.dist(a, b) for b in places] for a in places], dtype=torch.float64)


def only(table):
    assert len(table) == 1
    return table.iloc[0][COLUMNS].tolist()


@pytest.mark.parametrize("call", [fused, written_out])
def test_uniform_attention_is_as_far_as_two_places_are_in_the_mean(call):
    row = only(attention_profile(toy(torch.zeros(1, 5, 5), call), torch.zeros(3, 3, 8, 40)))
    assert row == pytest.approx([(5**2 - 1) / (3 * 5), 8 * 1.6, math.log(5)], rel=1e-6)
    row = only(attention_profile(toy(torch.zeros(1, 15, 15), call), torch.zeros(3, 3, 24, 40)))
    assert row == pytest.approx([float(pairs(3, 5).mean()), 8 * float(pairs(3, 5).mean()), math.log(15)], rel=1e-6)


@pytest.mark.parametrize("call", [fused, written_out])
def test_diagonal_attention_goes_nowhere_and_banded_attention_as_far_as_its_neighbours(call):
    distances = pairs(2, 5)  # a token is attended to if it is next to the query, or the query itself
    logits = torch.stack([torch.where(distances <= width, 0, -torch.inf) for width in (0, 1)])
    table = attention_profile(toy(logits, call), torch.zeros(2, 3, 16, 40))
    assert table.iloc[0][COLUMNS].tolist() == [0, 0, 0]
    num = (distances <= 1).sum(1).double()  # 3 at the four corners, 4 at the six others
    expected = [float((1 - 1 / num).mean()), 8 * float((1 - 1 / num).mean()), float(num.log().mean())]
    assert table.iloc[1][COLUMNS].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_prefix", [1, 3])
@pytest.mark.parametrize("call", [fused, written_out])
def test_a_token_without_a_place_is_renormalized_away_or_counts_as_no_distance(call, num_prefix):
    num = 4 + num_prefix
    logits = torch.zeros(1, num, num)
    logits[:, :, :num_prefix] = math.log(2)  # twice the weight of a patch
    logits[:, :num_prefix] = 7 * rand(num_prefix, num, dtype=torch.float32)  # as queries they do not count
    distance = (4**2 - 1) / (3 * 4)
    model, images = toy(logits, call, num_prefix), torch.zeros(2, 3, 8, 32)
    row = only(attention_profile(model, images, num_prefix_tokens=num_prefix))
    assert row == pytest.approx([distance, 8 * distance, math.log(4)], rel=1e-6)
    total = 4 + 2 * num_prefix
    entropy = math.log(total) - 2 * num_prefix / total * math.log(2)
    row = only(attention_profile(model, images, class_token="drop", num_prefix_tokens=num_prefix))
    assert row == pytest.approx([distance * 4 / total, 8 * distance * 4 / total, entropy], rel=1e-6)


def test_masks_causality_scale_and_shared_keys_are_those_of_the_call():
    q, k = rand(2, 4, 6, 3), rand(2, 2, 6, 3, seed=1)
    mask = (rand(6, 6, seed=2) > 0) | torch.eye(6, dtype=torch.bool)
    each = k.repeat_interleave(2, 1)
    cases = [
        ({"attn_mask": mask}, each, 3**-0.5, mask),
        ({"is_causal": True, "scale": 0.4}, each, 0.4, torch.ones(6, 6).tril().bool()),
        ({"enable_gqa": True}, k, 3**-0.5, torch.ones(6, 6).bool()),
    ]
    for options, key, scale, seen in cases:

        def call(z, _, key=key, options=options):
            return functional.scaled_dot_product_attention(q, key, key, **options)

        table = attention_profile(toy(torch.zeros(4, 6, 6), call).double(), torch.zeros(2, 3, 16, 24).double())
        weights = (scale * q @ each.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        expected = slow_means([weights], pairs(2, 3))
        torch.testing.assert_close(torch.tensor(table[["distance_patches", "entropy"]].to_numpy()), expected)


# ----------------------------------------------------------------------------------- real models, slow loops


def slow_means(maps, distances, num_prefix=0, class_token="renormalize"):
    """Distance and entropy by head, one image, head, query and key at a time."""
    sums = [[0.0, 0.0] for _ in range(maps[0].shape[1])]
    num = 0
    for weights in (image for batch in maps for image in batch.tolist()):
        num += 1
        for head, rows in enumerate(weights):
            for i, row in enumerate(rows[num_prefix:]):
                keep = row if class_token == "drop" else row[num_prefix:]
                total = math.fsum(keep)
                for j, weight in enumerate(keep):
                    place = j - (num_prefix if class_token == "drop" else 0)
                    share = weight / total / (len(rows) - num_prefix)
                    sums[head][0] += share * float(distances[i][place]) if place >= 0 else 0.0
                    sums[head][1] -= share * math.log(weight / total) if weight else 0.0
    return torch.tensor(sums, dtype=torch.float64) / num


@contextmanager
def written_out_maps(model):
    """The maps that timm's layers hand to their dropout when they write attention out, by layer."""
    seen, handles, flags = {}, [], {}
    for name, module in model.named_modules():
        if hasattr(module, "attn_drop"):
            seen[name] = []
            keep = partial(lambda maps, _, args, out: maps.append(args[0].detach().clone()), seen[name])
            handles.append(module.attn_drop.register_forward_hook(keep))
        if hasattr(module, "fused_attn"):
            flags[module], module.fused_attn = module.fused_attn, False
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.fused_attn = flag


@contextmanager
def fused_attention(model, is_on):
    flags = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    for module in flags:
        module.fused_attn = is_on
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.fused_attn = flag


def eva():
    """Rotated queries and keys, and a class token that is not rotated."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
        return timm.models.Eva(**shape, use_rot_pos_emb=True, qkv_fused=False).eval().double()


@pytest.mark.parametrize("class_token", ["renormalize", "drop"])
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize(("family", "num_prefix"), [("vit", 1), ("deit", 2), ("eva", 1)])
def test_profiles_of_vision_transformers_are_those_of_loops_over_their_maps(family, num_prefix, is_fused, class_token):
    model = eva() if family == "eva" else tiny.backbone(family, torch.float64)
    images = rand(2, 3, 32, 32)
    with written_out_maps(model) as maps:
        output = model(images)
    with fused_attention(model, is_fused):
        table = attention_profile(model, images, class_token=class_token, batch_size=1)
        torch.testing.assert_close(model(images), output)
    assert list(table["layer"].unique()) == list(maps)
    for layer, rows in table.groupby("layer", sort=False):
        assert rows["head"].tolist() == list(range(len(rows)))
        expected = slow_means(maps[layer], pairs(4, 4), num_prefix, class_token)
        torch.testing.assert_close(torch.tensor(rows[["distance_patches", "entropy"]].to_numpy()), expected)
        assert rows["distance_pixels"].tolist() == pytest.approx((8 * rows["distance_patches"]).tolist(), rel=1e-12)


@pytest.mark.parametrize("is_fused", [True, False])
def test_windows_are_as_far_as_their_tokens_are_in_the_image_and_masked_pairs_weigh_nothing(is_fused):
    model, images = tiny.backbone("swin", torch.float64), tiny.images("swin", 1, dtype=torch.float64)
    with written_out_maps(model) as maps:
        model(images)
    with fused_attention(model, is_fused):
        table = attention_profile(model, images).set_index("layer")
    blocks = {f"{name}.attn": module for name, module in model.named_modules() if hasattr(module, "shift_size")}
    assert sum(any(block.shift_size) for block in blocks.values()) == 1
    for layer, block in blocks.items():
        height, width = block.input_resolution
        stride = 56 // height
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([rows, columns], -1).roll([-shift for shift in block.shift_size], (0, 1))[None]
        windows = timm.models.swin_transformer.window_partition(places, block.window_size).flatten(1, 2).double()
        (weights,) = maps[layer]
        if any(block.shift_size):
            masked = block.attn_mask[:, None] != 0
            assert masked.any()
            assert float(weights[masked.expand_as(weights)].max()) < 1e-40
        sums = torch.zeros(weights.shape[1], 2, dtype=torch.float64)
        for window, maps_of_window in zip(windows, weights, strict=True):
            in_the_image = [[math.dist(a, b) for b in window.tolist()] for a in window.tolist()]
            sums += slow_means([maps_of_window[None]], in_the_image) / len(windows)
        torch.testing.assert_close(torch.tensor(table.loc[layer, ["distance_patches", "entropy"]].to_numpy()), sums)
        assert table.loc[layer, "distance_pixels"].tolist() == pytest.approx((stride * sums[:, 0]).tolist(), rel=1e-9)


def test_windows_of_another_make_are_read_as_well_and_shifted_ones_region_by_region():
    from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer

    model = SwinTransformer([4, 4], 24, depths=[2], num_heads=[2], window_size=[7, 7], num_classes=1)
    for module in model.modules():
        if isinstance(module, ShiftedWindowAttention):  # uniform, but for the mask
            module.qkv.weight.data.zero_()
            module.qkv.bias.data.zero_()
            module.relative_position_bias_table.data.zero_()
    table = attention_profile(model.eval(), torch.zeros(1, 3, 56, 56)).groupby("layer", sort=False)[COLUMNS].mean()
    uniform = float(pairs(7, 7).mean())
    assert table.iloc[0].tolist() == pytest.approx([uniform, 4 * uniform, math.log(49)], rel=1e-5)
    # A shift by 3 of 14 rows and columns cuts the last windows into 4 and 3.
    regions = [(height, width) for height in (7, 4, 3) for width in (7, 4, 3)]
    share = {region: math.prod(region) / 14**2 for region in regions}
    distance = sum(share[region] * float(pairs(*region).mean()) for region in regions)
    entropy = sum(share[region] * math.log(math.prod(region)) for region in regions)
    assert table.iloc[1].tolist() == pytest.approx([distance, 4 * distance, entropy], rel=1e-5)


@pytest.mark.parametrize("is_map", [True, False])
def test_a_window_as_large_as_the_map_is_the_map(is_map):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attend(torch.zeros(1, 6, 6), fused)
            self.attn.window_size = (2, 3)

        def forward(self, z):
            return self.attn(z.flatten(1, -2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            z = functional.avg_pool2d(x, 8).movedim(1, -1)
            return self.block(z if is_map else z.flatten(1, 2))

    row = only(attention_profile(Model().eval(), torch.zeros(2, 3, 16, 24)))
    distance = float(pairs(2, 3).mean())
    assert row == pytest.approx([distance, 8 * distance, math.log(6)], rel=1e-6)


@pytest.mark.parametrize("class_token", ["renormalize", "drop"])
def test_profiles_of_open_clip_are_those_of_loops_over_its_maps(class_token):
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed (extra open-clip)")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformer.VisionTransformer(32, 8, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=16)
    model = model.eval().double()
    for block in model.transformer.resblocks:  # they begin at zero
        block.attn.in_proj_bias.data = rand(96, seed=3)
        block.attn.in_proj_weight.data *= 3
    images, maps = rand(2, 3, 32, 32), {}

    def keep(name, module, args, output):
        maps[name] = [functional_maps(module, args[0]).detach()]

    handles = [
        module.register_forward_hook(partial(keep, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    output = model(images)
    for handle in handles:
        handle.remove()
    table = attention_profile(model, images, class_token=class_token)
    torch.testing.assert_close(model(images), output)
    assert list(table["layer"].unique()) == list(maps)
    for layer, rows in table.groupby("layer", sort=False):
        expected = slow_means(maps[layer], pairs(4, 4), 1, class_token)
        torch.testing.assert_close(torch.tensor(rows[["distance_patches", "entropy"]].to_numpy()), expected)


def functional_maps(module, z):
    """Attention maps of nn.MultiheadAttention, as it gives them itself."""
    return nn.MultiheadAttention.forward(module, z, z, z, need_weights=True, average_attn_weights=False)[1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_multi_head_attention_hide_what_they_hide_there(dtype, batch_first):
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    hidden = torch.ones(4, 4).triu(1).bool()
    mask = hidden if dtype == torch.bool else torch.zeros(4, 4, dtype=dtype).masked_fill(hidden, -torch.inf)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            z = functional.avg_pool2d(x, 8).flatten(1).unflatten(1, (4, 8))
            z = z if batch_first else z.mT.permute(2, 0, 1)
            return self.layer(z, z, z, need_weights=False, attn_mask=mask)[0]

    images = rand(3, 8, 8, 32)
    z = functional.avg_pool2d(images, 8).flatten(1).unflatten(1, (4, 8))
    z = z if batch_first else z.mT.permute(2, 0, 1)
    _, weights = layer(z, z, z, average_attn_weights=False, attn_mask=mask)
    table = attention_profile(Masked().eval(), images)
    expected = slow_means([weights.detach()], pairs(1, 4))
    torch.testing.assert_close(torch.tensor(table[["distance_patches", "entropy"]].to_numpy()), expected)


def test_pooling_and_attention_over_channels_are_left_out():
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    pooled = timm.models.VisionTransformer(**shape, class_token=False, global_pool="map").eval()
    assert pooled.attn_pool is not None
    assert set(attention_profile(pooled, torch.zeros(1, 3, 32, 32))["layer"]) == {"blocks.0.attn", "blocks.1.attn"}

    def over_channels(q, _):
        return (q.mT @ q).softmax(-1)

    with pytest.raises(ValueError, match="computes no self-attention over tokens"):
        attention_profile(toy(torch.zeros(1, 9, 9), over_channels), torch.zeros(1, 3, 24, 24))


# ----------------------------------------------------------------------------------- digits, parts, hooks


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_float32_is_as_good_as_float64(family, is_fused):
    tables = []
    for dtype in (torch.float32, torch.float64):
        model = tiny.backbone(family, dtype)
        with fused_attention(model, is_fused):
            tables.append(attention_profile(model, tiny.images(family, 3, dtype=torch.float64).to(dtype)))
    difference = (tables[0][COLUMNS] - tables[1][COLUMNS]).abs() / (1 + tables[1][COLUMNS].abs())
    assert difference.to_numpy().max() <= 1e-5


def test_entropy_keeps_its_digits_where_attention_is_sharp():
    logits = 60 * rand(1, 16, 16)
    weights = logits.softmax(-1)
    entropy = only(attention_profile(toy(logits.float()), torch.zeros(1, 3, 32, 32)))[2]
    assert entropy == pytest.approx(float(torch.special.entr(weights).sum(-1).mean()), abs=1e-6)


def test_parts_batches_and_order_change_nothing(monkeypatch):
    model, images = tiny.backbone("vit"), tiny.images("vit", 7)
    whole = attention_profile(model, images)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(7)), 3)
    for given in (images.flip(0), loader):
        pd.testing.assert_frame_equal(attention_profile(model, given), whole, rtol=1e-5)
    monkeypatch.setitem(attention._ENTRIES, "cpu", 1)  # one image after the other
    pd.testing.assert_frame_equal(attention_profile(model, images), whole, rtol=1e-5)


def test_nothing_of_the_model_is_changed_even_if_it_fails():
    model, images = tiny.backbone("vit"), tiny.images("vit", 2)
    flags = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    attention_profile(model, images)
    with pytest.raises(AssertionError):
        attention_profile(model, images[..., :24])  # timm wants its own size
    assert flags == [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_maps_at_hand_give_what_the_profile_gives():
    model, images = tiny.backbone("vit", torch.float64), tiny.images("vit", 2, dtype=torch.float64)
    with written_out_maps(model) as maps:
        model(images)
    for class_token in ("renormalize", "drop"):
        table = attention_profile(model, images, class_token=class_token).set_index("layer")
        for layer, (weights,) in maps.items():
            kind = {"class_token": class_token, "token_size": (8.0, 8.0)}
            distance = mean_attention_distance(weights, (4, 4), 1, **kind).mean(0)
            entropy = attention_entropy(weights, 1, class_token=class_token).mean(0)
            expected = torch.tensor(table.loc[layer, ["distance_pixels", "entropy"]].to_numpy())
            torch.testing.assert_close(torch.stack([distance, entropy], 1), expected)
    with pytest.raises(ValueError, match="maps of 17 tokens are not 0 tokens without a place and a grid of 4 x 4"):
        mean_attention_distance(weights, (4, 4))


def test_tokens_need_not_be_square():
    weights = torch.eye(6).roll(1, 1).double()[None]  # every token to the next one
    distance = mean_attention_distance(weights, (2, 3), token_size=(4.0, 2.0))
    assert float(distance) == pytest.approx((2 + 2 + math.hypot(4, 4) + 2 + 2 + math.hypot(4, 4)) / 6)


# ----------------------------------------------------------------------------------- bad input


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="ResNet computes no self-attention over tokens"):
        attention_profile(tiny.backbone("resnet"), tiny.images("resnet", 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_named(bad):
    model, images = tiny.backbone("vit"), tiny.images("vit", 2)
    images[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"the attention of 'blocks.0.attn' is not finite"):
        attention_profile(model, images)


def test_tokens_that_are_no_grid_are_refused_until_it_is_said_how_many_have_no_place():
    model, images = toy(torch.zeros(1, 7, 7), num_prefix=3), torch.zeros(1, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"'attn' has 7 tokens: with 0 or 1 before them, no grid over images of 16 x 16"
    ):
        attention_profile(model, images)
    assert len(attention_profile(model, images, num_prefix_tokens=3)) == 1
    with pytest.raises(ValueError, match="with 2 before them"):
        attention_profile(model, images, num_prefix_tokens=2)


def test_windows_that_are_padded_or_unknown_are_refused():
    shape = {"img_size": 40, "embed_dim": 24, "depths": (2,), "num_heads": (2,), "num_classes": 0}
    swin = timm.models.SwinTransformer(**shape).eval()
    with pytest.raises(ValueError, match=r"windows of 'layers.0.blocks.0.attn' do not tile .* \(1, 10, 10, 24\)"):
        attention_profile(swin, torch.zeros(1, 3, 40, 40))

    def parts(q, logits):
        return fused(q.repeat(2, 1, 1, 1), logits)

    def without_heads(q, logits):
        return fused(q[:, 0], logits[0])

    with pytest.raises(ValueError, match="'attn' attends within parts of the image"):
        attention_profile(toy(torch.zeros(1, 4, 4), parts), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"'attn' calls attention with queries of shape \(1, 4, 2\)"):
        attention_profile(toy(torch.zeros(1, 4, 4), without_heads), torch.zeros(1, 3, 16, 16))


def test_other_calls_that_make_no_sense_are_refused():
    model, images = tiny.backbone("vit"), tiny.images("vit", 2)
    with pytest.raises(ValueError, match="there are no images"):
        attention_profile(model, images[:0])
    with pytest.raises(ValueError, match=r"training mode.*call backbone.eval\(\)"):
        attention_profile(Toy(torch.zeros(1, 4, 4)), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="class_token is 'keep'; there are 'renormalize' and 'drop'"):
        attention._check("keep")


@pytest.mark.parametrize("mean", [
    partial(mean_attention_distance, grid=(2, 2), num_prefix_tokens=1),
    partial(attention_entropy, num_prefix_tokens=1),
])  # fmt: skip
def test_maps_at_hand_that_have_no_mean_are_refused(mean):
    weights = rand(1, 2, 5, 5).softmax(-1)
    for row in (torch.full((5,), math.nan), torch.eye(5)[0]):  # all on the class token
        bad = weights.clone()
        bad[0, 1, 3] = row
        with pytest.raises(ValueError, match="NaN or infinite values, or a row without weight"):
            mean(bad)
        assert mean(bad[:, :1]).isfinite().all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_digits():
    model, images = tiny.backbone("vit", torch.float64), tiny.images("vit", 3, dtype=torch.float64)
    twin = attention_profile(model, images)
    single = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0
    ).eval()
    single.load_state_dict(model.state_dict())
    table = attention_profile(single.cuda(), images.float())
    assert (table[COLUMNS] - twin[COLUMNS]).abs().to_numpy().max() < 1e-4
