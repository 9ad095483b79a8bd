"""Rewards that ask a multimodal model behind an OpenAI-compatible server (`vllm serve`, SGLang, a hosted one)."""
