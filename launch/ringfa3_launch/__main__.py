"""`python -m ringfa3_launch`: the command `ringfa3` where its script is not on the PATH."""

from ringfa3_launch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
