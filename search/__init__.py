"""The search: configuration in, trials through, front and champion out."""
