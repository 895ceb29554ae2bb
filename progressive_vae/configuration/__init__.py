"""Configs of levels, priors and tokenizers, their validation, and which of them fit together."""
