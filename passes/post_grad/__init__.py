"""Passes on Inductor's graphs, one a file."""
