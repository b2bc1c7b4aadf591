"""`python -m natkeep.cli`: the same as the program natkeep."""

from natkeep.cli import program

if __name__ == "__main__":
    program()
