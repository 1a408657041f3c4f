"""`python -m rsmtdf`: the same command line as `rsmtdf`."""

from rsmtdf.cli.main import main

if __name__ == "__main__":
    main()
