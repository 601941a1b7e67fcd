"""The tests with the oldest and the newest supported versions: `nox`, or `nox -s oldest` and `nox -s newest`.

They compile as users do, which takes twice as long: see `tests/conftest.py`.
"""

import nox

nox.options.default_venv_backend = "venv"
AS_USERS_DO = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=true", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Tests Python 3.11 with the oldest JAX."""
    session.install("-e", ".[test]", "jax==0.10.0", "jaxlib==0.10.0")
    session.run("python", "-m", "pytest", *session.posargs, env=AS_USERS_DO)


@nox.session(python=["3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """Tests newer Pythons with the newest JAX."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs, env=AS_USERS_DO)
