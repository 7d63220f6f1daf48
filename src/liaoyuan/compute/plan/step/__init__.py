"""A step of a job on a machine: the program on streams, through the pipeline, as seconds and memory with ranges."""
