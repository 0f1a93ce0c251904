"""Adapters for frameworks that need more than an optimizer: one file for each host, which needs only that host.

Most hosts need no adapter: see `docs/frameworks.md`. May import the public names of the package.
"""
