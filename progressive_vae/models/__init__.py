"""Level and prior, and what they consist of: encoders, quantizers, decoders, distributions."""
