"""Passes on Dynamo's graphs, one a file."""
