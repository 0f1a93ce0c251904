"""Adapters for frameworks that want more than an optimizer: one file a host, each needing only that host.

Most hosts need none: see `docs/frameworks.md`. May import the public names of the package.
"""
