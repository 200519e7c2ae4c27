"""Where a channel prompt is a shift of one bias, and where it is not.

After a normalization layer, before a linear one, and wherever only sums lie between, adding the same vector at every
position moves a bias and nothing else: `fold_prompt` says by how much for one layer, `fold` finds the layer in a
backbone. `diagnose` tells what prompts can do at a site of any backbone. Where a prompt equals no normalization tuning,
`distance_to_tuning` tells how far it is from the nearest one. `descend` compares the two in training.

The statements are numbered E1 to E8: BatchNorm, output (1) and input (2); LayerNorm, output (3) and input (4);
linear maps (5); gradients (6); inclusions (7); prompts without effect (8). What a prompt on the image is to a ViT's
tokens (V1 and V2) stands in `tokens`: `input_span`, `frame_tokens`, `as_tokens`.
"""

from apthory.equivalence.layers import bias_shift, border_outputs, fold_prompt, matched_rate, unfold_prompt
from apthory.equivalence.networks import TOLERANCE, Diagnosis, diagnose, difference, fold
from apthory.equivalence.tokens import FrameTokens, InputSpan, as_tokens, frame_tokens, framed, input_span
from apthory.equivalence.tuning import DistanceToTuning, descend, distance_to_tuning

__all__ = [
    "bias_shift", "fold_prompt", "unfold_prompt", "border_outputs", "matched_rate",
    "fold", "diagnose", "Diagnosis", "difference", "TOLERANCE",
    "distance_to_tuning", "DistanceToTuning", "descend",
    "input_span", "InputSpan", "frame_tokens", "FrameTokens", "framed", "as_tokens",
]  # fmt: skip
