"""The commands `evabyte` and `byte-llama`: their options.

It is a package of its own because importing `evabyte` or `byte_llama` imports PyTorch and transformers, which takes
seconds: help and errors in the arguments do not wait for that. A command is imported when it runs.
"""
