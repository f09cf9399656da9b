"""Corpora, tokenizer, chat and batches: from text to packed rows."""
