"""What the campaigns share: cases and their supervision, findings, a tiny model, outputs as bits, lone runs."""
