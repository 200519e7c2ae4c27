"""The recorded format: how configurations, data and weights are spelled in the keys of records, frozen for ever.

A key is the digest of what is written here, so a record is found again only as long as nothing in it is spelled in
another way. Code may rename a field or add one; what is written stays as it was, and a field that came later is written
only where it differs from its default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

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
_WEIGHTS = {
    "6519a8b80a67dd10f2bd2a8743cfbf56f6ce99cca2233ce9f40c1230b60b3cd1": (
        "e88dde13ad5611572a3327e71f66380fa7c0d753cdae386527c002bf79dd452b"
    ),
}
_SCORES = {"windows_times_gradient": "found"}  # scores of sites that records name by an older name


def cell(
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
    return _WEIGHTS.get(digest, digest)


def score(name: str) -> str:
    """The name by which records call a score of sites."""
    return _SCORES.get(name, name)


def score_of(spelled: str) -> str:
    """The score behind a recorded name."""
    return {old: name for name, old in _SCORES.items()}.get(spelled, spelled)


def method_of(spelled: Mapping[str, Any]) -> methods.Method:
    """The method behind a name of the tables; a visual prompt with a site is one on the whole normalized image."""
    name = spelled["name"]
    options = {key: value for key, value in spelled.items() if key != "name"}
    match name:
        case "ap":
            return methods.ActivationPrompting(**options)
        case "vp":
            return methods.ActivationPrompting(**options) if "site" in options else methods.VP(**options)
        case "frozen_head":
            return methods.ActivationPrompting(**options, head="frozen")
        case "norm":
            return methods.NormTuning(**options)
        case "linear_probe" | "site_probe":
            return methods.LinearProbe(**options)
        case "full":
            return methods.FullFineTuning(**options)
        case "evp":
            lists = {key: tuple(value) for key, value in options.items() if key == "diversity"}
            return methods.EVP(**{**options, **lists})
        case "adavipro":
            return methods.AdaViPro(**options)
    known = "vp, ap, frozen_head, norm, linear_probe, site_probe, full, evp or adavipro"
    raise ValueError(f"no method {name!r}; expected {known}")


def head_of(
    spelled: Mapping[str, Any] | None, backbone: Mapping[str, Any], classes: Sequence[str]
) -> heads.HeadSpec | None:
    """None for a trained head; with a ``template``, CLIP's text head; else fields of a `heads.LabelMapping`."""
    if spelled is None:
        return None
    if "template" in spelled:
        return clip.text_head_of(backbone, classes, **spelled)
    return heads.LabelMapping(backbones.classifier(**backbone), **spelled)
