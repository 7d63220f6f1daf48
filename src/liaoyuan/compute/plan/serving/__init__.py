"""What serving a trace of requests takes: the engine's own scheduler, its steps priced by the figures of a profile."""
