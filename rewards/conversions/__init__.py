"""Preference models that are published as pickles, made into folders that rewards read (`rlmm reward convert`)."""
