"""What the metrics cost: CKA beside torch-cka, and attention distance beside a forward pass and the usual loops."""

import contextlib
import copy
import io
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apthory import backbones, costs, sites
from apthory._tools.extras import from_extra
from apthory.lab import records
from apthory.metrics import attention, similarity

PEER = "torch-cka"


@records.versioned(1, name="apthory.metric_bench.race")
def race_metrics(
    backbone: Mapping[str, Any], num_images: int, batch_size: int, num_repeats: int = 3, num_maps: int = 3
) -> dict[str, Any]:
    """Time CKA of all pairs of blocks, and attention profiles, side by side on the same random images.

    - CKA *end to end* runs the network and compares the outputs of all blocks with each other: torch-cka as its manual
      has it, with weights as timm hands them out (it records gradients, and runs the network twice), and
      `similarity.layer_similarity`. What is *beyond a forward pass* is found by subtraction. The *CKA part* is the same
      comparison on a network that hands out stored features at no cost, where L^2 + L Gram matrices stand against L.
    - The largest errors of both against float64, on these features as they are and with a mean of ten times their
      spread added; None if there is no number.
    - `attention.attention_profile` beside a plain forward pass, with fused attention and with attention written out.
    - The *distance part* starts from attention maps: `attention.mean_attention_distance` for a layer and batch, beside
      the loop of published code that fills the matrix of distances pair by pair for every image and layer, and beside
      the same loop without NumPy.

    Args:
        backbone: Arguments of `backbones.load` for a ViT; weights do not matter, ``pretrained=False`` will do.
        num_images: Images in all, a multiple of ``batch_size``.
        batch_size: Images in a batch.
        num_repeats: Timed calls of each piece of work.
        num_maps: Maps (of all heads, for one image and layer) on which the loops are timed.

    Returns:
        Seconds by piece of work, one entry a repeat, taken in turns; errors; the number of layers; the device.
    """
    if num_images % batch_size:
        raise ValueError(f"{num_images} images make no whole batches of {batch_size}")
    model = backbones.load(**backbone)
    device, side = next(model.parameters()).device, backbones.input_size(model)
    images = torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    blocks = [site.removesuffix(":input") for site in sites.list_sites(model)[1:-1]]
    with torch.no_grad():
        batches = [list(sites.capture(model, blocks, x).values()) for x in images.split(batch_size)]
    errors = {f"{kind}, {tool}": value for kind, tool, value in _errors(batches)}
    seconds = _cka_seconds(model, blocks, images, batches, num_repeats)
    del batches
    for kind, is_fused in (("fused", True), ("written out", False)):
        twin = _with_attention(model, is_fused)
        works = {
            f"forward, {kind}": partial(_forward, twin, images, batch_size),
            f"profile, {kind}": partial(attention.attention_profile, twin, images, batch_size=batch_size),
        }
        seconds |= costs.interleaved_seconds(works, num_repeats, device)
    table = attention.attention_profile(model, images[:1])
    num_heads, grid = int(table["head"].max()) + 1, _grid(model)
    maps = torch.randn(batch_size, num_heads, *[math.prod(grid) + 1] * 2, device=device).softmax(-1)
    ours = partial(attention.mean_attention_distance, maps, grid, 1, class_token="drop")
    norms: dict[str, Callable[[list[int]], Any]] = {
        "loop": np.linalg.norm,
        "loop without NumPy": lambda step: math.hypot(*step),
    }
    loops = {
        f"distances of a map, {name}": [
            partial(_loop_distance, weights, grid, norm) for weights in maps[:num_maps].cpu()
        ]
        for name, norm in norms.items()
    }
    seconds |= costs.interleaved_seconds({"distances of a layer": ours}, 3 * num_repeats, device)
    for name, loop in loops.items():
        times = costs.interleaved_seconds(dict(enumerate(loop)), 1)
        seconds[name] = [value for in_turn in times.values() for value in in_turn]
        difference = torch.stack([work() for work in loop]) - ours()[:num_maps].cpu()
        errors[f"distance beside {name.split(', ')[1]}"] = float(difference.abs().max())
    return {
        "seconds": seconds,
        "errors": errors,
        "num_layers": table["layer"].nunique(),
        "device": costs.device_name(device),
    }


def summarize_metrics(record: records.Record) -> pd.Series:
    """Medians, errors, and the ratios that tell who is faster."""
    median = {name: statistics.median(values) for name, values in record["seconds"].items()}
    maps = {name: value for name, value in median.items() if name.startswith("distances of a map")}
    ours = median["distances of a layer"] / record.config["batch_size"]  # a map, of all heads
    forward = median["end to end, forward"]
    theirs, beyond = median[f"end to end, {PEER}"] - forward, median["end to end, ours"] - forward
    rows = {
        **{f"{name} (s)": value for name, value in median.items()},
        f"end to end, {PEER} / ours": median[f"end to end, {PEER}"] / median["end to end, ours"],
        f"beyond a forward pass, {PEER} / ours": theirs / beyond if beyond > 0 else math.inf,
        f"CKA part, {PEER} / ours": median[f"CKA part, {PEER}"] / median["CKA part, ours"],
        **{f"profile / forward, {kind}": median[f"profile, {kind}"] / median[f"forward, {kind}"]
           for kind in ("fused", "written out")},
        **{f"{name.replace('of a map', 'alone')} / ours": value / ours for name, value in maps.items()},
        **{f"largest error, {name}": math.nan if value is None else value for name, value in record["errors"].items()},
    }  # fmt: skip
    return pd.Series(rows, name=f"{record.config['backbone']['name']}, {record.config['num_images']} images")


def run_metrics(
    suite: str, backbone: str = "vit_base_patch16_224", num_images: int = 32, batch_size: int = 32, num_repeats: int = 3
) -> records.Record:
    """One race, on a ViT of timm with random weights; the record is made anew."""
    config = {
        "backbone": {"name": backbone, "pretrained": False},
        "num_images": num_images,
        "batch_size": batch_size,
        "num_repeats": num_repeats,
    }
    folder = records.folder(suite)
    return records.fetch(race_metrics, config, sources=(similarity, attention), folder=folder, fresh=True)


class _Stored(nn.Module):
    """A network whose layers hand out stored features; its input is the number of the batch."""

    def __init__(self, batches: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.batches = batches
        self.layers = nn.ModuleList(nn.Identity() for _ in batches[0])
        self.eval()

    @property
    def places(self) -> list[str]:
        """Names of the layers."""
        return [f"layers.{index}" for index in range(len(self.layers))]

    @property
    def loader(self) -> DataLoader:
        """Numbers of the batches, one by one."""
        return DataLoader(TensorDataset(torch.arange(float(len(self.batches)))), batch_size=1)

    def forward(self, x: Float[Tensor, " 1"]) -> Tensor:
        features = self.batches[int(x)]
        return [layer(feature) for layer, feature in zip(self.layers, features, strict=True)][-1]


def _cka_seconds(
    model: nn.Module, blocks: Sequence[str], images: Tensor, batches: Sequence[Sequence[Tensor]], num_repeats: int
) -> dict[str, list[float]]:
    """CKA of all pairs of blocks with both tools, on the network and on its stored features."""
    stored, loader = _Stored(batches), DataLoader(TensorDataset(images), len(batches[0][0]))
    hooked = copy.deepcopy(model).requires_grad_(True)  # torch-cka leaves its hooks behind
    works: dict[str, Callable[[], Any]] = {
        f"end to end, {PEER}": lambda: _peer(hooked, blocks, loader, images.device),
        "end to end, ours": lambda: similarity.layer_similarity(model, None, loader, blocks),
        "end to end, forward": lambda: _forward(model, images, len(batches[0][0])),
        f"CKA part, {PEER}": lambda: _peer(stored, stored.places, stored.loader, images.device),
        "CKA part, ours": lambda: similarity.layer_similarity(stored, None, stored.loader, stored.places),
    }
    return costs.interleaved_seconds(works, num_repeats, images.device)


def _errors(batches: Sequence[Sequence[Tensor]]) -> Iterable[tuple[str, str, float | None]]:
    """Largest errors of both tools against float64, by kind of features."""
    for kind, mean in (("as they are", 0), ("mean of 10 spreads", 10)):
        shifted = [[z + mean * z.std() for z in features] for features in batches]
        stored, twin = _Stored(shifted), _Stored([[z.double() for z in features] for features in shifted])
        exact = torch.tensor(similarity.layer_similarity(twin, None, twin.loader, twin.places).to_numpy())
        ours = torch.tensor(similarity.layer_similarity(stored, None, stored.loader, stored.places).to_numpy())
        theirs = _peer(stored, stored.places, stored.loader, shifted[0][0].device)
        yield kind, "ours", float((ours - exact).abs().max())
        yield kind, PEER, None if theirs is None else float((theirs - exact).abs().max())


def _peer(
    model: nn.Module, names: Sequence[str], loader: DataLoader, device: torch.device
) -> Float[Tensor, "layer layer"] | None:
    """CKA by torch-cka, its messages held back and its hooks taken away; None if it finds no number."""
    with from_extra("bench"):
        from torch_cka import CKA

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # that both networks have one name, and that they share a loader
        tool = CKA(model, model, model1_layers=list(names), model2_layers=list(names), device=str(device))
        try:
            tool.compare(loader)
        except AssertionError:  # HSIC computation resulted in NANs
            return None
        finally:
            for module in model.modules():
                module._forward_hooks.clear()
    return tool.export()["CKA"]


def _with_attention(model: nn.Module, is_fused: bool) -> nn.Module:
    """A copy whose attention runs in fused kernels, or written out."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = is_fused
    return twin


def _grid(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.grid_size
    return height, width


@torch.no_grad()
def _forward(model: nn.Module, images: Tensor, batch_size: int) -> None:
    for x in images.split(batch_size):
        model(x)


def _loop_distance(
    weights: Float[Tensor, "head token token"], grid: tuple[int, int], norm: Callable[[list[int]], Any]
) -> Float[Tensor, " head"]:
    """The distance of one image's maps as published code has it: pair by pair, class token dropped."""
    num, width = math.prod(grid), grid[1]
    matrix = np.zeros((num, num))
    for i in range(num):
        for j in range(num):
            matrix[i, j] = norm([i // width - j // width, i % width - j % width])
    maps = weights[:, -num:, -num:].numpy()
    return torch.from_numpy((maps * matrix).sum(-1).mean(-1)).to(weights.dtype)
