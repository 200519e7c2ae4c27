"""What layers of networks do: how alike they are, how far they attend, what they see, which frequencies they keep."""

from apthory.metrics.attention import attention_entropy, attention_profile, mean_attention_distance
from apthory.metrics.profile import layer_profile
from apthory.metrics.receptive import gradient_spread, participation_ratio, receptive_fields, theoretical_fields
from apthory.metrics.similarity import CKA, cka, layer_similarity
from apthory.metrics.spectrum import amplitude_by_frequency, spectra
from apthory.metrics.universality import arrivals, universality

__all__ = [
    "layer_profile", "cka", "CKA", "layer_similarity",
    "attention_profile", "mean_attention_distance", "attention_entropy",
    "receptive_fields", "theoretical_fields", "gradient_spread", "participation_ratio",
    "spectra", "amplitude_by_frequency", "arrivals", "universality",
]  # fmt: skip
