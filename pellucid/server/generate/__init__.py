"""What every endpoint that generates shares: a request becomes a job, a generation, deltas, log-probabilities, states."""
