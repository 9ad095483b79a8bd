"""The entries of the registry: what each reward's options are called, and how it is made. Nothing heavy is imported
before a reward is made.
"""
