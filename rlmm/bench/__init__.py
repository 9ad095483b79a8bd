"""`rlmm bench`: speed on this machine, against the plain alternative, with ratios measured in one run."""
