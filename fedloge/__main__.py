"""`python -m fedloge`: the same as the command `fedloge`."""

from fedloge.main import main

if __name__ == "__main__":
    main()
