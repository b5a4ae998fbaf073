"""Bridges to other libraries, each alone in its file; nothing here is imported until it is needed."""
