"""What each suite asks of prompts on pixels: arms, heads, widths, shifts, and the cells of every question.

A question that is not about backbones or tasks is asked of resnet_micro alone, with two seeds and four tasks. With
fewer tasks the intervals would be too wide to tell anything.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apthory import clip, training
from apthory.studies import cells, layers
from apthory.studies.pixels import Arms, PixelStudy, StudyPart

WIDTHS = (5, 30, 60, 90, 112)  # those of the papers; 112 covers the whole image
AROUND = (5, 30, 60)  # frames that leave 214, 164 (the paper's best) and 104 of 224 pixels to the image
# Both rows give steps of the same size, since gradients have a root mean square of about 4e-4.
RATES_BY_NORMALIZATION = {"l2": (1.0, 10.0), "none": (3e3, 3e4)}
CORRUPTIONS = tuple(
    {"corruption": name, "strength": strength}
    for name, strengths in {"noise": (0.05, 0.1, 0.2), "blur": (1.0, 2.0, 3.0), "contrast": (0.5, 0.3, 0.15)}.items()
    for strength in strengths
)
TWO_EMBEDDED_TASKS = ("textures", "orientation")
CLIP_BACKBONE: dict[str, Any] = {"name": "clip:ViT-B-32", "pretrained": "openai", "input_size": 224}
PROMPT_SITES = {  # where activation prompts are tried: all block sites but the image; fewer in larger networks
    "vit_micro": (*(f"blocks.{index}:input" for index in range(8)), "blocks.7:output"),
    "resnet_micro": (
        *(f"layer{stage}.{block}:input" for stage in (1, 2, 3, 4) for block in (0, 1)),
        "layer4.1:output",
    ),
    "mobilenetv2_100": ("blocks.3.3:input", "blocks.4.2:input", "blocks.6.0:input"),
    CLIP_BACKBONE["name"]: tuple(f"transformer.resblocks.{index}:input" for index in (2, 5, 8, 11)),
}


def _wide(name: str, width: int, **fields: Any) -> dict[str, Any]:
    """A method with a frame of some width; the default one is left out, so that it is the same cell everywhere."""
    return {"name": name, **({} if width == 30 else {"width": width}), **fields}


def _arms(arms: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: arms[name] for name in names}


METHOD_ARMS: Arms = {
    "vp": {"name": "vp"},
    "evp": {"name": "evp"},
    "adavipro": {"name": "adavipro"},
    "ap": {"name": "ap", "site": "each"},
    "linear_probe": {"name": "linear_probe"},
    "full": {"name": "full"},
}
PROMPTS = _arms(METHOD_ARMS, "vp", "evp", "adavipro", "ap", "linear_probe")
BY_SCALE = _arms(METHOD_ARMS, "vp", "evp", "linear_probe")
BY_WIDTH: Arms = {f"{name} {width}": _wide(name, width) for name in ("vp", "adavipro") for width in WIDTHS}
PLACEMENT: Arms = {
    f"{place} {width}": _wide("evp", width, **({"around": False} if place == "on top" else {}))
    for place in ("around", "on top")
    for width in AROUND
}
ABLATIONS: Arms = {
    "evp": {"name": "evp"},
    "no diversity": {"name": "evp", "diversity": []},
    "with RandAugment": {"name": "evp", "diversity": ["flip", "crop", "randaugment"]},
    "L1": {"name": "evp", "normalization": "l1"},
    "Linf": {"name": "evp", "normalization": "linf"},
    "adavipro": {"name": "adavipro"},
    "no edges": {"name": "adavipro", "edges": False},
    "from zero": {"name": "adavipro", "init": 0.0},
    **{f"region {side}": {"name": "adavipro", "region": side} for side in (8, 16, 56)},
}
NORMALIZED: Arms = {
    f"{norm} x{rate:g}": {
        "name": "evp",
        **({} if (norm, rate) == ("l2", 1) else {"normalization": norm, "rate": rate}),
    }
    for norm, rates in RATES_BY_NORMALIZATION.items()
    for rate in rates
}
BY_RATE: Arms = {  # each method's factor on the learning rate; validation images chose the default
    "vp x1": {"name": "vp", "rate": 1.0},
    "vp x10": {"name": "vp"},
    "vp x100": {"name": "vp", "rate": 100.0},
    "evp x1": {"name": "evp"},
    "evp x10": {"name": "evp", "rate": 10.0},
    "adavipro x1": {"name": "adavipro"},
    "adavipro x10": {"name": "adavipro", "rate": 10.0},
    "adavipro x1, generator x0.025": {"name": "adavipro", "rate": 1.0, "generator_rate": 0.025},
}
MAPPED: Arms = {"unprompted": {"name": "linear_probe"}, "vp": {"name": "vp"}, "evp": {"name": "evp"}}
HEADS = {
    "random": {"how": "random"},
    "frequency": {"how": "frequency", "counted": "images"},
    "frequency, shared": {"how": "frequency", "assignment": "mode", "counted": "images"},
    "iterative": {"how": "iterative", "counted": "images"},
}
SHOWN: Arms = {
    **{f"{name} {width}": _wide(name, width) for name in ("vp", "adavipro") for width in (30, 60)},
    "from zero 30": {"name": "adavipro", "init": 0.0},
}
IN_WORDS: Arms = {"zero-shot": {"name": "linear_probe"}, **_arms(METHOD_ARMS, "vp", "evp", "ap")}
WORDS = {"text": {"template": clip.VP_TEMPLATE}}  # EVP's differs in a capital letter, which CLIP's tokens do not have


def _embedded() -> dict[str, PixelStudy]:
    recipe = training.Recipe(num_epochs=2, batch_size=16, num_train=64, num_validation=40, num_test=120)
    protocol = cells.Protocol(recipe=recipe, learning_rates=(1.6e-2, 6.4e-2), seeds=(0, 1), control_seeds=(0,))
    one_seed = replace(protocol, recipe=replace(recipe, num_epochs=4, num_train=96), seeds=(0,))
    shared: dict[str, Any] = {"tasks": TWO_EMBEDDED_TASKS, "protocol": protocol}
    ends = ("vp 30", "vp 112", "adavipro 30", "adavipro 112")
    return {
        "pixels": {
            "methods": StudyPart(
                arms=METHOD_ARMS, places={"resnet_micro": PROMPT_SITES["resnet_micro"][3::2]}, **shared
            ),
            "mapping": StudyPart(arms=MAPPED, heads=_arms(HEADS, "frequency"), **shared),
            "widths": StudyPart(arms=_arms(BY_WIDTH, *ends), **shared),
            "placement": StudyPart(
                arms={name: PLACEMENT[name] for name in PLACEMENT if not name.endswith(" 5")}, **shared
            ),
            "ablations": StudyPart(arms=_arms(ABLATIONS, "evp", "no diversity", "adavipro", "no edges"), **shared),
            "rates": StudyPart(
                arms={name: BY_RATE[name] for name in BY_RATE if name.endswith(("x1", "x10"))}, **shared
            ),
            "normalization": StudyPart(arms=_arms(NORMALIZED, "l2 x1", "none x3000"), **shared),
            "4 per class": StudyPart(arms=BY_SCALE, per_class=4, **shared),
            "corruptions": StudyPart(arms=BY_SCALE, shifts=CORRUPTIONS[1::3], **shared),
        },
        "masks": {
            "judged": StudyPart(arms=_arms(ABLATIONS, "adavipro"), tasks=TWO_EMBEDDED_TASKS, protocol=one_seed),
            "judged, from zero": StudyPart(
                arms=_arms(ABLATIONS, "from zero"), tasks=TWO_EMBEDDED_TASKS, protocol=one_seed
            ),
            "shown": StudyPart(arms=SHOWN, tasks=TWO_EMBEDDED_TASKS, protocol=one_seed),
        },
    }


def _small() -> dict[str, PixelStudy]:
    protocol = layers.LAYER_STUDIES["small"]["S"].protocol
    recipe = protocol.recipe
    two_seeds = replace(protocol, seeds=(0, 1))
    all_images = replace(two_seeds, recipe=replace(recipe, num_epochs=6, num_train=None))
    short = replace(two_seeds, recipe=replace(recipe, num_epochs=5, num_train=256))
    tasks = ("cifar10", "gtsrb", "dtd10", "pacs", "rsscn7")
    real: dict[str, Any] = {"tasks": tasks, "protocol": protocol}
    side: dict[str, Any] = {"tasks": tasks[1:], "protocol": two_seeds, "usual": protocol}
    micro: dict[str, Any] = {"backbones": ({"name": "vit_micro"}, {"name": "resnet_micro"})}
    moved: dict[str, Any] = {
        "places": {name: places[1::3] for name, places in PROMPT_SITES.items()},
        "protocol": protocol,
    }
    mobile: dict[str, Any] = {"backbones": (layers.MOBILENET,), "protocol": short}
    in_clip: dict[str, Any] = {
        "backbones": (CLIP_BACKBONE,),
        "tasks": ("cifar10", "dtd10", "pacs", "caltech101", "trashnet"),  # whose class names are words
        "protocol": short,
    }
    domains = [{"domain": name} for name in ("art_painting", "cartoon", "sketch")]
    return {
        "pixels": {
            "methods": StudyPart(arms=METHOD_ARMS, places=PROMPT_SITES, **micro, **real),
            "mapping": StudyPart(arms=_arms(MAPPED, "unprompted"), heads=_arms(HEADS, "frequency"), **micro, **real),
            "mapping, prompted": StudyPart(arms=_arms(MAPPED, "vp", "evp"), heads=_arms(HEADS, "frequency"), **side),
            "widths": StudyPart(arms=BY_WIDTH, **side),
            "placement": StudyPart(arms=PLACEMENT, **side),
            "ablations": StudyPart(arms=ABLATIONS, **side),
            "rates": StudyPart(arms=BY_RATE, **side),
            "normalization": StudyPart(arms=NORMALIZED, **side),
            "4 per class": StudyPart(arms=BY_SCALE, per_class=4, tasks=tasks[1:], protocol=two_seeds),
            "16 per class": StudyPart(arms=BY_SCALE, per_class=16, tasks=tasks[1:], protocol=two_seeds),
            "all images": StudyPart(arms=BY_SCALE, tasks=tasks[1:], protocol=all_images),
            "domains": StudyPart(arms=PROMPTS, tasks=("pacs",), domain="photo", shifts=domains, **moved),
            "corruptions": StudyPart(arms=PROMPTS, tasks=("cifar10",), shifts=CORRUPTIONS, **micro, **moved),
        },
        "pixels-mobilenet": {
            "methods": StudyPart(arms=METHOD_ARMS, tasks=tasks, places=PROMPT_SITES, **mobile),
            "mapping": StudyPart(
                arms=_arms(MAPPED, "unprompted"), heads=_arms(HEADS, "frequency"), tasks=tasks, **mobile
            ),
            "mapping, 224 pixels": StudyPart(
                arms=_arms(MAPPED, "unprompted"),
                heads=_arms(HEADS, "random", "frequency", "frequency, shared"),
                tasks=tasks[2:],
                **{**mobile, "backbones": ({**layers.MOBILENET, "input_size": 224},)},
            ),
            "mapping, prompted": StudyPart(
                arms=_arms(MAPPED, "vp", "evp"), heads=_arms(HEADS, "frequency"), tasks=tasks[2:], **mobile
            ),
            "mapping, again": StudyPart(
                arms=_arms(MAPPED, "vp"), heads=_arms(HEADS, "iterative"), tasks=tasks[2:], **mobile
            ),
        },
        "masks": {
            "judged": StudyPart(arms=_arms(ABLATIONS, "adavipro"), tasks=tasks[1:], protocol=protocol, **micro),
            "judged, from zero": StudyPart(arms=_arms(ABLATIONS, "from zero"), **side),
            "shown": StudyPart(arms=SHOWN, tasks=TWO_EMBEDDED_TASKS, protocol=replace(protocol, seeds=(0,))),
        },
        "clip": _clip(**in_clip),
    }


def _clip(**fields: Any) -> PixelStudy:
    """Prompts on images and inside CLIP's image tower with the head in words, beside a linear probe."""
    fields = {"places": PROMPT_SITES, **fields}
    return {
        "methods": StudyPart(arms=IN_WORDS, heads=WORDS, **fields),
        "probe": StudyPart(arms=_arms(METHOD_ARMS, "linear_probe"), **fields),
    }


PIXEL_STUDIES: dict[str, dict[str, PixelStudy]] = {"embedded": _embedded(), "small": _small()}
