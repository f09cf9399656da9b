"""Corpora, tokenizers, chat templates and batches: from text to packed rows."""
