"""Whether RL helped: arms tuned alike on validation prompts, several training seeds, the test prompts read once."""
