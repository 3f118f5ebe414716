"""From logits to tokens: the sampler chain, its random generator and log-probabilities. No torch."""

from pellucid.sampling.rng import draw_seed, uniform
from pellucid.sampling.sampler import RowStats, SampledToken, Sampler, SamplingRow, row_stats_numpy

__all__ = ["RowStats", "SampledToken", "Sampler", "SamplingRow", "draw_seed", "row_stats_numpy", "uniform"]
