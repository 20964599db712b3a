"""`python -m autobatch`: the same as `autobatch`."""

from autobatch.cli import app

if __name__ == "__main__":
    app(prog_name="autobatch")
