"""Names and colours of what studies compare, for tables and figures: each method's own, and those of the controls."""

from apthory.methods import METHODS

# The table's name of a method at a certain place, with another head, or under the name that its records have.
_VARIANTS = {
    "input_prompt": ("input prompt", "#0072B2"),  # on the whole normalized image, from zero
    "ap_channel": ("activation prompt, per channel", "#E69F00"),
    "evp_on_top": ("EVP, on top", "#117733"),
    "full": ("full fine-tuning", "#6B6B6B"),
    "frozen_head": ("prompt, frozen head", "#56B4E9"),
    "site_probe": ("probe on the site's features", "#5B3A8C"),
}
_LOOKS = {name: (method.label, method.color) for name, method in METHODS.items()} | _VARIANTS
LABELS = {name: label for name, (label, _) in _LOOKS.items()}
COLORS = {name: color for name, (_, color) in _LOOKS.items()}
