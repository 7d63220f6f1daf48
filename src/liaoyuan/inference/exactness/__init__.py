"""Exact mode: a proof that every way to compute a token gives the same bits, on this machine and for this model."""
