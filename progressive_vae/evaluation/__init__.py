"""Held-out metrics: bits per dimension, Fréchet distances, rate and distortion, throughput."""
