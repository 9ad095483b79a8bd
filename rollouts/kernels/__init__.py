"""Compiled kernels of a decode step on a CPU: `decode.cpp` for the torch engine, `paged.cpp` for vLLM's cache."""
