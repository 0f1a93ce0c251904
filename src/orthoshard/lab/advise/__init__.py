"""``orthoshard advise``: which rank fraction the matrices of a run need, from the spectra in its record."""
