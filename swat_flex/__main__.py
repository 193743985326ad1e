"""`python -m swat_flex`, the same commands as `swat-flex`."""

from swat_flex.cli import app

if __name__ == "__main__":
    app(prog_name="swat-flex")
