"""Installed as `rlloop.algorithms`."""

if __name__ != "rlloop.algorithms":
    raise ImportError(f"import rlloop.algorithms, not {__name__}: the install maps this folder into the package")
