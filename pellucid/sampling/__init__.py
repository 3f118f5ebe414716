"""From logits to tokens: the sampler chain, its random generator and log-probabilities. No torch."""

from pellucid.sampling.rng import draw_seed, uniform
from pellucid.sampling.sampler import RowStats, SampledToken, SamplingRow

__all__ = ["RowStats", "SampledToken", "SamplingRow", "draw_seed", "uniform"]
