"""How far attention looks and how widely it spreads: mean distance and entropy by layer and head.

The model runs as it is, with its fused kernels. `attention_profile` watches the calls of torch's attention functions
(and of softmax, where a layer writes its attention out), takes queries, keys, biases and masks as they are handed
over, and keeps the means of a batch's maps, never the maps. So normalized or rotated queries, relative position biases
and shifted windows need no knowledge of the model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from apthory.metrics.batches import ImageBatches, batches

ClassToken = Literal["renormalize", "drop"]
_ENTRIES = {"cpu": 2**21, "cuda": 2**27}  # of the maps in memory at once: what a processor's cache holds, or 0.5 GiB
_NOWHERE = -1e4  # instead of minus infinity: its exponential is zero in every precision


class NoAttentionError(ValueError):
    """The backbone computes no self-attention over tokens."""


@torch.no_grad()
def attention_profile(
    backbone: nn.Module,
    images: ImageBatches,
    *,
    class_token: ClassToken = "renormalize",
    num_prefix_tokens: int | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Mean attention distance and entropy of every self-attention layer and head, means over images and patches.

    The distance of a patch is ``sum_j a_j |place_j - place|`` over the patches j that it attends to, with weights a
    that sum to one. Windows (Swin) are read by places within the window. The pairs that a shift brings together from
    opposite edges of the image carry the model's own mask of -100, hence weights of about e^-100, and count nothing;
    all others lie as far apart in the image as in the window.

    Args:
        images: Normalized images as a tensor, or batches of them.
        class_token: What becomes of attention to tokens without a place (class token, registers). With
            ``"renormalize"`` it is left out and the rest scaled to a sum of one. With ``"drop"`` only the distance
            leaves it out: it counts as distance zero, as in most published code, and is part of the entropy. As
            queries, such tokens never count.
        num_prefix_tokens: How many tokens without a place come first, where the backbone does not say so itself.
        batch_size: Images run at once, if ``images`` is a tensor.

    Returns:
        In the order of computation, one row a head: ``layer`` (the attention module's name), ``head``,
        ``distance_patches`` in steps of the layer's own tokens, ``distance_pixels``, ``entropy`` in nats. Attention
        of one sequence to another (pooling) and attention over channels are left out.

    Raises:
        ValueError: If the backbone has no self-attention over tokens or is in training mode, tokens do not make up a
            grid, windows are padded, or activations are not finite.

    References:
        Dosovitskiy et al. (2021), arXiv:2010.11929, section 4.5; Raghu et al. (2021), arXiv:2108.08810, section 4.
    """
    _check(class_token)
    reader = _Reader(backbone, class_token, num_prefix_tokens)
    with reader.hooked():
        for x in batches(images, batch_size, backbone):
            reader.image = (len(x), x.shape[-2], x.shape[-1])
            with reader:
                backbone(x)
    return reader.table()


def mean_attention_distance(
    weights: Float[Tensor, "*batch head token token"],
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    *,
    class_token: ClassToken = "renormalize",
    token_size: tuple[float, float] = (1.0, 1.0),
) -> Float[Tensor, "*batch head"]:
    """Mean attention distance of maps at hand, one value a map.

    Args:
        weights: Attention maps, rows are queries. Tokens without a place come first, then the grid row by row.
        grid: Height and width in tokens.
        num_prefix_tokens: How many tokens without a place (class token, registers) there are.
        class_token: As for `attention_profile`.
        token_size: Height and width of a token in the unit of the result, such as pixels.

    Raises:
        ValueError: If the tokens are not as many, maps are not finite, or a row has no weight on the tokens that count.
    """
    if weights.shape[-1] != num_prefix_tokens + math.prod(grid):
        raise ValueError(
            f"maps of {weights.shape[-1]} tokens are not {num_prefix_tokens} tokens without a place and a grid of "
            f"{grid[0]} x {grid[1]}; give num_prefix_tokens and grid that add up to them"
        )
    _check(class_token)
    table = _distances(_Places(grid, token_size, num_prefix_tokens), class_token, weights.dtype, weights.device)[-1]
    maps = weights.flatten(0, -3)
    means = []
    for part in maps.split(_num_maps(maps)):
        rows = _rows(part, num_prefix_tokens, class_token)
        distance = (rows * table).sum(-1)
        means.append((distance / rows.sum(-1) if class_token == "renormalize" else distance).mean(-1))
    return _defined(torch.cat(means).view(weights.shape[:-2]))


def attention_entropy(
    weights: Float[Tensor, "*batch head token token"],
    num_prefix_tokens: int = 0,
    *,
    class_token: ClassToken = "renormalize",
) -> Float[Tensor, "*batch head"]:
    """Entropy of maps at hand in nats, mean over the queries that have a place; at most the log of their keys.

    Raises:
        ValueError: As for `mean_attention_distance`.
    """
    _check(class_token)
    rows = _rows(weights, num_prefix_tokens, class_token)
    return _defined(torch.special.entr(rows / rows.sum(-1, keepdim=True)).sum(-1).mean(-1))


# ------------------------------------------------------------------------------------------ means of maps


class _Places(NamedTuple):
    """Where the tokens of a sequence lie."""

    grid: tuple[int, int]
    token_size: tuple[float, float]  # height and width in pixels
    num_prefix: int  # tokens without a place


@lru_cache(maxsize=16)
def _distances(
    places: _Places, class_token: ClassToken, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "2 query key"]:
    """From every token of the grid to every key, in tokens and in pixels; zero to keys without a place."""
    rows, columns = (index.flatten() for index in torch.meshgrid(*map(torch.arange, places.grid), indexing="ij"))
    down, right = ((axis[:, None] - axis).double() for axis in (rows, columns))
    height, width = places.token_size
    table = torch.stack([torch.hypot(down, right), torch.hypot(height * down, width * right)])
    if class_token == "drop":
        table = functional.pad(table, (places.num_prefix, 0))
    return table.to(device, dtype)


def _rows(weights: Tensor, num_prefix: int, class_token: ClassToken) -> Float[Tensor, "*batch query key"]:
    """Rows of the tokens that have a place, to those that count."""
    return weights[..., num_prefix:, num_prefix if class_token == "renormalize" else 0 :]


def _defined(means: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
    """The means of maps at hand, if all of them are numbers."""
    if not means.isfinite().all():
        raise ValueError("attention maps hold NaN or infinite values, or a row without weight on the tokens that count")
    return means


def _num_maps(maps: Float[Tensor, "map query key"]) -> int:
    """How many maps are read at once."""
    return max(1, _ENTRIES.get(maps.device.type, _ENTRIES["cpu"]) // maps[0].numel())


def _summaries(
    logits: Float[Tensor, "batch head query key"], distances: Float[Tensor, "2 query key"]
) -> Float[Tensor, "batch head 3"]:
    """Mean distance in tokens and in pixels, and mean entropy, of the maps that softmax makes of the logits."""
    logits = (logits - logits.amax(-1, keepdim=True)).clamp_min(_NOWHERE)
    weights = logits.softmax(-1)
    # With a largest logit of 0, the log of the partition function is -log(largest weight).
    entropy = -(weights.amax(-1).log() + (weights * logits).sum(-1))
    return torch.stack([*((weights * table).sum(-1) for table in distances), entropy], -1).mean(-2)


# ------------------------------------------------------------------------------------------ watching a model


class _Running(NamedTuple):
    """A module that is being computed."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]  # of its input


class _Reader(TorchFunctionMode):
    """Adds up what `_summaries` says of every self-attention that is computed while the mode is on."""

    def __init__(self, backbone: nn.Module, class_token: ClassToken, num_prefix_tokens: int | None) -> None:
        super().__init__()
        self.backbone, self.class_token = backbone, class_token
        own = getattr(backbone, "num_prefix_tokens", None)
        guesses = (0, 1) if own is None else tuple(dict.fromkeys((own, 0)))  # class tokens may come in late (CaiT)
        self.num_prefix = guesses if num_prefix_tokens is None else (num_prefix_tokens,)
        self.image = (0, 0, 0)  # how many, height, width
        self.running: list[_Running] = []
        self.sums: dict[str, Float64[Tensor, "head 3"]] = {}
        self.counts: dict[str, int] = {}
        self.readers: dict[Callable, Callable] = {
            functional.scaled_dot_product_attention: self._fused,
            functional.multi_head_attention_forward: self._multi_head,
            **dict.fromkeys((torch.softmax, Tensor.softmax, functional.softmax), self._written_out),
        }

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in self.readers:  # the mode is off in here: what is read is not watched
            self.readers[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Know which module is running; only those with weights can be meant."""
        with ExitStack() as stack:
            for name, module in self.backbone.named_modules():
                if next(module.parameters(), None) is not None:
                    enter = module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                    leave = module.register_forward_hook(self._leave, always_call=True)
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            yield

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.running.append(_Running(name, module, () if x is None else tuple(x.shape)))

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """`functional.scaled_dot_product_attention` is being called."""
        if query.shape[-2] == key.shape[-2] and query.ndim != 4:
            raise ValueError(
                f"{self._name!r} calls attention with queries of shape {tuple(query.shape)}, in which heads and "
                "sequences cannot be told apart; expected [sequence, head, token, dim]"
            )
        if self._is_over_tokens(query.shape[-2], key.shape[-2]):
            self._read_products(query, key, attn_mask, is_causal, scale)

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        *_: Any,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **__: Any,
    ) -> None:
        """`nn.MultiheadAttention` is running; it projects on the inside, so queries and keys are projected anew."""
        if query is not key or in_proj_weight is None or query.ndim != 3:
            return
        if key_padding_mask is not None:
            raise ValueError(f"{self._name!r} masks padded tokens, which have no place in an image")
        bias = None if in_proj_bias is None else in_proj_bias[: 2 * width]
        both = functional.linear(query, in_proj_weight[: 2 * width], bias)  # [token, batch, 2 * width]
        query, key = both.unflatten(-1, (2, num_heads, -1)).permute(2, 1, 3, 0, 4)
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask  # here, True hides
            attn_mask = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.ndim == 3 else attn_mask
        self._read_products(query, key, attn_mask)

    def _written_out(self, logits: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        """Softmax is being called, perhaps by attention without a fused kernel."""
        if logits.ndim == 4 and dim in (-1, 3) and self._is_over_tokens(*logits.shape[2:]):
            num, num_heads, num_tokens, _ = logits.shape
            self._read(logits, num, num_heads, num_tokens, lambda part, query, key: logits[part, :, query:, key:])

    @property
    def _name(self) -> str:
        return self.running[-1].name

    @property
    def _window(self) -> tuple[int, ...]:
        """Height and width of the windows that the running module attends within; empty if it names none."""
        window = getattr(self.running[-1].module, "window_size", ())
        return (window, window) if isinstance(window, int) else tuple(window or ())

    def _is_over_tokens(self, num_queries: int, num_keys: int) -> bool:
        """Whether the maps are over the tokens that the running module was given, not over channels or others."""
        if not self.running or num_queries != num_keys:
            return False
        return num_keys in (math.prod(self.running[-1].shape[1:-1]), math.prod(self._window or (0,)))

    def _read_products(
        self,
        query: Float[Tensor, "batch head token dim"],
        key: Float[Tensor, "batch group token dim"],
        mask: Tensor | None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        num, num_heads, num_tokens, dim = query.shape
        key = key.repeat_interleave(num_heads // key.shape[1], 1)  # grouped queries share keys
        scale = dim**-0.5 if scale is None else scale
        dtype = torch.promote_types(query.dtype, torch.float32)
        if is_causal:
            mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
            mask = mask.expand(num, num_heads, num_tokens, num_tokens)

        def logits(part: slice, first_query: int, first_key: int) -> Tensor:
            products = (scale * query[part, :, first_query:].to(dtype)) @ key[part, :, first_key:].to(dtype).mT
            return products if mask is None else products + mask[part, :, first_query:, first_key:]

        self._read(query, num, num_heads, num_tokens, logits)

    def _read(
        self, like: Tensor, num: int, num_heads: int, num_tokens: int, logits: Callable[[slice, int, int], Tensor]
    ) -> None:
        """Add up a call's summaries, a part of the batch at a time.

        Args:
            like: Tells dtype and device.
            logits: Of a part of the batch, from the first query and the first key that are wanted.
        """
        places = self._places(num, num_tokens)
        first_key = places.num_prefix if self.class_token == "renormalize" else 0
        dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
        distances = _distances(places, self.class_token, dtype, device)
        step = max(1, _ENTRIES.get(device.type, _ENTRIES["cpu"]) // (num_heads * num_tokens**2))
        total = self.sums.get(self._name, torch.zeros(num_heads, 3, dtype=torch.float64, device=device))
        with torch.autocast(device.type, enabled=False):
            for start in range(0, num, step):
                part = logits(slice(start, start + step), places.num_prefix, first_key).to(dtype)
                total = total + _summaries(part, distances).double().sum(0)
        self.sums[self._name] = total
        self.counts[self._name] = self.counts.get(self._name, 0) + num

    def _places(self, num_sequences: int, num_tokens: int) -> _Places:
        """Where the tokens of the running module lie: in a window that it names, or all over the image."""
        num_images, height, width = self.image
        around = next(
            call.shape for call in reversed(self.running[:-1] or self.running) if call.shape[:1] == self.image[:1]
        )
        window = self._window
        if window and math.prod(window) == num_tokens and (num_sequences != num_images or len(around) == 4):
            size = self._token_size(around, num_sequences * num_tokens // num_images)
            return _Places((window[0], window[1]), size, 0)
        if num_sequences != num_images:
            raise ValueError(f"{self._name!r} attends within parts of the image, and does not say where they lie")
        for num_prefix in self.num_prefix:
            num = num_tokens - num_prefix
            rows = max(1, round(math.sqrt(max(num, 0) * height / width)))
            columns = num // rows
            if num > 0 and rows * columns == num and 0.9 < (height / rows) / (width / columns) < 1.1:
                return _Places((rows, columns), (height / rows, width / columns), num_prefix)
        raise ValueError(
            f"{self._name!r} has {num_tokens} tokens: with {' or '.join(map(str, self.num_prefix))} before them, no "
            f"grid over images of {height} x {width} pixels; say how many come first (num_prefix_tokens)"
        )

    def _token_size(self, around: tuple[int, ...], num_tokens: int) -> tuple[float, float]:
        """Height and width in pixels of tokens in windows, from what the module around them was given."""
        _, height, width = self.image
        for shape in (around[1:-1], around[2:]):  # channels last or first
            if math.prod(shape) == num_tokens:
                side = math.sqrt(height * width / num_tokens)  # of square tokens, where no map is given
                return (height / shape[0], width / shape[1]) if len(shape) == 2 else (side, side)
        raise ValueError(
            f"the windows of {self._name!r} do not tile what they are cut from, of shape {around}, and what pads them "
            "has no place; give images of a size that they divide"
        )

    def table(self) -> pd.DataFrame:
        """One row a layer and head."""
        if not self.sums:
            raise NoAttentionError(
                f"{type(self.backbone).__name__} computes no self-attention over tokens, so there is none to measure"
            )
        rows = []
        for layer, total in self.sums.items():
            means = (total / self.counts[layer]).cpu()
            if not means.isfinite().all():
                raise ValueError(f"the attention of {layer!r} is not finite; look at the activations before it")
            for head, (patches, pixels, entropy) in enumerate(means.tolist()):
                rows.append((layer, head, patches, pixels, entropy))
        return pd.DataFrame(rows, columns=["layer", "head", "distance_patches", "distance_pixels", "entropy"])


def _check(class_token: str) -> None:
    if class_token not in ("renormalize", "drop"):
        raise ValueError(f"class_token is {class_token!r}; there are 'renormalize' and 'drop'")
