"""What each suite asks of prompts on pixels: arms, heads, widths, shifts, and the cells of every question.

Where a question is not about backbones or tasks as such, it is put to resnet_micro, two seeds and four tasks: fewer
make no interval worth having.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apthory import clip, training
from apthory.studies import cells, layers
from apthory.studies.pixels import Arms, Part, Study

WIDTHS = (5, 30, 60, 90, 112)  # the papers', 112 being the whole image
AROUND = (5, 30, 60)  # frames that leave 214, 164 (the paper's best) and 104 of 224 pixels to the image
RATES = {"l2": (1.0, 10.0), "none": (3e3, 3e4)}  # the same steps: gradients have a root mean square of some 4e-4
CORRUPTIONS = tuple(
    {"corruption": name, "strength": strength}
    for name, strengths in {"noise": (0.05, 0.1, 0.2), "blur": (1.0, 2.0, 3.0), "contrast": (0.5, 0.3, 0.15)}.items()
    for strength in strengths
)
EMBEDDED = ("textures", "orientation")
CLIP: dict[str, Any] = {"name": "clip:ViT-B-32", "pretrained": "openai", "input_size": 224}
PLACES = {  # of activation prompts: all block sites but the image; of the larger networks some
    "vit_micro": (*(f"blocks.{index}:input" for index in range(8)), "blocks.7:output"),
    "resnet_micro": (
        *(f"layer{stage}.{block}:input" for stage in (1, 2, 3, 4) for block in (0, 1)),
        "layer4.1:output",
    ),
    "mobilenetv2_100": ("blocks.3.3:input", "blocks.4.2:input", "blocks.6.0:input"),
    CLIP["name"]: tuple(f"transformer.resblocks.{index}:input" for index in (2, 5, 8, 11)),
}


def _wide(name: str, width: int, **fields: Any) -> dict[str, Any]:
    """A method with a frame of some width; the default one is left out, so that it is the same cell everywhere."""
    return {"name": name, **({} if width == 30 else {"width": width}), **fields}


def _arms(arms: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: arms[name] for name in names}


METHODS: Arms = {
    "vp": {"name": "vp"},
    "evp": {"name": "evp"},
    "adavipro": {"name": "adavipro"},
    "ap": {"name": "ap", "site": "each"},
    "linear_probe": {"name": "linear_probe"},
    "full": {"name": "full"},
}
PROMPTS = _arms(METHODS, "vp", "evp", "adavipro", "ap", "linear_probe")
BY_SCALE = _arms(METHODS, "vp", "evp", "linear_probe")
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
    for norm, rates in RATES.items()
    for rate in rates
}
BY_RATE: Arms = {  # each method's share of the learning rate: validation images chose the default
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
IN_WORDS: Arms = {"zero-shot": {"name": "linear_probe"}, **_arms(METHODS, "vp", "evp", "ap")}
WORDS = {"text": {"template": clip.VP_TEMPLATE}}  # EVP's differs in a capital letter, which CLIP's tokens do not have


def _embedded() -> dict[str, Study]:
    recipe = training.Recipe(num_epochs=2, batch_size=16, num_train=64, num_validation=40, num_test=120)
    protocol = cells.Protocol(recipe=recipe, learning_rates=(1.6e-2, 6.4e-2), seeds=(0, 1), control_seeds=(0,))
    one = replace(protocol, recipe=replace(recipe, num_epochs=4, num_train=96), seeds=(0,))
    two: dict[str, Any] = {"tasks": EMBEDDED, "protocol": protocol}
    ends = ("vp 30", "vp 112", "adavipro 30", "adavipro 112")
    return {
        "pixels": {
            "methods": Part(arms=METHODS, places={"resnet_micro": PLACES["resnet_micro"][3::2]}, **two),
            "mapping": Part(arms=MAPPED, heads=_arms(HEADS, "frequency"), **two),
            "widths": Part(arms=_arms(BY_WIDTH, *ends), **two),
            "placement": Part(arms={name: PLACEMENT[name] for name in PLACEMENT if not name.endswith(" 5")}, **two),
            "ablations": Part(arms=_arms(ABLATIONS, "evp", "no diversity", "adavipro", "no edges"), **two),
            "rates": Part(arms={name: BY_RATE[name] for name in BY_RATE if name.endswith(("x1", "x10"))}, **two),
            "normalization": Part(arms=_arms(NORMALIZED, "l2 x1", "none x3000"), **two),
            "4 per class": Part(arms=BY_SCALE, per_class=4, **two),
            "corruptions": Part(arms=BY_SCALE, shifts=CORRUPTIONS[1::3], **two),
        },
        "masks": {
            "judged": Part(arms=_arms(ABLATIONS, "adavipro"), tasks=EMBEDDED, protocol=one),
            "judged, from zero": Part(arms=_arms(ABLATIONS, "from zero"), tasks=EMBEDDED, protocol=one),
            "shown": Part(arms=SHOWN, tasks=EMBEDDED, protocol=one),
        },
    }


def _small() -> dict[str, Study]:
    protocol = layers.STUDIES["small"]["S"].protocol
    recipe = protocol.recipe
    two_seeds = replace(protocol, seeds=(0, 1))
    every = replace(two_seeds, recipe=replace(recipe, num_epochs=6, num_train=None))
    short = replace(two_seeds, recipe=replace(recipe, num_epochs=5, num_train=256))
    tasks = ("cifar10", "gtsrb", "dtd10", "pacs", "rsscn7")
    real: dict[str, Any] = {"tasks": tasks, "protocol": protocol}
    side: dict[str, Any] = {"tasks": tasks[1:], "protocol": two_seeds, "usual": protocol}
    micro: dict[str, Any] = {"backbones": ({"name": "vit_micro"}, {"name": "resnet_micro"})}
    moved: dict[str, Any] = {"places": {name: places[1::3] for name, places in PLACES.items()}, "protocol": protocol}
    mobile: dict[str, Any] = {"backbones": (layers.MOBILENET,), "protocol": short}
    in_clip: dict[str, Any] = {
        "backbones": (CLIP,),
        "tasks": ("cifar10", "dtd10", "pacs", "caltech101", "trashnet"),  # whose class names are words
        "protocol": short,
    }
    domains = [{"domain": name} for name in ("art_painting", "cartoon", "sketch")]
    return {
        "pixels": {
            "methods": Part(arms=METHODS, places=PLACES, **micro, **real),
            "mapping": Part(arms=_arms(MAPPED, "unprompted"), heads=_arms(HEADS, "frequency"), **micro, **real),
            "mapping, prompted": Part(arms=_arms(MAPPED, "vp", "evp"), heads=_arms(HEADS, "frequency"), **side),
            "widths": Part(arms=BY_WIDTH, **side),
            "placement": Part(arms=PLACEMENT, **side),
            "ablations": Part(arms=ABLATIONS, **side),
            "rates": Part(arms=BY_RATE, **side),
            "normalization": Part(arms=NORMALIZED, **side),
            "4 per class": Part(arms=BY_SCALE, per_class=4, tasks=tasks[1:], protocol=two_seeds),
            "16 per class": Part(arms=BY_SCALE, per_class=16, tasks=tasks[1:], protocol=two_seeds),
            "all images": Part(arms=BY_SCALE, tasks=tasks[1:], protocol=every),
            "domains": Part(arms=PROMPTS, tasks=("pacs",), domain="photo", shifts=domains, **moved),
            "corruptions": Part(arms=PROMPTS, tasks=("cifar10",), shifts=CORRUPTIONS, **micro, **moved),
        },
        "pixels-mobilenet": {
            "methods": Part(arms=METHODS, tasks=tasks, places=PLACES, **mobile),
            "mapping": Part(arms=_arms(MAPPED, "unprompted"), heads=_arms(HEADS, "frequency"), tasks=tasks, **mobile),
            "mapping, 224 pixels": Part(
                arms=_arms(MAPPED, "unprompted"),
                heads=_arms(HEADS, "random", "frequency", "frequency, shared"),
                tasks=tasks[2:],
                **{**mobile, "backbones": ({**layers.MOBILENET, "input_size": 224},)},
            ),
            "mapping, prompted": Part(
                arms=_arms(MAPPED, "vp", "evp"), heads=_arms(HEADS, "frequency"), tasks=tasks[2:], **mobile
            ),
            "mapping, again": Part(
                arms=_arms(MAPPED, "vp"), heads=_arms(HEADS, "iterative"), tasks=tasks[2:], **mobile
            ),
        },
        "masks": {
            "judged": Part(arms=_arms(ABLATIONS, "adavipro"), tasks=tasks[1:], protocol=protocol, **micro),
            "judged, from zero": Part(arms=_arms(ABLATIONS, "from zero"), **side),
            "shown": Part(arms=SHOWN, tasks=EMBEDDED, protocol=replace(protocol, seeds=(0,))),
        },
        "clip": _clip(**in_clip),
    }


def _clip(**fields: Any) -> Study:
    """Prompts on images and inside CLIP's image tower with the head in words, beside a linear probe."""
    fields = {"places": PLACES, **fields}
    return {
        "methods": Part(arms=IN_WORDS, heads=WORDS, **fields),
        "probe": Part(arms=_arms(METHODS, "linear_probe"), **fields),
    }


STUDIES: dict[str, dict[str, Study]] = {"embedded": _embedded(), "small": _small()}
