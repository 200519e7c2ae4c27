"""Measurements of how global features are, layer by layer, each as a record; and a control that learned nothing."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import backbones, metrics, sites, tasks
from apthory.lab import records
from apthory.metrics import attention, similarity
from apthory.studies import input_limits

GLOBAL_FEATURE_SOURCES = (metrics, input_limits)  # their code decides the records, besides a cell's modules
NetworkKind = Literal["trained", "shuffled"]
Queries = Literal["patches", "class token"]


@records.versioned(1, name="apthory.global_study.measure_profile")
def measure_profile(
    backbone: Mapping[str, Any], task: str, size: int, network: NetworkKind, num_images: int, seed: int = 0
) -> dict[str, Any]:
    """`metrics.layer_profile` of all block sites on a task's train images.

    Args:
        backbone: Arguments of `backbones.load`.
        task: Name for `tasks.load`.
        size: Side of the images in pixels.
        network: ``"shuffled"`` is the control: the entries of each weight matrix in random order.
        num_images: The first of the split with seed 0.
        seed: Of the random order, and of the random directions behind fields and gradients.
    """
    model, x = _network(backbone, task, size, network, num_images, seed)
    rows = metrics.layer_profile(model, x, seed=seed).to_dict("records")
    return {"sites": [{name: _finite(value) for name, value in row.items()} for row in rows]}


@records.versioned(1, name="apthory.global_study.measure_similarity")
def measure_similarity(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    other: Mapping[str, Any],
    other_size: int,
    other_digest: str,
    num_images: int,
) -> dict[str, Any]:
    """Debiased CKA of all block sites but the image of one backbone with those of another, on a task's train images.

    Args:
        backbone: Arguments of `backbones.load`.
        task: Name for `tasks.load`.
        size: Side of the first backbone's images in pixels.
        other: Of the second backbone.
        other_size: Likewise.
        other_digest: `backbones.digest` of the second backbone, so that other weights are another record.
        num_images: The first of the split with seed 0; one Gram matrix holds 128 at most.
    """
    first, x = _network(backbone, task, size, "trained", num_images)
    second, y = _network(other, task, other_size, "trained", num_images)
    if backbones.digest(second) != other_digest:
        raise ValueError(f"the weights of {other['name']!r} are not those of the digest {other_digest[:12]}")
    places, others = sites.list_sites(first)[1:], sites.list_sites(second)[1:]
    table = similarity.layer_similarity(first, second, x, places, others, images_b=y)
    return {"sites": places, "other_sites": others, "cka": table.to_numpy()}


@records.versioned(1, name="apthory.global_study.measure_attention")
def measure_attention(
    backbone: Mapping[str, Any], task: str, size: int, network: NetworkKind, num_images: int, seed: int = 0
) -> dict[str, Any]:
    """Distance and entropy of attention by block, and how much the features heed it, on a task's train images.

    Args:
        backbone: Arguments of `backbones.load`, of a ViT with a class token.
        task: Name for `tasks.load`.
        size: Side of the images in pixels.
        network: As for `measure_profile`.
        num_images: The first of the split with seed 0.
        seed: Of the control's random order.

    Returns:
        For every block: distance in patches with attention to the class token left out, and counted as zero; entropy
        in nats; `change_if_uniform` for the queries of the patches and of the class token. And the distance that
        uniform attention has.
    """
    model, x = _network(backbone, task, size, network, num_images, seed)
    left_out, as_zero = (attention.attention_profile(model, x, class_token=how) for how in ("renormalize", "drop"))
    with torch.no_grad():
        plain = model(x)
    means = left_out.groupby("layer", sort=False)[["distance_patches", "entropy"]].mean()
    dropped = as_zero.groupby("layer", sort=False)["distance_patches"].mean()
    rows = [
        {
            "layer": layer,
            "distance": mean.distance_patches,
            "distance_with_class_token": dropped[layer],
            "entropy": mean.entropy,
            "patches": change_if_uniform(model, x, layer, "patches", plain),
            "class_token": change_if_uniform(model, x, layer, "class token", plain),
        }
        for layer, mean in means.iterrows()
    ]
    embedding: Any = model.get_submodule("patch_embed")
    height, width = embedding.grid_size
    uniform = torch.full((1, height * width, height * width), 1 / (height * width), dtype=torch.float64)
    return {"layers": rows, "uniform": attention.mean_attention_distance(uniform, (height, width))[0]}


@torch.no_grad()
def change_if_uniform(
    backbone: nn.Module,
    x: Float[Tensor, "batch channel height width"],
    layer: str,
    queries: Queries,
    plain: Float[Tensor, "batch feature"] | None = None,
) -> float:
    """How far features move when some queries of a layer attend to all tokens alike, over the features' own spread.

    Both are root mean squares over images; the spread is that around the mean image. Queries of zero have the same
    product with every key.

    Args:
        layer: A timm attention module with one projection for queries, keys and values.
        plain: The features as they are, if they are known.
    """
    module: Any = backbone.get_submodule(layer)
    first: Any = backbone.num_prefix_tokens  # timm's
    if not (hasattr(module, "qkv") and isinstance(getattr(module, "q_norm", nn.Identity()), nn.Identity)):
        raise ValueError(f"{layer!r} has no joint projection of queries, keys and values, or normalizes the queries")
    plain = backbone(x) if plain is None else plain
    width = module.qkv.out_features // 3
    chosen = slice(first, None) if queries == "patches" else slice(first)
    with sites.edited(backbone, {f"{layer}.qkv": partial(_without, tokens=chosen, width=width)}):
        moved = backbone(x)
    return float((moved - plain).square().sum().sqrt() / (plain - plain.mean(0)).square().sum().sqrt())


def _without(z: Tensor, tokens: slice, width: int) -> Tensor:
    z = z.clone()
    z[:, tokens, :width] = 0
    return z


def _network(
    backbone: Mapping[str, Any], task: str, size: int, network: NetworkKind, num_images: int, seed: int = 0
) -> tuple[nn.Module, Tensor]:
    """A backbone and the images to look at."""
    model, data = backbones.load(**backbone), tasks.load(task, size)
    x = backbones.normalize(model, data.train[data.split(0).train[:num_images]])
    return (input_limits.shuffled(model, x, seed) if network == "shuffled" else model), x


def _finite(value: Any) -> Any:
    """The value, or None for what a record cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
