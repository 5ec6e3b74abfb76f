"""The type checker of jaxtyping's import hook (`--jaxtyping-packages` in pyproject.toml): beartype, an int may stand for a float.

It has a name without brackets, because the option splits a list of modules only then.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
