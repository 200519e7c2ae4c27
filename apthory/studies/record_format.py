"""The recorded format: how configurations, data and weights are spelled in the keys of records, frozen for ever.

A key is the digest of what is written here, so a record is found again only as long as nothing in it is spelled in
another way. Code may rename a field or add one; what is written stays as it was, and a field that came later is written
only where it differs from its default.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

from torch import nn

from apthory import backbones, clip, heads, methods, training

_RECIPE = (  # the fields of a recipe that every record has
    "num_epochs",
    "batch_size",
    "optimizer",
    "momentum",
    "warmup",
    "num_train",
    "num_validation",
    "num_test",
    "precision",
    "deterministic",
    "cache",
)
# Digests of weights that records name by another one. The random start of vit_micro was recorded as one kind of
# processor drew it; drawn alike on all processors, 453 of its 1,619,584 values differ from that by a last bit.
_RECORDED_DIGESTS = {
    "6519a8b80a67dd10f2bd2a8743cfbf56f6ce99cca2233ce9f40c1230b60b3cd1": (
        "e88dde13ad5611572a3327e71f66380fa7c0d753cdae386527c002bf79dd452b"
    ),
}
_SCORES = {"windows_times_gradient": "found"}  # scores of sites that records name by an older name


def spell_cell(
    backbone: Mapping[str, Any],
    task: str,
    method: Mapping[str, Any],
    recipe_of_all: training.Recipe,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A cell: a method with its backbone, task and protocol. A trained head is not spelled out.

    Args:
        backbone: Arguments of `backbones.load`; without ``input_size`` the images are 64 pixels wide.
        task: Name for `tasks.load`.
        method: As `method_of` reads it.
        recipe_of_all: Of every configuration.
        learning_rates: Grid for the first seed.
        seeds: All of them.
        head: As `head_of` reads it; None for a trained one.
    """
    config = {
        "backbone": dict(backbone),
        "task": task,
        "size": backbone.get("input_size", 64),
        "method": dict(method),
        "recipe": recipe(recipe_of_all),
        "learning_rates": list(learning_rates),
        "seeds": list(seeds),
    }
    return config if head is None else {**config, "head": dict(head)}


def random_prompt(site: str, norms: Sequence[float]) -> dict[str, Any]:
    """A frozen random prompt of some norm for each seed.

    Three digits of a norm are enough, and keep the last bits of a machine out of the key.
    """
    return {"name": "random_prompt", "site": site, "norms": [float(f"{norm:.3g}") for norm in norms]}


def random_prompts_of(spelled: Mapping[str, Any], seeds: Sequence[int]) -> list[methods.FixedPrompt]:
    """The frozen random prompts behind `random_prompt`, one for each seed."""
    pairs = zip(spelled["norms"], seeds, strict=True)
    return [methods.FixedPrompt(site=spelled["site"], norm=norm, seed=seed) for norm, seed in pairs]


def recipe(recipe: training.Recipe) -> dict[str, Any]:
    """A recipe: `_RECIPE`, then later fields where they are not at their default."""
    spelled = {name: getattr(recipe, name) for name in _RECIPE}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name not in spelled and value != field.default:
            spelled[field.name] = value
    return spelled


def recipe_of(spelled: Mapping[str, Any]) -> training.Recipe:
    """The recipe behind a recorded one."""
    return training.Recipe(**spelled)


def weights(digest: str) -> str:
    """The digest by which records name the weights that have this one."""
    return _RECORDED_DIGESTS.get(digest, digest)


def weights_digest(backbone: nn.Module) -> str:
    """The digest by which records name a backbone's weights: of an image tower that of its whole CLIP."""
    return weights(backbones.digest(backbones.whole(backbone)))


def backbone_of(spelled: Mapping[str, Any]) -> nn.Module:
    """The backbone behind a recorded one, from memory where it was wanted before."""
    return _backbone(json.dumps(dict(spelled)))


# Methods whose name in records differs from their name in `methods.METHODS`, and fields that have another name now.
_METHODS = {"frozen_head": "ap", "site_probe": "linear_probe", "full": "fine_tuning"}
_OPTIONS = {"rate": "lr_scale", "relative": "in_rms_units", "generator_rate": "generator_lr_scale"}


def spell_score(name: str) -> str:
    """The name by which records call a score of sites."""
    return _SCORES.get(name, name)


def score_of(spelled: str) -> str:
    """The score behind a recorded name."""
    return {old: name for name, old in _SCORES.items()}.get(spelled, spelled)


def method_of(spelled: Mapping[str, Any]) -> methods.Method:
    """The method behind a name of the records; a "vp" with a site is a prompt on the whole normalized image."""
    name = spelled["name"]
    options = {
        _OPTIONS.get(key, key): tuple(value) if isinstance(value, list) else value
        for key, value in spelled.items()
        if key != "name"
    }
    if name == "vp" and "site" in options:
        name = "ap"
    known = [*methods.METHODS, *_METHODS]
    if (own := _METHODS.get(name, name)) not in methods.METHODS:
        raise ValueError(f"no method {name!r}; expected {', '.join(known)}")
    return methods.METHODS[own](**options)


def site_of(spelled: Mapping[str, Any]) -> str:
    """The site of a recorded method; where it has none, that of its class. Full fine-tuning counts as the output's."""
    name = spelled["name"]
    return (
        ":output" if name == "full" else spelled.get("site") or vars(methods.METHODS[_METHODS.get(name, name)])["site"]
    )


def method_name(spelled: Mapping[str, Any]) -> str:
    """What tables call a recorded method: its own name, but ``input_prompt`` for a "vp" with a site.

    Records call two methods "vp": Bahng's frame, which starts from noise, and the prompt on the whole normalized image,
    which starts at zero and is an activation prompt at ``:input``.
    """
    return "input_prompt" if spelled["name"] == "vp" and "site" in spelled else spelled["name"]


def head_of(
    spelled: Mapping[str, Any] | None, backbone: Mapping[str, Any], classes: Sequence[str]
) -> heads.HeadSpec | None:
    """None for a trained head; with a ``template``, CLIP's text head; else fields of a `heads.LabelMapping`."""
    if spelled is None:
        return None
    if "template" in spelled:
        return _text_head(json.dumps(dict(backbone)), tuple(classes), **spelled)
    return heads.LabelMapping(backbones.classifier(**backbone), **spelled)


@lru_cache(maxsize=4)
def _backbone(spec: str) -> nn.Module:
    return backbones.load(**json.loads(spec))


@lru_cache
def _text_head(spec: str, classes: tuple[str, ...], template: str) -> heads.TextHead:
    """The text tower runs once for all studies of a process."""
    return clip.of(_backbone(spec)).text_head(classes, template)
