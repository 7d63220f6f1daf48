"""Prefill and decode in different processes, with blocks of the cache handed over under leases."""
