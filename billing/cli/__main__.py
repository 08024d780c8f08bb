"""`python -m billing.cli`, where the console script is not installed."""

from billing.cli import main

if __name__ == "__main__":
    main(prog_name="billing")
