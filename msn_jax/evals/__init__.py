"""Evaluations, one suite per file: read questions, prompt the model, log the samples, score them, report."""
