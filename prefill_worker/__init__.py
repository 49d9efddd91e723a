"""The prefill role: a prompt goes in, its first token and leased state come out. A worker's host does the rest."""
