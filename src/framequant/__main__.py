"""``python -m framequant``: the same as the command ``framequant``."""

from framequant.cli.app import main

if __name__ == "__main__":
    main()
