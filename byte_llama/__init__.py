"""Byte-level Llama and Gemma 2 for Hugging Face transformers. The models arrive in a coming version."""
