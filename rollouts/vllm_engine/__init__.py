"""Stock vLLM as a rollout engine. vLLM is imported by `engine` and `processor`, and only where one is built."""
