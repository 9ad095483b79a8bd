"""In-process samplers in plain torch: the reference for every other engine."""
