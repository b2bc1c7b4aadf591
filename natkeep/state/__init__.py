"""what was done, on disk: the journals of all moves, their form, and the files of the directory."""
