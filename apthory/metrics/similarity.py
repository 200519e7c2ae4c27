"""How alike the layers of networks represent the same images: centred kernel alignment (CKA).

CKA is the cosine of two Gram matrices, each centred in one of two ways: *biased*, by its mean rows and columns
(Kornblith et al. 2019), or *debiased*, off the diagonal only (U-centring, Székely and Rizzo 2014), after which inner
products are the unbiased HSIC of Song et al. (2012). So all pairs of layers take one Gram matrix a layer and one
matrix product, and minibatches add up (Nguyen et al. 2021).

Features are centred before the Gram matrix is taken. That changes nothing in exact arithmetic, and keeps the digits
that a mean common to all samples eats in float32. All that follows the Gram matrix is float64.

References:
    Kornblith et al. (2019), Similarity of neural network representations revisited, arXiv:1905.00414.
    Nguyen et al. (2021), Do wide and deep networks learn the same things?, arXiv:2010.15327, Eq. (2) and (3).
    Song et al. (2012), Feature selection via dependence maximization, JMLR 13, Eq. (5).
    Székely and Rizzo (2014), Partial distance correlation with methods for dissimilarities, Annals of Statistics 42.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from apthory import sites
from apthory.metrics.batches import ImageBatches, batches

Kernel = Literal["linear", "rbf"]
_GRAM_ROUNDING = 1e-12  # of a Gram matrix's squared norm: what is left of float32 features that are all alike


def cka(
    x: Float[Tensor, "sample_x *feature_x"],
    y: Float[Tensor, "sample_y *feature_y"],
    *,
    kernel: Kernel = "linear",
    debiased: bool = True,
    bandwidth: float = 1.0,
) -> Float64[Tensor, ""]:
    """Centred kernel alignment of two representations of the same samples; differentiable.

    1 for representations that differ by rotation, shift and scale only; for independent ones 0, in the mean and up
    to chance if debiased, while the biased value tends to 1 as features outnumber samples.

    Args:
        x: Features, one row a sample; more axes are flattened.
        y: Features of the same samples in the same order.
        kernel: ``"rbf"`` is ``exp(-distance^2 / (2 sigma^2))``.
        debiased: Use the unbiased HSIC, whose value does not depend on the number of samples in the mean.
        bandwidth: Sigma of the RBF kernel, in units of the median distance between two samples.

    Raises:
        ValueError: If numbers of samples differ or are below 4 (biased: 3), or features are constant or not finite.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples, y has {len(y)}; CKA compares features of the same samples")
    _check_kernel(kernel, bandwidth)
    _check_number(len(x), debiased)
    pair = {"x": x, "y": y}
    if kernel == "linear" and all(len(z) > z[0].numel() for z in pair.values()):
        hsic = _hsic_of_features(pair, debiased)
    else:
        grams = {name: gram(z, kernel, bandwidth) for name, z in pair.items()}
        centred = _centred_grams(grams, debiased)
        hsic = _hsic(centred, centred, debiased)
    return _cka_of_hsic(hsic, hsic.diagonal(), hsic.diagonal(), list(pair), list(pair))[0, 1]


class CKA:
    """CKA of every layer of one network with every layer of another, added up over minibatches.

    Memory is that of one Gram matrix a layer, whatever the number of features and batches. The debiased value is the
    ratio of mean unbiased HSICs, so its expectation hardly depends on the batch size; with one batch it is `cka`.
    Batches count by their number of samples. Biased, it is that of the mean batch and falls with the batch size.

        >>> alignment = CKA()
        >>> for x in batches:
        ...     alignment.update(capture(first, places, x), capture(second, others, x))
        >>> alignment.compute()
    """

    def __init__(self, *, kernel: Kernel = "linear", debiased: bool = True, bandwidth: float = 1.0) -> None:
        _check_kernel(kernel, bandwidth)
        self.debiased = debiased
        self.gram = partial(gram, kernel=kernel, bandwidth=bandwidth)
        self._names: tuple[list[str], list[str]] = ([], [])
        self._sums: list[Tensor] = []  # HSIC of a with b, of a with itself, of b with itself

    @torch.no_grad()
    def update(self, features_a: Mapping[str, Tensor], features_b: Mapping[str, Tensor] | None = None) -> None:
        """Add a batch.

        Args:
            features_a: By layer, each with one row a sample; more axes are flattened.
            features_b: The other network's, of the same samples; by default the same features once more.

        Raises:
            ValueError: If numbers of samples differ or are below 4 (biased: 3), features are not finite, or the
                layers are not those of the batches before.
        """
        by_network = [features_a] if features_b is None else [features_a, features_b]
        for z in (z for features in by_network for z in features.values()):
            _check_number(len(z), self.debiased)
        self.update_grams(*({name: self.gram(z) for name, z in features.items()} for features in by_network))

    @torch.no_grad()
    def update_grams(self, grams_a: Mapping[str, Tensor], grams_b: Mapping[str, Tensor] | None = None) -> None:
        """Add a batch of which only the Gram matrices (`gram`) were kept."""
        a = _centred_grams(grams_a, self.debiased)
        b = a if grams_b is None else _centred_grams(grams_b, self.debiased).to(a.device)
        if len(a[0]) != len(b[0]):
            raise ValueError(f"one network gave {len(a[0])} samples, the other {len(b[0])}; give both the same images")
        names = (list(grams_a), list(grams_a if grams_b is None else grams_b))
        products = (_hsic(a, b, self.debiased), *(_self_hsic(z, self.debiased) for z in (a, b)))
        if not self._sums:
            self._names, self._sums = names, [torch.zeros_like(value) for value in products]
        if names != self._names:
            raise ValueError(f"layers {names} differ from those of the batches before, {self._names}")
        self._sums = [total + len(a[0]) * value for total, value in zip(self._sums, products, strict=True)]

    def compute(self) -> pd.DataFrame:
        """CKA by layer of the first network (rows) and of the second (columns).

        Raises:
            ValueError: If there was no batch, or a layer's features are the same for all samples.
        """
        if not self._sums:
            raise ValueError("there is no batch to compare; call update with features first")
        hsic, self_a, self_b = self._sums
        values = _cka_of_hsic(hsic, self_a, self_b, *self._names)
        rows, columns = (pd.Index(names, name=f"layer_{which}") for names, which in zip(self._names, "ab", strict=True))
        return pd.DataFrame(values.cpu().numpy(), rows, columns)


@torch.no_grad()
def layer_similarity(
    model_a: nn.Module,
    model_b: nn.Module | None,
    images: ImageBatches,
    sites_a: Sequence[str] | None = None,
    sites_b: Sequence[str] | None = None,
    *,
    images_b: ImageBatches | None = None,
    batch_size: int = 128,
    kernel: Kernel = "linear",
    debiased: bool = True,
    bandwidth: float = 1.0,
) -> pd.DataFrame:
    """CKA of all pairs of sites of two networks, or of one with itself, from one pass over the images.

    Gram matrices are taken while the networks run, so no activation is kept, and a network compared with itself runs
    once. Features of a site are its whole activation, flattened.

    Args:
        model_b: The second network; None, or the first once more, compares the first with itself.
        images: Normalized images as a tensor, or batches of them.
        sites_a: Where in the first network; all block sites by default.
        sites_b: Where in the second; likewise, or ``sites_a`` if the network is the same.
        images_b: The same images in the same order as the second network wants them (size, normalization).
        batch_size: Samples in a Gram matrix, at least 4, if ``images`` is a tensor.
        kernel: As for `cka`, likewise the next two.

    Returns:
        One row a site of the first network, one column a site of the second.

    Raises:
        ValueError: As for `CKA`; if a backbone is in training mode; if the two networks get different numbers of
            images or batches; if a site is not there.
    """
    model_b = model_a if model_b is None else model_b
    sites_a = list(sites.list_sites(model_a) if sites_a is None else sites_a)
    if sites_b is None:
        sites_b = sites_a if model_b is model_a else sites.list_sites(model_b)
    alignment = CKA(kernel=kernel, debiased=debiased, bandwidth=bandwidth)
    if model_b is model_a and images_b is None:
        places = list(dict.fromkeys([*sites_a, *sites_b]))
        for x in batches(images, batch_size, model_a):
            grams = sites.capture(model_a, places, x, alignment.gram)
            a, b = ({site: grams[site] for site in chosen} for chosen in (sites_a, sites_b))
            alignment.update_grams(a, None if list(a) == list(b) else b)
    else:
        for x, y in _paired(images, images_b, batch_size, model_a, model_b):
            a, b = (
                sites.capture(model_a, sites_a, x, alignment.gram),
                sites.capture(model_b, sites_b, y, alignment.gram),
            )
            alignment.update_grams(a, b)
    return alignment.compute()


def gram(
    x: Float[Tensor, "sample *feature"], kernel: Kernel = "linear", bandwidth: float = 1.0
) -> Float64[Tensor, "sample sample"]:
    """Kernel of all pairs of samples, up to what centring takes away: of centred features, the RBF kernel less 1.

    Raises:
        ValueError: If most pairs of samples are equal but not all, so that the RBF kernel has no median to go by.
    """
    _check_kernel(kernel, bandwidth)
    x = _widened(x)
    products = _products(x)
    if not 1e-25 < products.diagonal().amax() < 1e25:  # near the end of float32's range, constant, or not finite
        size = _size(x)
        products = _products(x / size) * size.double().square()
    if kernel == "linear":
        return products
    norms = products.diagonal()
    distances = (norms[:, None] + norms - 2 * products).clamp_min(0)  # squared
    pairs = torch.triu_indices(len(x), len(x), 1, device=x.device)
    median = distances[pairs[0], pairs[1]].median()
    if not median and distances.any():
        raise ValueError(
            "more than half of the pairs of samples are equal, so their median distance is 0; use 'linear'"
        )
    median = median.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.expm1(-distances / (2 * bandwidth**2 * median))


# ------------------------------------------------------------------------------------------ centring


def _check_kernel(kernel: str, bandwidth: float) -> None:
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"no kernel {kernel!r}; there are 'linear' and 'rbf'")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}; it must be positive, in units of the median distance")


def _products_are_exact() -> bool:
    """Whether products of float32 matrices are computed in float32, rather than with the ten bits of TF32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for each backend by itself
        return False


def _widened(x: Tensor) -> Float[Tensor, "sample feature"]:
    """Features in a precision whose products keep their digits."""
    least = torch.float32 if _products_are_exact() else torch.float64
    if not x.numel():
        raise ValueError(f"features have the shape {tuple(x.shape)}; give at least one value for each sample")
    return x.reshape(len(x), -1).to(torch.promote_types(x.dtype, least))


def _products(x: Float[Tensor, "sample feature"]) -> Float64[Tensor, "sample sample"]:
    """Inner products of the samples' deviations from their mean; zeros if all is rounding.

    Taken part by part, so that the centred copy stays in a processor's cache.
    """
    num_columns = max(1024, (2**18 if x.device.type == "cpu" else 2**28) // len(x))
    products = level = torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for part in x.split(num_columns, 1):
            mean = part.mean(0)
            deviations = part - mean
            products = products + (deviations @ deviations.T).double()
            level = level + mean.square().sum().double()
    return torch.where(products.diagonal().amax() <= _least(x, level), 0, products)


def _size(x: Tensor) -> Float[Tensor, ""]:
    """The largest absolute value, in units of which no product overflows; not finite if a value is not."""
    low, high = x.detach().aminmax()
    return torch.maximum(high, -low).clamp_min(torch.finfo(x.dtype).tiny)


def _least(x: Tensor, level: Tensor) -> Tensor:
    """The squared deviation below which it is rounding of features whose mean has this squared norm."""
    return (8 * torch.finfo(x.dtype).eps) ** 2 * level


def _centred_grams(grams: Mapping[str, Tensor], debiased: bool) -> Float64[Tensor, "layer sample sample"]:
    """The layers' Gram matrices, each with rows and columns that add up to zero; debiased, on a diagonal of zeros."""
    if not grams:
        raise ValueError("there are no layers to compare; give at least one")
    sizes = {name: len(matrix) for name, matrix in grams.items()}
    num = next(iter(sizes.values()))
    if len(set(sizes.values())) > 1:
        raise ValueError(f"layers differ in their number of samples: {sizes}")
    _check_number(num, debiased)
    matrices = torch.stack(list(grams.values()))
    is_finite = matrices.isfinite().flatten(1).all(1).tolist()
    if not all(is_finite):
        raise ValueError(f"features of {list(grams)[is_finite.index(False)]!r} hold NaN or infinite values")
    if debiased:
        off_diagonal = 1 - torch.eye(num, dtype=matrices.dtype, device=matrices.device)
        matrices = matrices * off_diagonal
        rows = matrices.sum(2, keepdim=True) / (num - 2)
        centred = (matrices - rows - rows.mT + rows.sum(1, keepdim=True) / (num - 1)) * off_diagonal
    else:
        rows = matrices.mean(2, keepdim=True)
        centred = matrices - rows - rows.mT + rows.mean(1, keepdim=True)
    squares, total = (z.square().sum((1, 2), keepdim=True) for z in (centred, matrices))
    return torch.where(squares <= _GRAM_ROUNDING * total, 0, centred)


def _check_number(num: int, debiased: bool) -> None:
    least = 4 if debiased else 3  # below, the unbiased HSIC is not defined, and any two samples are alike
    if num < least:
        raise ValueError(
            f"{'debiased' if debiased else 'biased'} CKA takes at least {least} samples in every batch, not {num}; "
            "give larger batches and leave out a short last one (drop_last=True)"
        )


# ------------------------------------------------------------------------------------------ HSIC


def _num_pairs(num: int, debiased: bool) -> int:
    return num * (num - 3) if debiased else (num - 1) ** 2


def _hsic(
    a: Float64[Tensor, "layer_a sample sample"], b: Float64[Tensor, "layer_b sample sample"], debiased: bool
) -> Float64[Tensor, "layer_a layer_b"]:
    """HSIC of all pairs of layers: inner products of centred Gram matrices."""
    return a.flatten(1) @ b.flatten(1).T / _num_pairs(a.shape[1], debiased)


def _self_hsic(a: Float64[Tensor, "layer sample sample"], debiased: bool) -> Float64[Tensor, " layer"]:
    return a.square().sum((1, 2)) / _num_pairs(a.shape[1], debiased)


def _hsic_of_features(pair: Mapping[str, Tensor], debiased: bool) -> Float64[Tensor, "2 2"]:
    """The same for linear kernels and more samples than features, from covariances and without Gram matrices.

    Rows of a centred Gram matrix K add up to zero, and ``<K, L> = |X^T Y|^2``; what the diagonals a and b add to the
    unbiased HSIC is subtracted: ``(<K, L> - n/(n-2) a.b + (sum a)(sum b) / ((n-1)(n-2))) / (n(n-3))``.
    """
    num = len(next(iter(pair.values())))
    centred = []
    for name, x in pair.items():
        x = _widened(x)
        z = x.double() / _size(x).double()
        mean = z.mean(0)
        z = z - mean
        if not z.isfinite().all():
            raise ValueError(f"features of {name!r} hold NaN or infinite values")
        centred.append(torch.where(z.square().sum(1).amax() <= _least(x, mean.square().sum()), 0, z))
    total = torch.stack([torch.stack([(x.T @ y).square().sum() for y in centred]) for x in centred])
    hsic = total
    if debiased:
        diagonals = torch.stack([z.square().sum(1) for z in centred])
        traces = diagonals.sum(1)
        hsic = total - num / (num - 2) * diagonals @ diagonals.T + traces.outer(traces) / ((num - 1) * (num - 2))
    with_itself = torch.eye(2, dtype=torch.bool, device=hsic.device)
    return torch.where((hsic <= _GRAM_ROUNDING * total) & with_itself, 0, hsic) / _num_pairs(num, debiased)


def _cka_of_hsic(
    hsic: Float64[Tensor, "layer_a layer_b"],
    self_a: Float64[Tensor, " layer_a"],
    self_b: Float64[Tensor, " layer_b"],
    names_a: Iterable[str],
    names_b: Iterable[str],
) -> Float64[Tensor, "layer_a layer_b"]:
    for names, values in ((names_a, self_a), (names_b, self_b)):
        for name, value in zip(names, values.tolist(), strict=True):
            if not value > 0:
                raise ValueError(
                    f"features of {name!r} are the same for all samples, or all samples equally far apart: there is "
                    "nothing to compare; leave them out"
                )
    return hsic / (self_a[:, None] * self_b).sqrt()


def _paired(
    images: ImageBatches, images_b: ImageBatches | None, batch_size: int, model_a: nn.Module, model_b: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for both networks, which must be as many."""
    if images_b is None:
        for x, y in ((x, next(batches((x,), batch_size, model_b))) for x in batches(images, batch_size, model_a)):
            yield x, y
        return
    for x, y in zip_longest(batches(images, batch_size, model_a), batches(images_b, batch_size, model_b)):
        if x is None or y is None:
            raise ValueError("one network got more batches than the other; give both the same images")
        yield x, y
