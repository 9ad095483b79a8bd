"""Policy families: what is trained."""
