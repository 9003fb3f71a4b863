"""`python -m clone_fast`: the command line, see cli.py."""

from clone_fast.cli import main

if __name__ == "__main__":
    main(prog_name="clone-fast")
