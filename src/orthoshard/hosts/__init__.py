"""Adapters for frameworks that want more than an optimizer: one file a host, each needing only that host.

Most hosts need none: see the pages of `docs/hosts`. May import the public names of the package.
"""
