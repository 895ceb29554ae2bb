"""Held-out metrics: bits per dimension, Fréchet distances, rate–distortion, throughput."""
