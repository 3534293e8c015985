"""Installed as `rlloop.envs`."""

if __name__ != "rlloop.envs":
    raise ImportError(f"import rlloop.envs, not {__name__}: the install maps this folder into the package")
