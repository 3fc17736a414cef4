"""Evaluators: runtimes that deploy an artifact and metrics that measure the deployed file."""
