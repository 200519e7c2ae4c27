"""Every metric of every site of a backbone in one table."""

import math
import warnings
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import sites
from apthory._tools.progress import progress
from apthory.metrics import attention, batches, layout, receptive, similarity, spectrum


def layer_profile(
    backbone: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    places: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """What is global at each site, as one row a site, in the order asked for.

    Args:
        images: Normalized; at least 4, since similarity is debiased.
        places: All block sites by default.
        batch_size: Images that are differentiated at once.
        seed: Of the random directions behind fields and gradients.

    Returns:
        Columns, lengths in pixels of the image, NaN where a metric has no meaning:

        - ``site``; ``depth``, 0 the image, 1 the last block site, NaN between blocks; ``positions``; ``channels``;
        - ``field``, height of the theoretical receptive field, inf where a layer mixes all positions, NaN where an
          operation is not known; ``radius`` and ``area`` of the effective one;
        - ``reach``, positions that share an image's gradient (its `gradient_spread`; records have it under this name);
          ``reach_share``, the same as a share of all positions; ``coverage``,
          positions that the gradients of all images share;
        - ``high_frequency``, log of the amplitude at the highest frequency over that of the mean, -inf where a site is
          the same at all positions; ``shared``, the share of the activation that is;
        - ``attention_distance`` and ``attention_entropy`` (nats), mean over heads, of the block that the site enters;
        - ``similarity_to_last``, debiased CKA with the last site in the list.

    Raises:
        ValueError: If activations are not finite or constant, a site is not there, tokens make up no map, or the
            backbone is in training mode.

    Warns:
        UserWarning: If there is attention whose distances cannot be read.
    """
    if len(images) < 4:
        raise ValueError(f"a profile takes at least 4 images, not {len(images)}: similarity is debiased")
    (images,) = batches.batches(images, len(images), backbone)  # on its device, and none of its statistics moves
    block_sites = sites.list_sites(backbone)
    places = block_sites if places is None else list(places)
    parts = images.split(batch_size)
    with torch.no_grad():
        seen = sites.capture(backbone, places, images[:1])
    axes = layout.find_channel_axes(backbone, seen, images[:1])
    theory = _theoretical_heights(backbone, images[:1], places)
    signs = torch.Generator().manual_seed(seed)
    fields = receptive.receptive_fields(backbone, progress(parts, desc="receptive fields"), places, generator=signs)
    gradients = receptive.gradient_spread(backbone, progress(parts, desc="gradient spread"), places, generator=signs)
    spectra = spectrum.spectra(backbone, progress(parts, desc="spectra"), places)
    grams = progress(images.tensor_split(math.ceil(len(images) / 128)), desc="similarity")
    alike = similarity.layer_similarity(backbone, None, grams, places, places[-1:])[places[-1]]
    attending = _attention_by_site(backbone, progress(parts, desc="attention"), places)
    rows = []
    for site in places:
        field, gradient, power = fields[site], gradients[site], spectra[site]
        rows.append(
            {
                "site": site,
                "depth": block_sites.index(site) / (len(block_sites) - 1) if site in block_sites else math.nan,
                "positions": gradient.positions,
                "channels": seen[site].shape[axes[site]],
                "field": theory[site],
                "radius": field.radius,
                "area": field.area,
                "reach": gradient.spread,
                "reach_share": gradient.share,
                "coverage": gradient.coverage,
                "high_frequency": power.high_frequency,
                "shared": power.shared,
                **attending[site],
                "similarity_to_last": float(alike[site]),
            }
        )
    return pd.DataFrame(rows)


def _theoretical_heights(backbone: nn.Module, image: Tensor, places: Sequence[str]) -> dict[str, float]:
    try:
        fields = receptive.theoretical_fields(backbone, image, places)
    except receptive.UnknownOperationError:
        return dict.fromkeys(places, math.nan)
    return {site: float(field.height) for site, field in fields.items()}


def _attention_by_site(
    backbone: nn.Module, parts: Iterable[Tensor], places: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Distance and entropy in the module that a site enters, where attention is there."""
    names = {"attention_distance": "distance_pixels", "attention_entropy": "entropy"}
    nothing = dict.fromkeys(names, math.nan)
    try:
        heads = attention.attention_profile(backbone, parts)
    except attention.NoAttentionError:
        return dict.fromkeys(places, nothing)
    except ValueError as error:  # the other metrics have an answer
        warnings.warn(f"attention is left out, since {error}", stacklevel=3)
        return dict.fromkeys(places, nothing)
    means = heads.groupby("layer", sort=False)[list(names.values())].mean()
    by_site = {}
    for site in places:
        block, _, edge = site.rpartition(":")
        inside = means[[edge == "input" and f"{layer}.".startswith(f"{block}.") for layer in means.index]]
        values = {name: float(inside[column].iloc[0]) for name, column in names.items()} if len(inside) else nothing
        by_site[site] = values
    return by_site
