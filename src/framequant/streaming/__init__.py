"""Quantize models larger than the machine: block by block from disk to disk, with a journal, by one process or many."""
