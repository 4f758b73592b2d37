"""``python -m rlrf`` is the command ``rlrf``: what launchers of several processes start."""

from rlrf.cli import main

if __name__ == "__main__":
    main()
