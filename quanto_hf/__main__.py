"""``python -m quanto_hf``: the command line."""

from quanto_hf.cli import main

if __name__ == "__main__":
    main()
