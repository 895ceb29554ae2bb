"""Lossless compression: entropy coding under the model, its byte format, fixed-point arithmetic."""
