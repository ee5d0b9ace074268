"""The one place where the version is written; read by the package, its build and the CLI."""

__version__ = "0.1.0"
