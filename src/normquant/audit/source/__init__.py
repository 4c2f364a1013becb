"""Generated code as text, read into a program: never imported, run or unpickled."""
